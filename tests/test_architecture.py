"""The floors of the house: who may import whom, inside and outside. docs/architecture.md explains the table."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "visling"

CONTRACTS = {
    "types", "head", "boxes", "config", "errors", "runtime", "image_ids", "pickles", "names", "feature_kinds",
    "draws", "members", "shards", "checked_weights", "damage", "pickle_length",
}  # fmt: skip
BLOCKS = {"checkpoints", "regions", "nn", "vision", "metrics", "scenes", "data", "train"}
BELOW_MODEL_FOLDERS = CONTRACTS | BLOCKS | {"models", "objectives", "tasks"}
BELOW_RUNS = BELOW_MODEL_FOLDERS | {"pretrained", "recipes"}

MAY_IMPORT: dict[str, set[str]] = {
    # floor 0: contracts; among themselves only as listed
    "types": {"head"},
    "head": set(),
    "boxes": {"errors"},
    "config": {"errors"},
    "errors": set(),
    "runtime": {"errors", "members"},
    "members": {"errors"},
    "image_ids": set(),
    "pickles": {"errors", "damage", "pickle_length"},
    "damage": set(),
    "pickle_length": set(),
    "checked_weights": {"errors"},
    "names": {"errors"},
    "feature_kinds": set(),
    "draws": set(),
    "shards": set(),
    # floor 1: blocks; neighbours only as listed
    "checkpoints": CONTRACTS,
    "regions": CONTRACTS,
    "nn": CONTRACTS,
    "vision": CONTRACTS | {"checkpoints"},
    "metrics": CONTRACTS,
    "scenes": CONTRACTS,
    "data": CONTRACTS | {"regions"},
    "train": CONTRACTS | {"nn"},
    # floor 2
    "models": CONTRACTS | {"nn", "checkpoints"},
    "objectives": CONTRACTS | {"nn"},
    # floor 3
    "tasks": CONTRACTS | {"nn", "data", "metrics"},
    # floor 4: models on disk
    "pretrained": BELOW_MODEL_FOLDERS - {"scenes"},
    # floor 5: choices, which know no machinery
    "recipes": BELOW_MODEL_FOLDERS - {"scenes"},
    # floor 6: what carries them out, and what looks at the result
    "runs": BELOW_RUNS,
    "analysis": BELOW_MODEL_FOLDERS | {"pretrained"},
    # floor 7: doors
    "api": BELOW_RUNS | {"runs", "analysis"},
    "serve": BELOW_RUNS | {"runs", "analysis", "api"},
    "cli": BELOW_RUNS | {"runs", "analysis", "api", "serve"},
    "__main__": {"cli"},
    # The root resolves its public names lazily; nobody inside imports it.
    "__init__": BELOW_RUNS | {"runs", "analysis", "api"},
}
"""Part of the package -> other parts that it may import; its own files are always open to it, but see STRANGERS and
ORDER."""

ORDER: dict[str, tuple[str, ...]] = {
    "pretrained": (
        "card", "description", "folder", "features", "answers", "several", "fetch", "recognise", "convert", "ready",
        "export", "verify",
    ),
    "recipes": (
        "configs", "multitask_configs", "claim_configs", "claim_trainings", "changes", "detectors", "scenes",
        "visualbert", "vlbert_tasks", "vlbert",
        "vilbert_tasks", "vilbert", "vilbert_baseline", "lxmert", "cvlp", "own", "nlvr", "multitask", "releases",
        "tables", "single_stream_claims", "two_stream_claims", "claims", "listing",
    ),
    "runs": (
        "configure", "layer_products", "needed_products",
        "inputs", "spelling", "setup", "own_files", "extraction", "own_regions", "pictures",
        "detection_data", "detect", "question_scores", "objectives", "validate", "pretrain", "retrieve", "examples",
        "untrained", "evaluate",
        "finetune", "multitask",
        "count_products", "typical_batch", "typical_task", "estimate", "verdicts", "jobs", "compare", "demo",
        "worlds", "claim_measures", "claim_runs", "reproduce",
    ),
}  # fmt: skip
"""Packages whose files stand in a row: each may import those before it, none after it."""

STRANGERS: dict[str, set[str]] = {
    "models": {"base"},
    "tasks": {"base", "answers"},
    "objectives": {"base"},
}
"""Packages whose files are strangers to one another, but for these. `__init__`, the table of contents, may name them
all."""

COMPOSED: dict[str, set[str]] = {"models/cvlp.py": {"lxmert"}, "models/vilbert_baseline.py": {"vilbert"}}
"""File -> neighbours that it is made of: CVLP's networks are LXMERT's, and ViLBERT's baseline learns its tasks in its
settings and under its names. What is not here has blocks in common only, and
those live in `nn`."""

CORE = {"torch", "numpy", "visling"}
OUTSIDE: dict[str, tuple[str, ...]] = {
    "safetensors": ("checked_weights.py", "checkpoints/", "vision/", "train/", "pretrained/"),
    "tokenizers": ("data/text.py",),
    "huggingface_hub": ("checkpoints/hub.py",),
    "PIL": ("scenes/", "data/batches/pixels.py", "vision/", "analysis/", "runs/", "api.py", "serve/", "cli/"),
    "rich": ("cli/", "train/log.py", "runs/"),
    "typer": ("cli/",),
    "msgpack": ("regions/formats/tensorpack.py",),
    "h5py": ("regions/formats/hdf5.py",),
    "yaml": ("vision/",),
    "matplotlib": ("analysis/plots.py",),
    "fastapi": ("serve/",),
    "starlette": ("serve/",),
    "pydantic": ("serve/",),
    "uvicorn": ("serve/",),
}
"""Third-party package -> files or folders that may import it; `CORE` and the standard library are free, anything else
is banned."""

INSIDE_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "transformers": ("checkpoints/", "models/", "vision/"),
    "wandb": ("train/loggers.py",),
    "trackio": ("train/loggers.py",),
}
"""Optional packages that may only be imported inside a function, by what offers them."""


def imports(tree: ast.AST, package: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, inside a function) of every import; `from visling import boxes` is one of `visling.boxes` if that
    is a module."""
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write it in full"
            module = node.module or ""
            for name in node.names:
                inside = package.joinpath(*module.split(".")[1:], name.name)
                is_module = module.split(".")[0] == "visling" and (
                    inside.is_dir() or inside.with_suffix(".py").exists()
                )
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
    neighbour = below.partition(".")[0]
    if part in ORDER and name != "__init__" and neighbour:
        row = ORDER[part]
        if missing := [n for n in (name, neighbour) if n not in row]:
            return f"{part}/{missing[0]} has no place in ORDER"
        if row.index(neighbour) > row.index(name):
            return f"{file} may not import {target}, which comes after it"
    known = STRANGERS.get(part, set()) | COMPOSED.get(file, set()) | {name.partition("/")[0]}
    if part in STRANGERS and name != "__init__" and neighbour not in known:
        return f"{file} may not import its neighbour {target}"
    return ""


