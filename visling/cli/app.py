"""The command line: it parses, calls and prints. Plain text for people, `--json` for programs.

One file per noun or group of verbs; this one assembles them, in the groups and the order of `visling --help`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from visling.cli.analysis import analysis_app
from visling.cli.converting import convert, verify
from visling.cli.demo import demo
from visling.cli.detect import detect_app
from visling.cli.doctor import doctor
from visling.cli.evaluating import compare_models, evaluate, report
from visling.cli.fetching import catalog, fetch
from visling.cli.gallery import gallery
from visling.cli.inspecting import inspect
from visling.cli.multitasking import multitask
from visling.cli.options import Command, Group
from visling.cli.predicting import predict
from visling.cli.recipes import recipes_app
from visling.cli.regions import regions_app
from visling.cli.reproducing import reproduce
from visling.cli.scenes import scenes
from visling.cli.serving import serve
from visling.cli.training import finetune, pretrain
from visling.errors import LostProcessError, VislingError

_INTERRUPTED = 130
"""Exit status of a command that was stopped with Ctrl-C."""

_GROUPS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "First steps": {"demo": demo},
    "Data": {"scenes": scenes, "detect": detect_app, "regions": regions_app},
    "Training": {"recipes": recipes_app, "pretrain": pretrain, "finetune": finetune, "multitask": multitask},
    "Results": {
        "evaluate": evaluate,
        "predict": predict,
        "report": report,
        "gallery": gallery,
        "compare": compare_models,
        "reproduce": reproduce,
    },
    "Inspection": {"inspect": inspect, "analysis": analysis_app, "serve": serve},
    "Weights": {"catalog": catalog, "fetch": fetch, "convert": convert, "verify": verify},
    "This machine": {"doctor": doctor},
}
"""Heading in `visling --help` -> its commands."""


class _GroupedCommands(Group):
    """Lists commands in the order of `_GROUPS`; typer by itself puts those with sub-commands last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return [name for commands in _GROUPS.values() for name in commands]


app = typer.Typer(
    cls=_GroupedCommands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Region-based vision-and-language Transformers, from pixels to answers. Each command's --help has an example.",
)
for heading, commands in _GROUPS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=heading)
        else:
            app.command(name, rich_help_panel=heading, cls=Command)(command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"visling {metadata.version('visling')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run() -> None:
    """Run the command line; an error that the user can fix is printed without a traceback, once if several processes
    find it, and ends with status 2, or 75 if another process of the run was lost.

    Tasks and recipes of one's own are also found in the working folder, as with `python -m visling`, but never in place
    of an installed module.
    """
    sys.path.append(str(Path.cwd()))
    try:
        app()
    except VislingError as error:
        from visling import runtime

        lost = isinstance(error, LostProcessError)  # each process says so in its own words
        if runtime.is_first_to_say("lost" if lost else str(error)):
            print(f"visling: {error}", file=sys.stderr, flush=True)
        sys.exit(LostProcessError.status if lost else 2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print(
                "visling: stopped. What was saved is kept; training and extraction resume with --resume.",
                file=sys.stderr,
            )
        raise
