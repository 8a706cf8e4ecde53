"""Does an offer or an attempt fit what this site knows? The checks of steps O2, O3, 5, 6, 8 and 10
of `handler`.

This module is part of the core of the privacy guarantee. Never drop a check, or move it behind
training.

Each raises a `RemoteProtocolError` with the name of the check that failed.
"""

from collections.abc import Callable
from typing import Any

from umbel_client.trainer.site import Site
from umbel_common.adapters.reach import require_reachable
from umbel_common.adapters.start import Origin, require_start
from umbel_common.adapters.vector import Vector, adapter_digest, from_bytes
from umbel_common.errors import PlanError, RemoteProtocolError, UmbelError, require
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import RELEASE_VERSIONS, EarlyEnd, Release, RoundHeader
from umbel_common.protocol.transcript import final_round
from umbel_common.protocol.wire import FinishRequest, TrainRequest
from umbel_common.secagg.encoding import encoding_of
from umbel_common.trust.identity import Roster

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


def check_round(site: Site, header: RoundHeader, plan: TrainingPlan) -> None:
    """Step 5: the header is for this federation, for the accepted plan, and for this site.

    Raises:
        RemoteProtocolError: `other-federation`, `plan-digest`, `header-version`, `not-in-cohort`
            or `round-past-plan`.
    """
    federation, rounds = site.roster.federation, plan.training.rounds
    checks = {
        "other-federation": (header.federation == federation, header.federation, federation),
        "plan-digest": (header.plan == plan.digest(), header.plan.hex(), plan.digest().hex()),
        "header-version": (header.version == plan.version, header.version, plan.version),
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


def check_parties(site: Site, header: RoundHeader) -> None:
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
    request: TrainRequest,
    header: RoundHeader,
    plan: TrainingPlan,
    origin: Callable[[], Origin],
) -> tuple[Release, Vector]:
    """Step 10: the release to start from and its adapter, which the header names by its digest.

    Args:
        origin: what this site knows of the adapter that the job starts from.

    Raises:
        RemoteProtocolError: `pinned-signature`, `malformed-message`, `adapter-length`,
            `adapter-values`, `adapter-digest`, `other-release`, `initial-adapter`, `start-norm` or
            `adapter-too-far`.
        UmbelError: this site does not know the start (`origin`).
    """
    release = site.open(request.release, RELEASE_VERSIONS)
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
