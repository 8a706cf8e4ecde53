"""`umbel-server`: commands parse, call and print. Nothing may import them."""

from umbel_host.entry import enter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    import typer


def main() -> "NoReturn":
    """The console script: every error is text for people, with its own exit code."""
    enter(_program)


def _program() -> int:
    from umbel_server.cli.command import run_command

    return run_command()


def __getattr__(name: str) -> "typer.Typer":
    """`app`, for those that look at the commands. `main` must come before what it imports."""
    if name != "app":
        raise AttributeError(name)
    from umbel_server.cli.command import app

    return app