def _outside(file: str, top: str, in_function: bool) -> str:
    if top in sys.stdlib_module_names or top in CORE:
        return ""
    if top in INSIDE_FUNCTIONS:
        allowed = in_function and file.startswith(INSIDE_FUNCTIONS[top])
        return (
            ""
            if allowed
            else f"{top} is optional: import it inside a function, in {' or '.join(INSIDE_FUNCTIONS[top])}"
        )
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
    files = [
        file.relative_to(ROOT)
        for file in ROOT.rglob("*.py")
        if file.stem != "__init__" and file.parent.name != "scenes"
    ]
    missing = [
        str(file) for file in files if file.stem not in shown.get(file.parts[0] if len(file.parts) > 1 else "", ())
    ]
    assert not missing, f"the tree in docs/architecture.md does not show {', '.join(missing)}"


def test_composed_files_exist_and_are_made_of_what_the_table_says() -> None:
    for file, parts in COMPOSED.items():
        package = file.partition("/")[0]
        imported = {module for module, _ in imports(ast.parse((ROOT / file).read_text(encoding="utf-8")), ROOT)}
        neighbours = {
            module.split(".")[2] for module in imported if module.startswith(f"visling.{package}.")
        } - STRANGERS[package]
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


MOST_LINES = 500
REASON = "One file although it is long: "
"""How the docstring of a longer file begins the paragraph that says why it is one thing."""


def long_files(package: Path) -> list[str]:
    """Files of a package tree that are too long and do not say why."""
    found = []
    for path in sorted(package.rglob("*.py")):
        code = path.read_text(encoding="utf-8")
        lines = len(code.splitlines())
        if lines > MOST_LINES and f"\n\n{REASON}" not in (ast.get_docstring(ast.parse(code)) or ""):
            found.append(f"{path.relative_to(package).as_posix()} has {lines} lines")
    return found


def test_long_files_say_why_they_are_one_thing() -> None:
    found = long_files(ROOT)
    assert not found, (
        f"cut these at a natural joint, or say why not in a paragraph of the docstring that begins {REASON!r}: "
        + ", ".join(found)
    )


def test_a_long_file_without_a_reason_is_caught(tmp_path: Path) -> None:
    body = "x = 1\n"
    (tmp_path / "short.py").write_text(body * MOST_LINES)
    assert long_files(tmp_path) == []
    (tmp_path / "silent.py").write_text(body * (MOST_LINES + 1))
    (tmp_path / "hidden.py").write_text(f'"""A file."""\n# {REASON}a comment.\n' + body * MOST_LINES)
    (tmp_path / "open.py").write_text(f'"""A file.\n\n{REASON}because.\n"""\n' + body * MOST_LINES)
    assert long_files(tmp_path) == ["hidden.py has 502 lines", "silent.py has 501 lines"]


