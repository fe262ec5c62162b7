"""visling doctor: what this machine offers."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from typing import Any

from visling.cli.options import Json
from visling.cli.printing import show


def doctor(json_: Json = False) -> None:
    """Show versions, threads, devices, the rate of matrix products, optional extras, the data folder and free space.

    Example: visling doctor
    """
    import torch

    from visling import runtime
    from visling.train.rate import measure_rate

    device = runtime.pick_device()
    precision = runtime.resolve("auto", device)
    home = runtime.home()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    extras = {
        "log": "tensorboard",
        "wandb": "wandb",
        "trackio": "trackio",
        "hf": "transformers",
        "formats": "lmdb",
        "serve": "fastapi",
    }
    facts: dict[str, Any] = {
        "visling": metadata.version("visling"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16 matrix units (AMX)": torch.cpu._is_amx_tile_supported(),
        f"matrix products in {precision}, TFLOP/s": float(f"{measure_rate(device, precision) / 1e12:.3g}"),
        "data folder (VISLING_HOME)": str(home),
        "free space there, GB": round(shutil.disk_usage(existing).free / 1e9, 1),
        **{f"extra {extra}": _find_version(package) for extra, package in extras.items()},
    }
    show(facts, json_)


def _find_version(package: str) -> str | None:
    """Installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
