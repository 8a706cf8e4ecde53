"""`umbel-client`: commands parse, call and print. Nothing imports them."""

from umbel_host.entry import enter_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> "NoReturn":
    """The console script: every error is text for people, with its own exit code."""
    enter_command("umbel_client.cli.command")
