"""What an operator signs as a plan, and what it does not."""

from pathlib import Path

from umbel_common.errors import PlanError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import is_not_tried
from umbel_common.secagg.encoding import encoding_of
from umbel_common.trust.identity import Signed, sign
from umbel_host.files.keys import read_identity
from umbel_server.operator.config import ServerConfig, load_roster


def require_tried(text: str, file: Path) -> None:
    """Refuses a plan's file that says that nobody has loaded the base model with it.

    Raises:
        PlanError: it does.
    """
    if is_not_tried(text):
        raise PlanError(
            "a plan was made without loading its base model, and would fail at each site if the"
            " model is not what its files say",
            file=file,
            field="not_tried",
            remedy="umbel-server plan try, on a machine with the packages that load a model; or"
            " --unchecked, if you take that risk",
        )


def sign_as_operator(settings: ServerConfig, made: TrainingPlan, file: Path) -> Signed:
    """A plan with the operator's signature.

    Args:
        file: where it came from, for errors.

    Raises:
        PlanError: it is for another federation, or its sum would overflow.
        IdentityError: the operator's key cannot be used.
    """
    document = load_roster(settings)
    if made.federation != document.roster.federation:
        raise PlanError(
            "a plan is for another federation",
            file=file,
            field="federation",
            found=made.federation,
            accepted=document.roster.federation,
        )
    # The sum of all sites' deltas must fit, or the job would fail in its first round.
    encoding_of(made, max(len(document.roster.members), 1)).prove_headroom()
    return sign(read_identity(Path(settings.identity)), made)
