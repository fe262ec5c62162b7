"""Where the time of a pre-training step goes, and how close each part is to what the machine can do.

    python benchmarks/roofline.py --out benchmarks/results
    python benchmarks/roofline.py --out benchmarks/results --models lxmert --precision bf16

Every operation of a step (forward, loss, backward, AdamW) is timed by itself, on a CPU, where operations run one after
the other. An operation can be no faster than its multiplications and additions at the rate of a plain product (2048 x
2048) allow, nor than its inputs and outputs at the rate of a plain copy: the later of the two is its roof. Inputs and
outputs that are still in the cache beat it.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from measuring import (
    Rate,
    Trained,
    add_options,
    begin,
    circumstances,
    finish,
    load_averages,
    stem_of,
    write_result,
)
from sides import RECIPES, Pretraining, pretraining_config
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from visling import runtime
from visling.runs.count_products import MatrixProducts

COPIED = 2**26
"""Numbers of the plain copy."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "products of states and weights": ("mm", "addmm", "linear"),
    "products of attention": ("bmm", "baddbmm"),
    "softmax": ("_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data"),
    "GELU": ("gelu", "gelu_backward"),
    "norms": ("native_layer_norm", "native_layer_norm_backward"),
    "random numbers": ("random_", "ge", "bernoulli_", "native_dropout", "native_dropout_backward"),
    "look-ups": ("embedding", "embedding_dense_backward", "index_select", "index_add_", "index_put_", "index"),
    "optimiser": ("_fused_adamw_",),
}
"""Kind -> operations; all others are "sums, copies and the rest"."""
REST = "sums, copies and the rest"


class Timed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up seconds, operations of products and bytes of all that is called within it, by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        self._kinds = {operation: kind for kind, operations in KINDS.items() for operation in operations}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with MatrixProducts() as products:
            start = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            seconds = time.perf_counter() - start
        if not func.is_view:
            kind = self._kinds.get(func.overloadpacket.__name__, REST)
            self.seconds[kind] += seconds
            self.flops[kind] += products.flops
            self.bytes[kind] += sum(
                leaf.numel() * leaf.element_size()
                for leaf in pytree.tree_leaves((args, kwargs, result))
                if isinstance(leaf, Tensor)
            )
            self.calls[kind] += 1
        return result


def copy_rate() -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    target.copy_(source)
    start = time.perf_counter()
    for _ in range(3):
        target.copy_(source)
    return 3 * 2 * source.numel() * source.element_size() / (time.perf_counter() - start)


def measure(model: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One family."""
    ours = Pretraining(pretraining_config(model, options), device)
    trained = Trained(ours, device, options.precision)
    ours.module.train()
    batches = ours.draw(options.batch_size, options.warmup + options.pairs, device)
    for batch in batches[: options.warmup]:
        trained.update(batch)
    timed = Timed()
    with Rate(device, options.precision, options.product_size) as rate:
        bandwidth = copy_rate()
        start = time.perf_counter()
        with timed:
            for batch in batches[options.warmup :]:
                trained.update(batch)
        whole = time.perf_counter() - start
    kinds = {}
    for kind in (*KINDS, REST):
        roof = max(timed.flops[kind] / rate.mean, timed.bytes[kind] / bandwidth)
        kinds[kind] = {
            "seconds": timed.seconds[kind] / options.pairs,
            "share": timed.seconds[kind] / sum(timed.seconds.values()),
            "gflop": timed.flops[kind] / options.pairs / 1e9,
            "gigabytes": timed.bytes[kind] / options.pairs / 1e9,
            "calls": timed.calls[kind] / options.pairs,
            "of_roof": roof / timed.seconds[kind] if timed.seconds[kind] else None,
        }
    print(f"{model}: {sum(timed.seconds.values()) / options.pairs:.2f} s a step in operations", flush=True)
    return {
        "model": model,
        "kinds": kinds,
        "outside_operations": (whole - sum(timed.seconds.values())) / options.pairs,
        "product_tflops": rate.described(),
        "copy_gigabytes_per_second": bandwidth / 1e9,
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    lines = [
        f"# Where the time of a pre-training step goes, {result['date']}",
        "",
        "A step: forward, loss, backward and AdamW update. Of roof: the least time that products at the machine's "
        "rate, or inputs and outputs at the rate of a plain copy, would take, over the time it took; above 1 where "
        "they came from the cache.",
        "",
    ]
    for one in result["models"]:
        rate = one["product_tflops"]
        lines += [
            f"## {one['model']}",
            "",
            f"Plain products at {rate['before']:.3f} TFLOP/s before and {rate['after']:.3f} after, a plain copy at "
            f"{one['copy_gigabytes_per_second']:.1f} GB/s.",
            "",
            "| | seconds | share | GFLOP | GB | calls | of roof |",
            "|---|---|---|---|---|---|---|",
        ]
        for kind, found in one["kinds"].items():
            of_roof = "" if found["of_roof"] is None else f"{found['of_roof']:.2f}"
            lines.append(
                f"| {kind} | {found['seconds']:.3f} | {found['share']:.1%} | {found['gflop']:,.0f} | "
                f"{found['gigabytes']:.1f} | {found['calls']:,.0f} | {of_roof} |"
            )
        lines += [
            "",
            f"Outside operations (Python, and the measurement itself): {one['outside_operations']:.3f} s.",
            "",
        ]
    return "\n".join([*lines, *circumstances(result)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time every operation of a pre-training step, by kind.")
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=["lxmert", "visualbert"], help="families")
    add_options(parser, pairs=2)
    options = parser.parse_args(arguments)
    device, load_before = begin(options), load_averages()
    if device.type != "cpu":
        raise SystemExit("operations of a GPU do not run one after the other: use --device cpu, or benchmarks/gpu.py.")
    runtime.keep_freed_memory()
    found = [measure(model, options, device) for model in options.models]
    result = finish("roofline", options, device, load_before, models=found)
    print(
        write_result(
            options.out, stem_of("roofline", options, device, "+".join(options.models)), result, as_markdown(result)
        )
    )


if __name__ == "__main__":
    main()
