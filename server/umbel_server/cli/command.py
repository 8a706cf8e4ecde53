"""`umbel-server`: the commands of an operator."""

import typer

from umbel_host.entry import exit_code
from umbel_host.processes.lifecycle import hide_memory
from umbel_host.processes.log import configure
from umbel_host.processes.supervisor import Command, supervise
from umbel_host.terminal import command_line
from umbel_server.cli import backup, setup, sites
from umbel_server.cli.adapters import adapters
from umbel_server.cli.calibrate import calibrate
from umbel_server.cli.job import job
from umbel_server.cli.options import SERVER_TOML, Config
from umbel_server.cli.plan import plan
from umbel_server.cli.tune import tune
from umbel_server.operator.config import load_config

app = command_line("umbel-server", "Aggregates what sites train together, and learns only the sum.")
setup.register(app)
sites.register(app)
backup.register(app)
app.add_typer(plan, name="plan")
app.add_typer(job, name="job")
app.add_typer(adapters, name="adapters")
app.command()(calibrate)
app.command()(tune)


@app.command()
def run(
    config: Config = SERVER_TOML,
) -> None:
    """Run the server: start the processes with the port and the jobs, and keep them running."""
    load_config(config)
    configure()
    path = str(config.absolute())
    code = supervise(
        [
            Command("port", "umbel_server.port_process", (path,)),
            Command("rounds", "umbel_server.rounds_process", (path,)),
        ]
    )
    if code:
        raise typer.Exit(code)


def run_command() -> int:
    """Runs the command of the command line; returns the exit code."""
    hide_memory()
    return exit_code(app)
