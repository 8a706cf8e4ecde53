"""`umbel-client`: commands parse, call and print. Nobody imports them."""

from typing import TYPE_CHECKING, NoReturn

from umbel_host.entry import enter

if TYPE_CHECKING:
    import typer


def main() -> NoReturn:
    """The console script: every error is text for people, with its own exit code."""
    enter(_program)


def _program() -> int:
    from umbel_client.cli.command import run_command

    return run_command()


def __getattr__(name: str) -> "typer.Typer":
    """`app`, for those that look at the commands. `main` must come before what it imports."""
    if name != "app":
        raise AttributeError(name)
    from umbel_client.cli.command import app

    return app
