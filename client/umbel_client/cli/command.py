"""`umbel-client`: the commands of a site's administrator, put together."""

import sys

from umbel_client.cli import backup, finetune, join, plans, service
from umbel_client.cli import keys as keys_cli
from umbel_client.cli.budget import budget
from umbel_client.cli.data import data
from umbel_client.cli.model import model
from umbel_client.cli.roster import roster
from umbel_client.trainer.isolation import confine_command
from umbel_host.entry import exit_code
from umbel_host.processes.lifecycle import hide_memory
from umbel_host.terminal import command_line

SPEAKING = ("run", "status", "watch", "doctor")
"""The commands that reach other processes or the server. `doctor` confines itself before it opens
data; the others open none."""

app = command_line(
    "umbel-client", "Runs a site: its keys, its decisions, its training and its privacy budget."
)
app.add_typer(roster, name="roster")
app.add_typer(budget, name="budget")
app.add_typer(data, name="data")
app.add_typer(model, name="model")
keys_cli.register(app)
join.register(app)
service.register(app)
plans.register(app)
finetune.register(app)
backup.register(app)


def run_command() -> int:
    """Runs the command of the command line; returns the exit code.

    A command has no network, and no other way out, unless it cannot do without.
    """
    if sys.argv[1:2] and sys.argv[1] in SPEAKING:
        hide_memory()
    else:
        confine_command()
    return exit_code(app)
