"""Names of all recipes with what each trains, read from the source of their files: importing them would import torch,
which takes seconds, and a list needs none of it.

The tables may be written as they are in `recipes/tables.py` and the files it joins: a dictionary of functions, of other
tables (`**lxmert.SCENES`), or of one function for every family (`for model in models.names()`). A test compares the
list with the tables.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from visling import models


def list_recipes() -> dict[str, dict[str, str]]:
    """pretrain, finetune, multitask -> name of a recipe -> first paragraph of its docstring, in one line."""
    return {
        "pretrain": dict(_read_table("tables", "PRETRAINING")),
        "finetune": dict(_read_table("tables", "FINETUNING")),
        "multitask": dict(_read_table("tables", "MULTITASK")),
    }


def list_published() -> dict[str, set[str]]:
    """pretrain, finetune, multitask -> names of the recipes of papers and releases."""
    return {
        "pretrain": {name for name, _ in _read_table("tables", "PUBLISHED_PRETRAINING")},
        "finetune": {name for name, _ in _read_table("tables", "PUBLISHED_FINETUNING")},
        "multitask": {name for name, _ in _read_table("multitask", "PUBLISHED")},
    }


def join_families(recipes: Mapping[str, str]) -> dict[str, str]:
    """Recipes with those that every family has, described in the same words, in one row: FAMILY-vqa-scenes."""
    joined: dict[str, str] = {}
    for name, about in recipes.items():
        family, _, rest = name.partition("-")
        alike = all(recipes.get(f"{other}-{rest}") == about for other in models.names())
        joined.setdefault(f"FAMILY-{rest}" if family in models.names() and alike else name, about)
    return joined


def _read_table(module: str, name: str) -> Iterator[tuple[str, str]]:
    for node in _parse(module).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value is not None:
            yield from _read_rows(module, node.value)


def _read_rows(module: str, table: ast.expr) -> Iterator[tuple[str, str]]:
    """Name and description of each entry of a table, as its expression in a file of this package says."""
    match table:
        case ast.Name(id=name):
            yield from _read_table(module, name)
        case ast.Attribute(value=ast.Name(id=other), attr=name):
            yield from _read_table(other, name)
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if key is None:
                    yield from _read_rows(module, value)
                else:
                    yield str(ast.literal_eval(key)), _describe(module, value)
        case ast.DictComp(key=ast.JoinedStr(values=parts) as key, value=value):  # of every model, and of every task
            titles = _read_titles(module) if "{task}" in ast.unparse(key) else {"": "A task"}
            for model, (task, title) in itertools.product(models.names(), titles.items()):
                filled = {"model": model, "task": task}
                name = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else filled[ast.unparse(part.value)]
                    for part in parts
                    if isinstance(part, ast.Constant | ast.FormattedValue)
                )
                yield name, _describe(module, value).replace("A task", title)


def _read_titles(module: str) -> dict[str, str]:
    """Task -> its title, of a module's table `TASKS`."""
    for node in _parse(module).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TASKS" and isinstance(node.value, ast.Dict):
            return {
                str(ast.literal_eval(key)): next(
                    str(ast.literal_eval(keyword.value)) for keyword in value.keywords if keyword.arg == "title"
                )
                for key, value in zip(node.value.keys, node.value.values, strict=True)
                if key is not None and isinstance(value, ast.Call)
            }
    return {}


def _describe(module: str, recipe: ast.expr) -> str:
    """Docstring of a function of a module, or of one of its neighbours; a recipe of several models is a partial one."""
    if isinstance(recipe, ast.Call):
        return _describe(module, recipe.args[0])
    if isinstance(recipe, ast.Attribute):
        return _describe(ast.unparse(recipe.value), ast.Name(recipe.attr))
    name = ast.unparse(recipe)
    for node in _parse(module).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
        if isinstance(node, ast.ImportFrom) and any(name == alias.name for alias in node.names):
            return _describe(str(node.module).rpartition(".")[2], recipe)
    return ""


@cache
def _parse(module: str) -> ast.Module:
    return ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
