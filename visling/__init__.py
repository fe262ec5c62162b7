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
    "Encoding",
    "Example",
    "Loss",
    "ModelFolder",
    "NativeStore",
    "Objective",
    "Predictor",
    "Question",
    "Record",
    "Regions",
    "StoreWriter",
    "Targets",
    "Task",
    "Text",
    "TextLayout",
    "Tokenizer",
    "VislingError",
    "__version__",
    "api",
    "boxes",
    "build",
    "config",
    "from_pretrained",
    "load",
    "models",
    "types",
]

if TYPE_CHECKING:
    from visling import api, boxes, config, models, types
    from visling.analysis.answer import Answer
    from visling.analysis.encoding import Encoding
    from visling.analysis.question import Question
    from visling.api import Predictor, from_pretrained, load
    from visling.data.text import TextLayout, Tokenizer
    from visling.errors import VislingError
    from visling.models import build
    from visling.objectives.base import Objective
    from visling.pretrained.folder import ModelFolder
    from visling.regions.store import NativeStore
    from visling.regions.writer import StoreWriter
    from visling.tasks.base import Task
    from visling.types import Batch, Encoded, Example, Loss, Record, Regions, Targets, Text

_MODULES = ("api", "boxes", "config", "models", "types")
_NAMES = {
    "Answer": "visling.analysis.answer",
    "Encoding": "visling.analysis.encoding",
    "Predictor": "visling.api",
    "Question": "visling.analysis.question",
    "from_pretrained": "visling.api",
    "load": "visling.api",
    "TextLayout": "visling.data.text",
    "Tokenizer": "visling.data.text",
    "VislingError": "visling.errors",
    "build": "visling.models",
    "Objective": "visling.objectives.base",
    "ModelFolder": "visling.pretrained.folder",
    "NativeStore": "visling.regions.store",
    "StoreWriter": "visling.regions.writer",
    "Task": "visling.tasks.base",
    "Batch": "visling.types",
    "Encoded": "visling.types",
    "Example": "visling.types",
    "Loss": "visling.types",
    "Record": "visling.types",
    "Regions": "visling.types",
    "Targets": "visling.types",
    "Text": "visling.types",
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
