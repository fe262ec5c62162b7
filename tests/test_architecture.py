"""The floors of the house: who may import whom, inside and outside. docs/architecture.md explains the table."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "visling"

CONTRACTS = {"types", "boxes", "config", "errors", "runtime"}
PARTS = {"nn", "checkpoints"}
BELOW_CHOICES = CONTRACTS | PARTS | {"models", "data", "metrics", "vision", "objectives", "tasks", "train"}

MAY_IMPORT: dict[str, set[str]] = {
    # floor 0: contracts; among themselves only as listed
    "types": set(),
    "boxes": {"errors"},
    "config": {"errors"},
    "errors": set(),
    "runtime": {"errors"},
    # floor 1: parts
    "nn": CONTRACTS,
    "checkpoints": CONTRACTS,
    # floor 2: neighbours that do not know each other
    "models": CONTRACTS | PARTS,
    "data": CONTRACTS,
    "metrics": CONTRACTS,
    "vision": CONTRACTS | PARTS,
    # floor 3
    "objectives": CONTRACTS | {"nn"},
    "tasks": CONTRACTS | {"nn", "data", "metrics"},
    # floor 4
    "train": CONTRACTS,
    # floor 5: choices
    "recipes": BELOW_CHOICES,
    "analysis": BELOW_CHOICES,
    # floor 6: doors
    "api": BELOW_CHOICES | {"recipes", "analysis"},
    "cli": BELOW_CHOICES | {"recipes", "analysis", "api", "demo"},
    "demo": BELOW_CHOICES | {"recipes", "analysis", "api"},
    "__main__": {"cli"},
    # The root resolves its public names lazily; nobody inside imports it.
    "__init__": BELOW_CHOICES | {"recipes", "analysis", "api"},
}
"""Part of the package -> other parts that it may import; its own files are always open to it, but see STRANGERS."""

STRANGERS: dict[str, set[str]] = {"models": {"base"}, "tasks": {"base"}, "objectives": {"base"}}
"""Packages whose files are strangers to one another, but for these. `__init__`, the table of contents, may name them all."""

COMPOSED: dict[str, set[str]] = {"models/cvlp.py": {"lxmert"}}
"""File -> neighbours that it is made of: CVLP's networks are LXMERT's. What is not here has blocks in common only, and those live in `nn`."""

CORE = {"torch", "numpy", "visling"}
OUTSIDE: dict[str, tuple[str, ...]] = {
    "safetensors": ("checkpoints/", "vision/detector.py", "train/state.py", "recipes/", "api.py"),
    "tokenizers": ("data/text.py",),
    "huggingface_hub": ("checkpoints/hub.py",),
    "PIL": ("data/", "vision/", "tasks/", "analysis/", "recipes/", "api.py", "cli.py", "demo/"),
    "rich": ("cli.py", "train/log.py", "recipes/"),
    "typer": ("cli.py",),
    "lmdb": ("data/formats/lmdb.py",),
    "h5py": ("data/formats/archive.py",),
    "matplotlib": ("analysis/plots.py",),
    "tensorboard": ("train/log.py",),
    "fastapi": ("demo/",),
    "starlette": ("demo/",),
    "uvicorn": ("demo/", "cli.py"),
}
"""Third-party package -> files or folders that may import it; `CORE` and the standard library are free, anything else is banned."""

INSIDE_FUNCTIONS: dict[str, tuple[str, ...]] = {"transformers": ("checkpoints/", "models/")}
"""Optional packages that may only be imported inside a function, by an export."""


def imports(tree: ast.AST, package: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, inside a function) of every import; `from visling import boxes` is one of `visling.boxes` if that is a module."""
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write it in full"
            module = node.module or ""
            for name in node.names:
                inside = package.joinpath(*module.split(".")[1:], name.name)
                is_module = module.split(".")[0] == "visling" and (inside.is_dir() or inside.with_suffix(".py").exists())
                yield f"{module}.{name.name}" if is_module else module, id(node) in inner


