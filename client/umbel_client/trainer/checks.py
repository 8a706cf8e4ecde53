"""Does an offer or an attempt fit what this site knows? The checks of steps O2, O3, 5, 6, 8, 10
and 11 of `handler`.

This module is part of the core of the privacy guarantee. Never drop a check, or move it behind
training, and never take the mark of an old copy back here.

Each raises a `RemoteProtocolError` with the name of the check that failed.
"""

from collections.abc import Callable
from typing import Any

from umbel_client.storage.kept_adapter import KeptAdapter
from umbel_client.trainer.job import SiteJob
from umbel_client.trainer.site import Site
from umbel_common.adapters.difference import apply_difference
from umbel_common.adapters.reach import require_reachable
from umbel_common.adapters.start import Origin, require_start
from umbel_common.adapters.vector import Vector, adapter_digest, from_bytes, to_bytes
from umbel_common.canonical import decode_canonical
from umbel_common.errors import PlanError, RemoteProtocolError, UmbelError, require
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import (
    HEADER_VERSIONS,
    RELEASE_VERSIONS,
    EarlyEnd,
    Release,
    RoundHeader,
)
from umbel_common.protocol.transcript import final_round
from umbel_common.protocol.wire import (
    FinishRequest,
    LastAdvert,
    TrainFromLastRequest,
    TrainRequest,
)
from umbel_common.secagg.encoding import encoding_of
from umbel_common.secagg.messages import KeyAdvert, Preparation
from umbel_common.trust.identity import Identity, Roster, label_of, verifies

_APPROVE = (
    "ask the operator for the new roster (umbel-server roster export), compare it with the others,"
    " then: umbel-client roster approve FILE, and restart umbel-client run"
)


def check_parts(plan: TrainingPlan) -> None:
    """Step O2: the parts of the plan fit together.

    Raises:
        RemoteProtocolError: `contradictory-plan`.
    """
    try:
        check_plan(plan)
    except PlanError as error:
        raise RemoteProtocolError("contradictory-plan", error.message, **_details(error)) from error


def check_roster(site: Site, roster: bytes) -> None:
    """Step O3: the job would run under a roster that this site pinned, now or before.

    Args:
        roster: its digest, 32 bytes.

    Raises:
        RemoteProtocolError: `roster-digest`.
    """
    require(
        roster in _rosters(site),
        "roster-digest",
        "the operator's roster is not one that this site has approved",
        found=roster.hex(),
        accepted=site.roster.digest().hex(),
        remedy=_APPROVE,
    )


def check_round(site: Site, header: RoundHeader | Preparation, plan: TrainingPlan) -> None:
    """Step 5: the header is for this federation, for the accepted plan, and for this site.

    Args:
        header: of an attempt, or of one that is to be prepared.

    Raises:
        RemoteProtocolError: `other-federation`, `plan-digest`, `header-version`, `not-in-cohort`
            or `round-past-plan`.
    """
    federation, rounds = site.roster.federation, plan.training.rounds
    version = plan.version if isinstance(header, Preparation) else header.version
    checks = {
        "other-federation": (header.federation == federation, header.federation, federation),
        "plan-digest": (header.plan == plan.digest(), header.plan.hex(), plan.digest().hex()),
        "header-version": (version == plan.version, version, plan.version),
        "not-in-cohort": (site.name in header.cohort, header.cohort, f"a cohort with {site.name}"),
        "round-past-plan": (header.round <= rounds, header.round, f"at most {rounds}"),
    }
    for check, (holds, found, accepted) in checks.items():
        require(
            holds,
            check,
            "a round header does not fit what this site knows",
            field=plan.job,
            found=found,
            accepted=accepted,
            remedy="the operator's mistake: tell the operator the name of this check",
        )


