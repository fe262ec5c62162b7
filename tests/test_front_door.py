"""`import visling`: instant, without torch, and every public name is what its module defines."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import visling


def run(program: str) -> str:
    """Output of a program in an interpreter of its own."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_import_loads_nothing_else() -> None:
    loaded = run(
        "import sys, visling\n"
        "assert 'load' in dir(visling) and visling.__version__\n"
        "print([name for name in sys.modules if name.startswith(('torch', 'numpy', 'visling.'))])"
    )
    assert loaded.strip() == "[]"


def test_names_are_loaded_on_first_use() -> None:
    assert run("import visling; print(visling.models.names())").startswith("('visualbert'")
    assert run("from visling import Batch; import visling.types; print(Batch is visling.types.Batch)") == "True\n"
    star = run("from visling import *; print(load.__module__, build.__module__, models.__name__, Encoded.__module__)")
    assert star == "visling.api visling.models visling.models visling.types\n"


@pytest.mark.parametrize("name", visling.__all__)
def test_every_public_name_is_defined_where_the_table_says(name: str) -> None:
    value = getattr(visling, name)
    if name in visling._NAMES:
        assert value is getattr(importlib.import_module(visling._NAMES[name]), name)
        assert value.__module__ == visling._NAMES[name], "the table names the module that defines it"
    elif name != "__version__":
        assert value is importlib.import_module(f"visling.{name}")
    assert name in dir(visling)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(visling.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.name: node.module for alias in node.names}
    assert seen == visling._NAMES | dict.fromkeys(visling._MODULES, "visling")
    assert {*seen, "__version__"} == set(visling.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        visling.laod  # noqa: B018
    assert not hasattr(visling, "torch")
