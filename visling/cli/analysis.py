"""visling analysis: look inside a trained model over a data set, one command per file."""

from __future__ import annotations

import typer

from visling.cli.heads import heads
from visling.cli.options import Command, Group

analysis_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Look inside a trained model: what its heads attend to, over a data set."
)
analysis_app.command("heads", cls=Command)(heads)