def check_parties(site: Site, header: RoundHeader | Preparation) -> None:
    """Step 6, repeated at every stage: the cohort is one that this site believes.

    A job keeps the roster that it began with. A site that joined later does not disturb it; a site
    that left, or that has another key by now, ends it here.

    Raises:
        RemoteProtocolError: `roster-digest`, `not-in-roster` or `revoked-key`.
    """
    pinned = site.pinned
    members = _keys(pinned.roster)
    rosters = _rosters(site)
    cohort = {name: members.get(name) for name in header.cohort}
    require(
        header.roster in rosters,
        "roster-digest",
        "an attempt is made under a roster that this site has not approved",
        found=header.roster.hex(),
        accepted=pinned.roster.digest().hex(),
        remedy=_APPROVE,
    )
    agreed = _keys(rosters.get(header.roster, pinned.roster))
    strange = sorted(name for name, key in cohort.items() if key is None or agreed.get(name) != key)
    require(
        not strange,
        "not-in-roster",
        "an attempt has sites that are not in this site's roster, or have other keys there",
        found=tuple(strange),
        accepted=tuple(sorted(members)),
        remedy="compare the operator's roster with the others, and approve it: umbel-client roster"
        " diff FILE",
    )
    revoked = sorted(name for name, key in cohort.items() if key in pinned.revoked)
    require(
        not revoked,
        "revoked-key",
        "an attempt has sites whose keys are revoked here",
        found=tuple(revoked),
        remedy="tell the operator: umbel-server sites revoke",
    )


def check_ring(header: RoundHeader, plan: TrainingPlan) -> None:
    """Step 8: no sum of the cohort can wrap.

    Raises:
        RemoteProtocolError: `ring-too-small`.
    """
    try:
        encoding_of(plan, len(header.cohort)).prove_headroom()
    except PlanError as error:
        raise RemoteProtocolError("ring-too-small", error.message, **_details(error)) from error


def check_start(
    site: Site,
    request: TrainRequest | TrainFromLastRequest,
    header: RoundHeader,
    plan: TrainingPlan,
    origin: Callable[[], Origin],
    kept: KeptAdapter,
) -> tuple[Release, Vector]:
    """Step 10: the release to start from and its adapter, which the header names by its digest.

    Whether the adapter came as a whole, or its difference from one that this site has: every check
    is made of the whole of it.

    Args:
        origin: what this site knows of the adapter that the job starts from.
        kept: the adapter of this job that the site verified last.

    Raises:
        RemoteProtocolError: `pinned-signature`, `malformed-message`, `release-missing`,
            `adapter-length`, `adapter-values`, `adapter-digest`, `other-release`,
            `initial-adapter`, `start-norm` or `adapter-too-far`.
        UmbelError: this site does not know the start (`origin`).
    """
    release = site.open(request.release, RELEASE_VERSIONS)
    if isinstance(request, TrainFromLastRequest):
        vector = _completed(request, release, header, plan, kept)
    else:
        vector = from_bytes(request.adapter, plan.lora.size)
    found = adapter_digest(plan.digest(), vector)
    require(
        found == release.adapter == header.adapter,
        "adapter-digest",
        "an adapter is not what its release says",
        found=found.hex(),
        accepted=release.adapter.hex(),
    )
    require(
        (release.plan, release.round, release.version)
        == (plan.digest(), header.round - 1, plan.version),
        "other-release",
        "a round does not start from its predecessor",
        found=f"the release of round {release.round}, version {release.version}",
        accepted=f"the release of round {header.round - 1}, version {plan.version}",
    )
    if release.round == 0:
        require_start(plan, vector)
    require_reachable(plan, release.round, vector, origin(), sites=_most_sites(site))
    return release, vector


