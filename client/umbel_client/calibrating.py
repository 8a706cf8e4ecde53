"""Proposes the numbers of a plan's draft, and says what epsilon buys with them.

`umbel-server calibrate` runs this in a process of its own, with a request as JSON on standard
input, and reads the answer as JSON on standard output. It reads the draft and the base model's
folder, and no record.
"""

import sys

from umbel_client.trainer.isolation import confine_command
from umbel_host.entry import enter, exit_code


def main() -> int:
    """Answers the request on standard input."""
    confine_command()

    import msgspec

    from umbel_client.planning.comparison import calibrate_draft
    from umbel_common.errors import ConfigError
    from umbel_common.plans.requests import CalibrationRequest

    def command() -> None:
        try:
            request = msgspec.json.decode(sys.stdin.buffer.read(), type=CalibrationRequest)
        except msgspec.MsgspecError as error:
            raise ConfigError("a request to calibrate is malformed", found=str(error)) from None
        print(msgspec.json.encode(calibrate_draft(request)).decode())

    return exit_code(command)


if __name__ == "__main__":
    enter(main)
