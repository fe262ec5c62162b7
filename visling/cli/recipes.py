"""visling recipes: what can be trained, with every setting."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer

from visling import config as configs
from visling.cli.options import Json, Settings
from visling.cli.printing import show
from visling.errors import ConfigError, nearest

T = TypeVar("T")

recipes_app = typer.Typer(help="What can be trained, with every setting.")


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """What can be trained, with every setting; without a further word, the list.

    Example: visling recipes
    """
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list(json_: Json = False) -> None:
    """List the recipes of pretrain and finetune.

    Example: visling recipes list
    """
    from visling.recipes.tables import FINETUNING, PRETRAINING

    def about(recipe: Callable[[], Any]) -> str:
        # recipes shared by several models are partial functions
        return (getattr(recipe, "func", recipe).__doc__ or "").splitlines()[0]

    tables = {"pretrain": PRETRAINING, "finetune": FINETUNING}
    show({f"{verb} {name}": about(recipe) for verb, table in tables.items() for name, recipe in table.items()}, json_)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    set_: Settings = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate/--no-estimate",
            help="Add parameters, operations, memory and hours; an estimate that takes seconds.",
        ),
    ] = True,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", help="Estimate for this GPU; may be given several times. A100 if left out."),
    ] = None,
) -> None:
    """Print every setting of a recipe, after changes, where it differs from the paper, and what it costs, as JSON by
    verb.

    A verb whose recipe of this name lacks a changed setting is left out.

    Example: visling recipes show lxmert-20epochs-qa --set train.epochs=12 --gpu H100
    """
    from visling.recipes.configs import differences
    from visling.recipes.tables import FINETUNING, PRETRAINING, find_finetuning, find_pretraining
    from visling.runs import estimate as estimates
    from visling.runs import pretrain as pretraining

    finders: dict[str, Callable[[str], Callable[[], Any]]] = {"pretrain": find_pretraining, "finetune": find_finetuning}
    having, unknown = {}, []
    for verb, find in finders.items():
        try:
            having[verb] = find(name)
        except ConfigError as error:
            unknown.append(error)
    if not having and ":" in name:
        raise unknown[0]
    if not having:
        raise ConfigError(f"no recipe {name!r}. {nearest(name, {*PRETRAINING, *FINETUNING})}")
    found, refused = {}, []
    for verb, recipe in having.items():
        try:
            run = find_recipe(recipe, set_, None)
            if verb == "pretrain":
                pretraining.check_names(run)
            found[verb] = run
        except ConfigError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    shown = {verb: configs.to_dict(run) | differences(run, having[verb]()) for verb, run in found.items()}
    if estimate:
        gpus = tuple(gpu or (estimates.DEFAULT_GPU,))
        for one in gpus:
            estimates.find_gpu(one)  # before anything is traced
        for verb, run in found.items():
            shown[verb]["estimate"] = estimates.estimate(run).described(gpus)
    print(json.dumps(shown, indent=2))


def find_recipe(recipe: Callable[[], T], settings: Sequence[str] | None, seed: int | None) -> T:
    chosen = configs.override(recipe(), settings or ())
    return chosen if seed is None else configs.override(chosen, [f"train.seed={seed}"])