def check_last_advert(last: LastAdvert, job: SiteJob, identity: Identity) -> None:
    """Step 11: marks a ledger that does not know what this site signed, and refuses.

    The ledger and the journal are compared with each other, but a copied folder or a virtual
    machine's snapshot puts both back together. Then only others know what this site signed since.
    Each advert of keys carries the head that the ledger had, and the server shows every site its
    own last advert with the next request to train. A server cannot forge it. It can withhold it, or
    show an older one: then nothing is noticed here.

    Args:
        identity: this site's identity.

    Raises:
        RemoteProtocolError: `ledger-rolled-back`; `other-context` or `malformed-message` if the
            server shows something other than an advert with its header.
    """
    label, advert = label_of(KeyAdvert), last.advert
    if not verifies(identity.public_key, label, advert.statement, advert.signature):
        # It was signed with a former key of this site, or not by this site: it proves nothing.
        return
    signed = decode_canonical(advert.statement, KeyAdvert)
    # The site's own signature over the context binds the header, which others signed too.
    header = decode_canonical(last.header.statement, HEADER_VERSIONS)
    require(header.context() == signed.context, "other-context", "an advert is of another attempt")
    try:
        require(
            job.knows(signed.ledger_head, header),
            "ledger-rolled-back",
            f"this site signed a head of its privacy ledger, for round {header.round} of job"
            f" {header.job}, that the ledger does not contain",
            field="ledger.sqlite",
            accepted=f"a continuation of {signed.ledger_head.hex()}",
            remedy="the state folder is an old copy, or a new one: bring back the latest, or state"
            " what was spent since: umbel-client budget state-spend (docs/budget.md)",
        )
    except RemoteProtocolError:
        job.mark_as_old_copy(signed.ledger_head)
        raise


def check_end(
    site: Site,
    request: FinishRequest,
    release: Release,
    plan: TrainingPlan,
    origin: Callable[[], Origin],
) -> Vector:
    """The adapter of a job's last release, checked against it.

    Args:
        origin: what this site knows of the adapter that the job started from.

    Raises:
        RemoteProtocolError: `pinned-signature`, `malformed-message`, `adapter-length`,
            `adapter-values`, `adapter-digest`, `other-release` or `adapter-too-far`.
    """
    end = None if request.early_end is None else site.open(request.early_end, EarlyEnd)
    vector = from_bytes(request.adapter, plan.lora.size)
    require(
        adapter_digest(plan.digest(), vector) == release.adapter,
        "adapter-digest",
        "an adapter is not what its release says",
    )
    require(
        (release.plan, release.round, release.version)
        == (plan.digest(), final_round(plan, end), plan.version),
        "other-release",
        "this is not the last release of the plan",
    )
    require_reachable(plan, release.round, vector, origin(), sites=_most_sites(site))
    return vector


def check_size_class(site: Site, plan: TrainingPlan) -> None:
    """Refuses a plan whose largest weight is smaller than this site's size class.

    Raises:
        PlanError: the plan is one.
    """
    weight = site.roster.member(site.name).weight
    if plan.aggregation.weights == "size-class" and weight > plan.aggregation.max_weight:
        raise PlanError(
            "this site's size class is larger than the plan allows",
            field="aggregation.max_weight",
            found=plan.aggregation.max_weight,
            accepted=f"at least {weight}",
        )


def _completed(
    request: TrainFromLastRequest,
    release: Release,
    header: RoundHeader,
    plan: TrainingPlan,
    kept: KeptAdapter,
) -> Vector:
    """The adapter that a difference makes of the one that this site kept; nothing vouches for it
    yet.

    A site that stored the release's adapter and ended before it answered has that one already. The
    difference changes nothing in it then, unless it is another release's.

    Raises:
        RemoteProtocolError: `release-missing`, `adapter-length` or `adapter-values`.
    """
    vector = kept.load(plan, {request.onto, release.adapter})
    if request.changed:
        apply_difference(plan, header.round - 1, vector, request.changed)
    return from_bytes(to_bytes(vector), plan.lora.size)


def _details(error: UmbelError) -> dict[str, Any]:
    """What an error says beside its message."""
    return {
        "field": error.field,
        "found": error.found,
        "accepted": error.accepted,
        "remedy": error.remedy,
    }


def _rosters(site: Site) -> dict[bytes, Roster]:
    """The rosters that this site pinned, by digest: a job continues under the one it began with."""
    return {roster.digest(): roster for roster in (*site.pinned.former, site.pinned.roster)}


def _most_sites(site: Site) -> int:
    """The most sites that can be in a sum: those of the largest roster of a job under way."""
    return max(len(roster.members) for roster in _rosters(site).values())


def _keys(roster: Roster) -> dict[str, bytes]:
    return {member.name: member.public_key for member in roster.members}
