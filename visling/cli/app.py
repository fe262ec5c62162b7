"""The command line: it parses, calls and prints. Plain text for people, `--json` for programs.

One file per noun or group of verbs; this one assembles them, in the order in which `visling --help` lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from visling.cli.converting import catalog, convert, verify
from visling.cli.detect import detect_app
from visling.cli.doctor import doctor
from visling.cli.evaluating import compare_models, evaluate, predict, report
from visling.cli.recipes import recipes_app
from visling.cli.regions import regions_app
from visling.cli.scenes import scenes
from visling.cli.training import finetune, pretrain
from visling.errors import VislingError

_INTERRUPTED = 130
"""Status with which typer ends a command that was stopped with Ctrl-C."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Region-based vision-and-language Transformers.",
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "scenes": scenes,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "report": report,
    "compare": compare_models,
    "convert": convert,
    "verify": verify,
    "catalog": catalog,
    "doctor": doctor,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)
app.add_typer(detect_app, name="detect")
app.add_typer(regions_app, name="regions")
app.add_typer(recipes_app, name="recipes")


def run() -> None:
    """Run the command line; an error that the user can mend is printed without a trace and ends with status 2."""
    try:
        app()
    except VislingError as error:
        print(f"visling: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print(
                "visling: stopped. What was saved is kept; training and extraction resume with --resume.",
                file=sys.stderr,
            )
        raise