PLANTED = [
    ("nn/attention.py", "from visling.models import base", "nn may not import models"),
    ("nn/attention.py", "import visling.checkpoints.keymap", "nn may not import checkpoints"),
    ("types.py", "from visling import boxes", "types may not import boxes"),
    ("data/batches/loader.py", "def f():\n    from visling.models import build", "data may not import models"),
    ("data/text.py", "from visling.metrics.answers import clean", "data may not import metrics"),
    ("vision/detector.py", "from visling.data.text import Tokenizer", "vision may not import data"),
    ("metrics/answers.py", "from visling import nn", "metrics may not import nn"),
    ("objectives/matching.py", "from visling.tasks.base import Task", "objectives may not import tasks"),
    ("tasks/vqa.py", "from visling.models.visualbert import VisualBERT", "tasks may not import models"),
    ("train/engine.py", "from visling.runs import finetune", "train may not import runs"),
    ("runs/finetune.py", "from visling.analysis.report import write_report", "runs may not import analysis"),
    ("recipes/lxmert.py", "from visling.pretrained.folder import ModelFolder", "recipes may not import pretrained"),
    ("recipes/configs.py", "from visling.runs import setup", "recipes may not import runs"),
    ("recipes/configs.py", "from visling.recipes.lxmert import lxmert_paper", "which comes after it"),
    ("runs/setup.py", "from visling.runs.pretrain import pretrain", "which comes after it"),
    ("runs/extra.py", "from visling.runs import setup", "runs/extra has no place in ORDER"),
    ("pretrained/folder.py", "from visling.recipes import configs", "pretrained may not import recipes"),
    ("regions/store.py", "from visling.data.text import Tokenizer", "regions may not import data"),
    ("analysis/report.py", "from visling.runs import finetune", "analysis may not import runs"),
    ("api.py", "if TYPE_CHECKING:\n    from visling.cli import app", "api may not import cli"),
    ("models/lxmert.py", "from visling.models.visualbert import Config", "neighbour"),
    ("models/lxmert.py", "from visling.models import build", "neighbour"),
    ("models/lxmert.py", "from visling.models.cvlp import Cvlp", "neighbour"),
    ("models/cvlp.py", "from visling.models import visualbert", "neighbour"),
    ("tasks/gqa.py", "from visling.tasks import vqa", "neighbour"),
    ("objectives/matching.py", "from visling.objectives.masked_lm import MaskedLM", "neighbour"),
    ("cli/app.py", "import visling", "package root"),
    ("train/state.py", "from visling import __version__", "package root"),
    ("vision/ops.py", "import torchvision.ops", "torchvision is not among"),
    ("regions/store.py", "import h5py", "only regions/formats/hdf5.py may import h5py"),
    ("runs/pretrain.py", "import typer", "only cli/ may import typer"),
    ("analysis/drawing.py", "import matplotlib.pyplot as plt", "only analysis/plots.py may import matplotlib"),
    ("models/visualbert.py", "import transformers", "inside a function"),
    ("tasks/vqa.py", "def f():\n    import transformers", "inside a function"),
    ("data/loader.py", "from rich.progress import track", "may import rich"),
    ("extra.py", "from visling.types import Batch", "extra has no floor"),
]

ALLOWED = [
    ("models/__init__.py", "from visling.models import lxmert, visualbert"),
    ("models/cvlp.py", "from visling.models.base import Encoder"),
    ("models/cvlp.py", "from visling.models import lxmert\nfrom visling.models.lxmert import Lxmert"),
    ("models/visualbert.py", "def export():\n    import transformers"),
    ("regions/formats/hdf5.py", "from visling.regions.formats import tsv\nfrom visling import boxes, errors"),
    ("cli/app.py", "from visling.api import load\nimport typer"),
    ("runs/finetune.py", "from visling.runs.setup import open_run\nfrom visling.recipes.configs import FinetuneConfig"),
    ("recipes/tables.py", "from visling.recipes import lxmert, scenes"),
    ("boxes.py", "from __future__ import annotations\nimport torch\nfrom visling.errors import BoxError"),
]


def plant(root: Path, file: str, code: str) -> Path:
    for name in (
        "models/base.py",
        "models/lxmert.py",
        "models/visualbert.py",
        "tasks/vqa.py",
        "regions/formats/tsv.py",
        "recipes/lxmert.py",
        "recipes/scenes.py",
        "runs/finetune.py",
        "runs/setup.py",
        "nn/x.py",
        "boxes.py",
        "errors.py",
        "api.py",
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
