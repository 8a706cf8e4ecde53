"""One evaluation as a process: a request as JSON on standard input, the figures on standard output.

The server runs `python -P -m umbel_client.evaluating`: so the server needs none of a model's
packages, and a crash here ends no job.
"""

import sys

from umbel_client.trainer.isolation import confine_command
from umbel_host.entry import enter, exit_code


def main() -> int:
    """Answers the request on standard input."""
    confine_command()

    import msgspec

    from umbel_client.evaluation.request import evaluate
    from umbel_common.errors import ConfigError
    from umbel_common.plans.requests import EvaluationRequest

    def command() -> None:
        try:
            request = msgspec.json.decode(sys.stdin.buffer.read(), type=EvaluationRequest)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                "a request for an evaluation is malformed", found=str(error)
            ) from None
        print(msgspec.json.encode(evaluate(request)).decode())

    return exit_code(command)


if __name__ == "__main__":
    enter(main)
