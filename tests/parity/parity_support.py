"""What parity tests share: names in messages, and ways to break a model by one live weight or rule, each of which must
be noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from visling.nn.coattention import CoAttentionLayer, CrossModalityLayer
from visling.nn.packing import Packing


def labelled(name: str) -> Callable[[str], str]:
    """Puts a name before the message of a failed comparison."""
    return lambda text: f"{name}: {text}"


def assert_rows_close(ours: Tensor, recorded: Tensor, real: Tensor, name: str, **close: Any) -> None:
    """States (B, N, ...) equal the recorded ones at every real position, and are zeros at padding, where releases keep
    whatever their layers made of it."""
    assert ours.shape == recorded.shape, f"{name}: found {tuple(ours.shape)}, recorded {tuple(recorded.shape)}"
    assert_close(ours[real], recorded[real], **close, msg=labelled(name))
    assert not ours[~real].any(), f"{name}: padding has states"


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter by its name, in which -1 stands for the last layer."""
    layers, last, rest = name.partition(".-1.")
    if last:
        name = f"{layers}.{len(list(model.get_submodule(layers).children())) - 1}.{rest}"
    return model.get_parameter(name)


def nudge(name: str) -> Callable[[nn.Module], None]:
    """Move every entry of a parameter by about a hundredth; not by a constant, which a norm takes off."""

    def change(model: nn.Module) -> None:
        with torch.no_grad():
            weight = parameter_of(model, name).view(-1)
            weight += 0.01 * torch.linspace(0.5, 1.5, len(weight))

    return change


def nudge_first(name: str) -> Callable[[nn.Module], None]:
    """Move one entry of a parameter by a hundredth."""

    def change(model: nn.Module) -> None:
        with torch.no_grad():
            parameter_of(model, name).view(-1)[0] += 0.01

    return change


def rough_norms(model: nn.Module) -> None:
    """Another epsilon in every norm."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def one_after_the_other(model: Any) -> None:
    """Regions read the text that has already read them."""
    for layer in model.encoder.co_attention_layers:
        assert isinstance(layer, CoAttentionLayer)
        made: dict[str, Tensor] = {}
        layer.text_attention.register_forward_hook(
            lambda module, arguments, output, made=made: made.update(text=output[0])
        )
        layer.region_attention.register_forward_pre_hook(
            lambda module, arguments, made=made: (arguments[0], made["text"], *arguments[2:])
        )


def sequential(model: Any) -> None:
    """The first cross-attention of an LXMERT, direction after direction."""
    layer = model.encoder.cross_layers[0]
    assert isinstance(layer, CrossModalityLayer)
    layer.cross_attention = _OneAfterTheOther(layer.cross_attention)  # type: ignore[assignment]


class _OneAfterTheOther(nn.Module):
    """Cross-attention in which regions read the text that has already read them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.text: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor, x_rows: Packing, y_rows: Packing, *, capture: bool) -> Any:
        states, probs = self.block(x, y if self.text is None else self.text, x_rows, y_rows, capture=capture)
        self.text = states
        return states, probs
