"""What parity tests share: names in messages, and ways to break a model by one live weight or rule, each of which must
be noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visling.nn.coattention import CoAttentionLayer


def labelled(name: str) -> Callable[[str], str]:
    """Puts a name before the message of a failed comparison."""
    return lambda text: f"{name}: {text}"


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

        def forward(
            text: Tensor, regions: Tensor, text_mask: Tensor, region_mask: Tensor, trace: Any, own: Any = layer
        ) -> Any:
            text, _ = own.text_attention(text, regions, region_mask)
            regions, _ = own.region_attention(regions, text, text_mask)
            text, regions = own.text_feed_forward(text), own.region_feed_forward(regions)
            if trace is not None:
                trace.add_streams(text, regions)
            return text, regions

        layer.forward = forward


class _OneAfterTheOther(nn.Module):
    """Cross-attention in which regions read the text that has already read them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.text: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, *, capture: bool) -> Any:
        states, probs = self.block(x, y if self.text is None else self.text, mask, capture=capture)
        self.text = states
        return states, probs


def sequential(model: Any) -> None:
    """The first cross-attention of an LXMERT, direction after direction."""
    layer = model.encoder.cross_layers[0]
    layer.cross_attention = _OneAfterTheOther(layer.get_submodule("cross_attention"))
