"""visling analysis: look inside a trained model over a data set, one command per file."""

from __future__ import annotations

import typer

from visling.cli.alignment import alignment
from visling.cli.heads import heads
from visling.cli.options import Command, Group
from visling.cli.relevance import relevance
from visling.cli.states import project, states

analysis_app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Look inside a trained model, over a data set: its heads, its states, its answers.",
)
analysis_app.command("heads", cls=Command)(heads)
analysis_app.command("states", cls=Command)(states)
analysis_app.command("project", cls=Command)(project)
analysis_app.command("alignment", cls=Command)(alignment)
analysis_app.command("relevance", cls=Command)(relevance)
