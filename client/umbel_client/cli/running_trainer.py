"""The trainer that runs at this site, as `status` and `doctor` find it."""

from umbel_client.site.config import ClientConfig
from umbel_client.site.ipc import ControlStub, TrainerStatus
from umbel_client.site.pinned_roster import load_pinned
from umbel_common.errors import UmbelError, UnreachableError

NOT_RUNNING = "not running: umbel-client run"
RESTART = "stop umbel-client run, and start it again"


def ask_trainer(settings: ClientConfig, seconds: float = 5.0) -> TrainerStatus | None:
    """The state of the trainer; None if it does not run.

    Args:
        seconds: how long to wait for its answer.

    Raises:
        UnreachableError: another user's trainer may run, whose socket this user cannot open.
    """
    stub = ControlStub(settings.state_folder.control_socket)
    try:
        return stub.status(seconds)
    except UnreachableError as error:
        if "denied" in str(error.found).lower():
            raise
        return None
    finally:
        stub.close()


def is_stale(settings: ClientConfig, trainer: TrainerStatus) -> bool:
    """Whether another roster is pinned than the trainer believes, or more keys are revoked."""
    if trainer.pinned is None:
        return False
    try:
        return load_pinned(settings).mark() != trainer.pinned
    except UmbelError:
        return True
