"""The search for a draft's learning rates and clip norm, on public records, never on private ones.

`umbel-server tune` runs this in a process of its own, with a request as JSON on standard input.
Trials go into an SQLite file, so that another call resumes a search that was stopped. The search is
TPE (Bergstra et al. 2011); its first trial is the draft as it is.
"""

import sys

from umbel_client.trainer.isolation import confine_command
from umbel_host.entry import enter, exit_code


def main() -> int:
    """Answers the request on standard input."""
    confine_command()

    import msgspec

    from umbel_client.planning.search import tune
    from umbel_common.errors import ConfigError
    from umbel_common.plans.requests import TuningRequest
    from umbel_host.terminal import Screen

    def command() -> None:
        try:
            request = msgspec.json.decode(sys.stdin.buffer.read(), type=TuningRequest)
        except msgspec.MsgspecError as error:
            raise ConfigError("a request to tune is malformed", found=str(error)) from None
        tune(request, Screen())

    return exit_code(command)


if __name__ == "__main__":
    enter(main)
