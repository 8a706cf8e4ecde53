"""`umbel-client`: the commands of a site's administrator, put together."""

import sys

import typer

from umbel_client.cli import backup, finetune, join, plans, service
from umbel_client.cli import keys as keys_cli
from umbel_client.cli.budget import budget
from umbel_client.cli.data import data
from umbel_client.cli.roster import roster
from umbel_host.terminal import exit_code

app = typer.Typer(
    name="umbel-client",
    help="Runs a site: its keys, its decisions, its training and its privacy budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(roster, name="roster")
app.add_typer(budget, name="budget")
app.add_typer(data, name="data")
keys_cli.register(app)
join.register(app)
service.register(app)
plans.register(app)
finetune.register(app)
backup.register(app)


def main() -> None:
    """The console script: every error is text for people, with its own exit code."""
    sys.exit(exit_code(app))
