"""Keys and shares that this site prepared for attempts that are to come, in memory only.

What this module must keep, whatever is changed in it: a slot is in no file and in no log, it is
taken out before anything is signed with its keys, and it fits one attempt. A trainer that starts
has none, so that a state folder that was put back brings no slot back.

A request to prepare passes steps 1, 3, 5, 6 and 7 of `handler`, and step 8 as far as it judges a
cohort, for the attempt that it names. The request to train passes all of them. The codes are
`unknown-plan`, `other-federation`, `plan-digest`, `not-in-cohort`, `round-past-plan`,
`roster-digest`, `not-in-roster`, `revoked-key`, `attempt-reused`, `cohort-too-small`,
`threshold-too-high`, `threshold-too-low`. A request to fill finds the slot (`unknown-slot`) and
passes step 6 again. Nothing is charged, and nothing looks at the records.
"""

from dataclasses import dataclass, field

from umbel_client.site.policy import judge_header
from umbel_client.trainer.checks import check_parties, check_round
from umbel_client.trainer.site import Site
from umbel_common.errors import require
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import FillReply, FillRequest, PrepareReply
from umbel_common.secagg.messages import Preparation, preparation_of
from umbel_common.secagg.preparation import FilledSlot, Slot, prepare
from umbel_common.secagg.rules import Rules


@dataclass(repr=False, eq=False)
class Slots:
    """At most one slot for each job of this site."""

    _of_jobs: dict[str, Slot | FilledSlot] = field(default_factory=dict)

    def prepare(
        self, site: Site, plan: TrainingPlan, rules: Rules, preparation: Preparation
    ) -> PrepareReply:
        """Keys for one attempt, in the place of what was prepared for this job before.

        Args:
            plan: the accepted plan of the job.

        Raises:
            RemoteProtocolError, PolicyRefusal: the code of the check that failed.
        """
        check_round(site, preparation, plan)
        check_parties(site, preparation)
        site.journal.check_new(preparation)
        judge_header(site.policy, plan, preparation)
        slot, keys = prepare(preparation, site.name, rules, site.identity, site.entropy)
        self._of_jobs[preparation.job] = slot
        return PrepareReply(keys=keys)

    def fill(self, site: Site, request: FillRequest) -> FillReply:
        """Shares of those keys' secrets, once.

        Raises:
            RemoteProtocolError: the code of the check that failed; the slot is as it was.
        """
        slot = next(
            (
                slot
                for slot in self._of_jobs.values()
                if isinstance(slot, Slot) and slot.preparation.context() == request.context
            ),
            None,
        )
        require(
            slot is not None,
            "unknown-slot",
            "shares are asked for that this site is not about to prepare",
        )
        assert slot is not None  # required above
        check_parties(site, slot.preparation)
        filled, shares = slot.fill(request.keys, site.roster, site.entropy)
        self._of_jobs[slot.preparation.job] = filled
        return FillReply(context=request.context, shares=shares)

    def take(self, header: RoundHeader) -> FilledSlot | None:
        """What was prepared for an attempt, which is in here no more; None: nothing, or another.

        A slot that an attempt did not use is dropped too: the attempts after it are others.
        """
        slot = self._of_jobs.pop(header.job, None)
        if isinstance(slot, FilledSlot) and slot.preparation == preparation_of(header):
            return slot
        return None

    def drop(self, job: str) -> None:
        """Forgets what was prepared for a job."""
        self._of_jobs.pop(job, None)
