"""Steps that are recorded once for every shape of batch and then replayed: a GPU launches one graph instead of some
thousand kernels.

Why graphs and not a compiler: recording takes as long as a few steps, needs neither Triton nor a C compiler, and runs
the very kernels of an ordinary step. What a recording cannot see is looked for before it is made: waiting for the
device, and random numbers drawn on the host. The first two batches of a shape are ordinary steps, so nothing is
computed for the recording alone.

Memory: inputs and outputs of a recording stay where they are, and all recordings share one pool for what lies between.
Gradients are added up in buffers that all of them share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from visling.errors import RunError
from visling.train.generators import capture_generators

MOST_SHAPES = 24
"""Shapes that are recorded; batches of others are ordinary steps."""

Parts = Mapping[str, tuple[Tensor, Tensor]]
Run = Callable[[Any], tuple[Tensor, Parts]]
"""Forward and backward of a pair of batch and targets: adds to the gradients, returns the detached loss and its
parts."""


class Recorder(Protocol):
    """How a device records work."""

    def watch(self, work: Callable[[], Any]) -> tuple[Any, str]:
        """Do the work as a recording would have it done; returns its result and what speaks against recording it,
        nothing if it is empty."""
        ...

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record the work without doing it; returns the tensor that will hold its result, and what does it."""
        ...


class CudaRecorder:
    """CUDA graphs, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def watch(self, work: Callable[[], Any]) -> tuple[Any, str]:
        current, before = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self._stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        current.wait_stream(self._stream)
        waits = any("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        return result, "it waits for the device" if waits else ""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # what ordinary steps kept is needed for the pool of the recordings
        # Meanwhile another thread may page-lock batches, which would spoil a recording that watches all threads
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()
        return result, graph.replay


@dataclass(slots=True)
class _Recording:
    """What is known of the batches of one shape."""

    seen: int = 0
    """Ordinary steps made of them."""
    trained: tuple[nn.Parameter, ...] = ()
    """Parameters that receive a gradient."""
    inputs: tuple[Tensor, ...] = ()
    """What a replay reads."""
    names: tuple[str, ...] = ()
    """Of the parts of the loss."""
    numbers: Tensor | None = None
    """What a replay writes: the loss, and sum and count of each part, float64."""
    replay: Callable[[], None] | None = None
    """None = not recorded."""


class RecordedSteps:
    """A `Run` that replays recordings of another one, and is that one where it cannot.

    Args:
        run: the ordinary step.
        parameters: everything that it trains.
        variant: what a step depends on in addition to its batch and the weights, such as the weights of losses: each
            value has recordings of its own.
    """

    def __init__(
        self, run: Run, parameters: Iterable[nn.Parameter], variant: Callable[[], Hashable], recorder: Recorder
    ) -> None:
        self._run, self._variant, self._recorder = run, variant, recorder
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._sums: dict[nn.Parameter, Tensor] = {}
        """Where recordings add up gradients."""
        self._recordings: dict[Hashable, _Recording] = {}
        self._refused = False
        self._note = ""

    def __call__(self, item: Any) -> tuple[Tensor, Parts]:
        """Forward and backward of a batch.

        Raises:
            RunError: a step could not be recorded.
        """
        leaves, structure = pytree.tree_flatten(item)
        recording = self._find(leaves, structure)
        if recording is None:
            return self._run(item)
        recording.seen += 1
        if recording.seen == 1:
            return self._run(item)
        if recording.seen == 2:
            return self._try(item, recording)
        if recording.replay is None:
            self._record(leaves, structure, recording)
        return self._replay(leaves, recording)

    def take_note(self) -> str:
        """What there is to say about what is not recorded, once; else nothing."""
        note, self._note = self._note, ""
        return note

    def _find(self, leaves: list[Any], structure: pytree.TreeSpec) -> _Recording | None:
        """What is known of batches of this shape; None = they are not recorded."""
        key = (self._variant(), structure, tuple(map(_describe, leaves)))
        if self._refused or key in self._recordings:
            return self._recordings.get(key)
        if len(self._recordings) == MOST_SHAPES:
            self._refused = True  # for new shapes
            self._note = f"batches come in more than {MOST_SHAPES} shapes: steps of further ones are not recorded"
            return None
        recording = self._recordings[key] = _Recording()
        return recording

    def _try(self, item: Any, recording: _Recording) -> tuple[Tensor, Parts]:
        """An ordinary step, watched: which parameters it trains, and whether a recording would be the same."""
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        generators = _host_generators()
        watched: tuple[tuple[Tensor, Parts], str] = self._recorder.watch(lambda: self._run(item))
        result, reason = watched
        if generators != _host_generators():
            reason = "it draws random numbers on the host"
        if reason:
            self._refused, self._note = True, f"steps are not recorded as CUDA graphs: {reason}"
            self._recordings.clear()
        recording.trained = tuple(parameter for parameter in self._parameters if parameter.grad is not None)
        for parameter, gradient in zip(self._parameters, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        returned: tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]] = result
        return returned

    def _record(self, leaves: list[Any], structure: pytree.TreeSpec, recording: _Recording) -> None:
        fixed = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        item = pytree.tree_unflatten(fixed, structure)
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        for parameter in recording.trained:
            if parameter not in self._sums:
                self._sums[parameter] = torch.zeros_like(parameter)
            parameter.grad = self._sums[parameter]

        def work() -> Tensor:
            value, parts = self._run(item)
            recording.names = tuple(parts)
            numbers = [value, *(number for part in parts.values() for number in part)]
            return torch.stack([number.detach().to(torch.float64) for number in numbers])

        try:
            recording.numbers, recording.replay = self._recorder.record(work)
        except RuntimeError as error:
            raise RunError(
                f"a step could not be recorded as a CUDA graph: {error}. Take the step operation by operation: --set "
                "train.compile=no."
            ) from error
        finally:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient
        recording.inputs = tuple(leaf for leaf in fixed if isinstance(leaf, Tensor))

    def _replay(self, leaves: list[Any], recording: _Recording) -> tuple[Tensor, Parts]:
        assert recording.replay is not None
        assert recording.numbers is not None
        torch._foreach_copy_(list(recording.inputs), [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        self._point_gradients(recording.trained)
        recording.replay()
        value, *numbers = recording.numbers.clone().unbind()  # the next replay overwrites it
        return value, dict(zip(recording.names, zip(numbers[::2], numbers[1::2], strict=True), strict=True))

    def _point_gradients(self, trained: Iterable[nn.Parameter]) -> None:
        """Let the buffers of the recordings be the gradients, with what was added up before them."""
        empty = []
        for parameter in trained:
            total = self._sums[parameter]
            if parameter.grad is None:
                empty.append(total)
            elif parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total
        if empty:
            torch._foreach_zero_(empty)


def _describe(leaf: Any) -> Hashable:
    """What a recording of a leaf fits: tensors of one shape and type, other values as they are."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _host_generators() -> Mapping[str, Any]:
    """State of the generators that a recording would not draw from again."""
    return {name: state for name, state in capture_generators().items() if name != "cuda"}
