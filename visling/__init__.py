"""visling: region-based vision-and-language Transformers, exact, fast and readable.

import visling

model = visling.load("demo/small/visualbert/vqa")     # ask a trained model about an image
encoder = visling.models.build_tiny("lxmert")         # or take a model apart
encoded = encoder(visling.Batch(text=..., regions=...))

Every name of `__all__` is imported when it is first used (PEP 562), so `import visling` is instant and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Batch",
    "Encoded",
    "Example",
    "Loss",
    "ModelFolder",
    "Predictor",
    "Record",
    "Regions",
    "Targets",
    "Text",
    "VislingError",
    "__version__",
    "api",
    "boxes",
    "build",
    "config",
    "from_pretrained",
    "load",
    "models",
    "objectives",
    "tasks",
    "types",
]

if TYPE_CHECKING:
    from visling import api, boxes, config, models, objectives, tasks, types
    from visling.api import Answer, Predictor, from_pretrained, load
    from visling.errors import VislingError
    from visling.models import build
    from visling.pretrained.folder import ModelFolder
    from visling.types import Batch, Encoded, Example, Loss, Record, Regions, Targets, Text

_MODULES = ("api", "boxes", "config", "models", "objectives", "tasks", "types")
_NAMES = {
    **dict.fromkeys(("Answer", "Predictor", "from_pretrained", "load"), "visling.api"),
    **dict.fromkeys(("VislingError",), "visling.errors"),
    **dict.fromkeys(("build",), "visling.models"),
    **dict.fromkeys(("ModelFolder",), "visling.pretrained.folder"),
    **dict.fromkeys(("Batch", "Encoded", "Example", "Loss", "Record", "Regions", "Targets", "Text"), "visling.types"),
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"visling.{name}")
    if name in _NAMES:
        value = globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
        return value
    raise AttributeError(f"module 'visling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
