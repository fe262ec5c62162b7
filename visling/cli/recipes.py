"""visling recipes: what can be trained, with every setting."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from visling import config as configs
from visling import models
from visling.cli.options import Command, Group, Json, Settings
from visling.cli.printing import format_rows, show, terminal_width
from visling.cli.recipe_text import describe_recipe
from visling.errors import ConfigError, nearest

recipes_app = typer.Typer(cls=Group, help="List the recipes, and show what one sets and costs.")


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the recipes, and show what one sets and costs. Without a sub-command: the list.

    Example: visling recipes
    """
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list", cls=Command)
def recipes_list(json_: Json = False) -> None:
    """List the recipes of pretrain, finetune and multitask: small ones, then the published ones.

    Example: visling recipes list
    """
    from visling.recipes.listing import join_families, list_published, list_recipes

    recipes = list_recipes()
    if json_:
        show({f"{verb} {name}": what for verb, table in recipes.items() for name, what in table.items()}, json_)
        return
    published = list_published()
    print(f"FAMILY is {', '.join(models.names()[:-1])} or {models.names()[-1]}. `visling recipes show NAME` says more.")
    for title, wanted in (("Small", False), ("Published", True)):
        for verb, table in recipes.items():
            rows = {name: what for name, what in table.items() if (name in published[verb]) is wanted}
            print(f"\n{title}, for visling {verb}")
            print("\n".join(format_rows(join_families(rows), terminal_width())))


@recipes_app.command("show", cls=Command)
def recipes_show(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    set_: Settings = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate/--no-estimate",
            help="Estimate parameters, operations, memory and hours; takes seconds.",
        ),
    ] = True,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", help="GPU to estimate for, A100 by default; may be repeated."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print every setting, as one JSON object.")] = False,
) -> None:
    """Show a recipe: what it is and where its numbers come from, its data, size and main numbers, what it starts from,
    what paper and release do otherwise, and the estimated cost. A name may have a recipe for pretrain and one for
    finetune; one that lacks a changed setting is left out.

    Example: visling recipes show lxmert-20epochs-qa --set train.epochs=12 --gpu H100
    """
    from visling.recipes.changes import change_recipe
    from visling.recipes.configs import differences
    from visling.recipes.releases import describe_start
    from visling.recipes.tables import (
        FINETUNING,
        MULTITASK,
        PRETRAINING,
        common_differences,
        explain,
        find_finetuning,
        find_multitask,
        find_pretraining,
    )
    from visling.runs import estimate as estimates
    from visling.runs.finetune import describe_needed_answers
    from visling.runs.objectives import check_objectives
    from visling.tasks.base import load as load_task

    finders: dict[str, Callable[[str], Callable[[], Any]]] = {
        "pretrain": find_pretraining, "finetune": find_finetuning, "multitask": find_multitask,
    }  # fmt: skip
    offering, unknown = {}, []
    for verb, find in finders.items():
        try:
            offering[verb] = find(name)
        except ConfigError as error:
            unknown.append(error)
    if not offering and ":" in name:
        raise unknown[0]
    if not offering:
        raise ConfigError(f"no recipe {name!r}. {nearest(name, {*PRETRAINING, *FINETUNING, *MULTITASK})}")
    chosen, refused = {}, []
    for verb, recipe in offering.items():
        try:
            config = change_recipe(recipe(), set_ or ())
            if verb == "pretrain":
                check_objectives(config)
            chosen[verb] = config
        except ConfigError as error:
            refused.append(error)
    if not chosen:
        raise refused[0]
    shown = {}
    for verb, config in chosen.items():
        shown[verb] = configs.to_dict(config) | differences(config, offering[verb]())
        if common := common_differences(config):
            shown[verb]["release_in_all_runs"] = dict(common)
        if verb == "finetune":
            shown[verb]["files"] = load_task(config.task).files
            if listed := describe_needed_answers(config):
                shown[verb]["answers"] = f"{listed}; name it with --set task_settings.answers=FILE"
        if start := describe_start(config):
            shown[verb]["init"] = f"{start}; without it a run starts from random weights, and its log says so"
        about, more, source = explain(offering[verb])
        shown[verb] |= {"about": about} | ({"more": more} if more else {}) | ({"source": source} if source else {})
    if estimate:
        gpus = tuple(gpu or (estimates.DEFAULT_GPU,))
        for one in gpus:
            estimates.find_gpu(one)  # before anything is traced
        for verb, config in chosen.items():
            if verb == "multitask":  # tracing each of its tasks takes a minute
                continue
            shown[verb]["estimate"] = estimates.estimate(config).described(gpus)
    if json_:
        print(json.dumps(shown, indent=2))
        return
    print("\n\n".join(describe_recipe(verb, recipe, terminal_width()) for verb, recipe in shown.items()))