def violations(package: Path) -> list[str]:
    """Every import of a package tree that the tables forbid, as `file: reason`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        part = file.partition("/")[0].removesuffix(".py")
        for module, in_function in imports(ast.parse(path.read_text(encoding="utf-8"), filename=file), package):
            top, _, rest = module.partition(".")
            if top == "visling":
                reason = _inside(part, file, rest)
            else:
                reason = _outside(file, top, in_function)
            if reason:
                found.append(f"{file}: {reason}")
    return list(dict.fromkeys(found))


def _inside(part: str, file: str, target: str) -> str:
    """Why a file may not import `visling.<target>`; empty if it may."""
    if not target:
        return "imports the package root"
    other, _, below = target.partition(".")
    if part not in MAY_IMPORT:
        return f"{part} has no floor: give it one in MAY_IMPORT and in docs/architecture.md"
    if other != part:
        return "" if other in MAY_IMPORT[part] else f"{part} may not import {other}"
    name = file.removesuffix(".py").partition("/")[2]
    known = STRANGERS.get(part, set()) | COMPOSED.get(file, set()) | {name.partition("/")[0]}
    if part in STRANGERS and name != "__init__" and below.partition(".")[0] not in known:
        return f"{file} may not import its neighbour {target}"
    return ""


def _outside(file: str, top: str, in_function: bool) -> str:
    if top in sys.stdlib_module_names or top in CORE:
        return ""
    if top in INSIDE_FUNCTIONS:
        allowed = in_function and file.startswith(INSIDE_FUNCTIONS[top])
        return "" if allowed else f"{top} is optional: import it inside the exporting function, in {' or '.join(INSIDE_FUNCTIONS[top])}"
    if top not in OUTSIDE:
        return f"{top} is not among the packages that visling uses"
    return "" if file.startswith(OUTSIDE[top]) else f"only {', '.join(OUTSIDE[top])} may import {top}"


def test_the_house_stands() -> None:
    assert len(list(ROOT.rglob("*.py"))) > 15, "the walk found no package"
    found = violations(ROOT)
    assert not found, "imports that the floors forbid:\n" + "\n".join(found)


def test_every_part_has_a_floor() -> None:
    parts = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts <= MAY_IMPORT.keys(), f"no floor: {sorted(parts - MAY_IMPORT.keys())}"


def test_the_page_shows_every_module() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown: dict[str, set[str]] = {}
    part = ""
    for line in page.partition("```\nvisling/\n")[2].partition("```")[0].splitlines():
        begun = re.match(r"  (\w+)/ ", line)
        part = begun[1] if begun else part if line.startswith("    ") else ""
        shown.setdefault(part, set()).update(re.findall(r"\w+", line))
    files = [file.relative_to(ROOT) for file in ROOT.rglob("*.py") if file.stem != "__init__" and file.parent.name != "scenes"]
    missing = [str(file) for file in files if file.stem not in shown.get(file.parts[0] if len(file.parts) > 1 else "", ())]
    assert not missing, f"the tree in docs/architecture.md does not show {', '.join(missing)}"


def test_composed_files_exist_and_are_made_of_what_the_table_says() -> None:
    for file, parts in COMPOSED.items():
        package = file.partition("/")[0]
        imported = {module for module, _ in imports(ast.parse((ROOT / file).read_text(encoding="utf-8")), ROOT)}
        neighbours = {module.split(".")[2] for module in imported if module.startswith(f"visling.{package}.")} - STRANGERS[package]
        assert neighbours == parts
        assert not parts & {Path(other).stem for other in COMPOSED}, "a composition of compositions"


def test_the_table_has_no_circle() -> None:
    """The house can be built from the ground up: there is always a part whose needs are met."""
    left = dict(MAY_IMPORT)
    while left:
        ground = [part for part, below in left.items() if not below & left.keys()]
        assert ground, f"a circle among {sorted(left)}"
        for part in ground:
            del left[part]


PLANTED = [
    ("nn/attention.py", "from visling.models import base", "nn may not import models"),
    ("nn/attention.py", "import visling.checkpoints.keymap", "nn may not import checkpoints"),
    ("types.py", "from visling import boxes", "types may not import boxes"),
    ("data/loader.py", "def f():\n    from visling.models import build", "data may not import models"),
    ("data/store.py", "from visling.metrics.answers import clean", "data may not import metrics"),
    ("vision/detector.py", "from visling.data.store import StoreWriter", "vision may not import data"),
    ("metrics/answers.py", "from visling import nn", "metrics may not import nn"),
    ("objectives/matching.py", "from visling.tasks.base import Task", "objectives may not import tasks"),
    ("tasks/vqa.py", "from visling.models.visualbert import VisualBERT", "tasks may not import models"),
    ("train/engine.py", "from visling.recipes import finetuning", "train may not import recipes"),
    ("recipes/finetuning.py", "from visling.analysis.report import write_report", "recipes may not import analysis"),
    ("analysis/report.py", "from visling.recipes import finetuning", "analysis may not import recipes"),
    ("api.py", "if TYPE_CHECKING:\n    from visling.cli import app", "api may not import cli"),
    ("models/lxmert.py", "from visling.models.visualbert import Config", "neighbour"),
    ("models/lxmert.py", "from visling.models import build", "neighbour"),
    ("models/lxmert.py", "from visling.models.cvlp import Cvlp", "neighbour"),
    ("models/cvlp.py", "from visling.models import visualbert", "neighbour"),
    ("tasks/gqa.py", "from visling.tasks import vqa", "neighbour"),
    ("objectives/matching.py", "from visling.objectives.masked_lm import MaskedLM", "neighbour"),
    ("cli.py", "import visling", "package root"),
    ("train/state.py", "from visling import __version__", "package root"),
    ("vision/ops.py", "import torchvision.ops", "torchvision is not among"),
    ("data/store.py", "import h5py", "only data/formats/archive.py may import h5py"),
    ("recipes/pretraining.py", "import typer", "only cli.py may import typer"),
    ("analysis/drawing.py", "import matplotlib.pyplot as plt", "only analysis/plots.py may import matplotlib"),
    ("models/visualbert.py", "import transformers", "inside the exporting function"),
    ("tasks/vqa.py", "def f():\n    import transformers", "inside the exporting function"),
    ("data/loader.py", "from rich.progress import track", "may import rich"),
    ("extra.py", "from visling.types import Batch", "extra has no floor"),
]

ALLOWED = [
    ("models/__init__.py", "from visling.models import lxmert, visualbert"),
    ("models/cvlp.py", "from visling.models.base import Encoder"),
    ("models/cvlp.py", "from visling.models import lxmert\nfrom visling.models.lxmert import Lxmert"),
    ("models/visualbert.py", "def export():\n    import transformers"),
    ("data/formats/h5.py", "from visling.data.formats import tsv\nfrom visling import boxes, errors"),
    ("data/formats/lmdb.py", "def f():\n    import lmdb"),
    ("cli.py", "from visling.demo import app\nimport typer"),
    ("boxes.py", "from __future__ import annotations\nimport torch\nfrom visling.errors import BoxError"),
]


def plant(root: Path, file: str, code: str) -> Path:
    for name in (
        "models/base.py",
        "models/lxmert.py",
        "models/visualbert.py",
        "tasks/vqa.py",
        "data/formats/tsv.py",
        "nn/x.py",
        "boxes.py",
        "errors.py",
        file,
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (root / file).write_text(code)
    return root


@pytest.mark.parametrize(("file", "code", "reason"), PLANTED)
def test_a_planted_import_is_caught(tmp_path: Path, file: str, code: str, reason: str) -> None:
    found = violations(plant(tmp_path, file, code))
    assert len(found) == 1, found
    assert found[0].startswith(f"{file}: ")
    assert reason in found[0]


@pytest.mark.parametrize(("file", "code"), ALLOWED)
def test_a_permitted_import_passes(tmp_path: Path, file: str, code: str) -> None:
    assert violations(plant(tmp_path, file, code)) == []
