"""Any order, repetition, delay, lie or garbage: the exact sum of the accepted vectors, or an abort.

A schedule is drawn stage by stage. Sites are real participants, of which some are faulty; what
happens to each reply is one of `HONEST` or `FAULTY`, and all deliveries of a stage are shuffled.
"""

import os
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from server.jobs.real_sites import Sites

from umbel_common.canonical import decode
from umbel_common.errors import RoundAborted
from umbel_common.plans.plan import Aggregation, TrainingPlan
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    ConfirmReply,
    MaskReply,
    Refusal,
    Reply,
    ShareReply,
    TrainReply,
    TrainRequest,
    UnmaskReply,
)
from umbel_common.secagg.messages import KeyAdvert, Survivors, SurvivorSignature
from umbel_common.trust.identity import Identity, Roster, Signed, sign
from umbel_server.aggregation.attempt import Attempt, AttemptOutcome, open_attempt

LENGTH = 5
TOO_FEW = {
    "train": "too-few-adverts",
    "share": "too-few-shares",
    "mask": "too-few-vectors",
    "confirm": "too-few-confirmations",
    "unmask": "too-few-reveals",
}
ANSWERED = {
    "train": TrainReply,
    "share": ShareReply,
    "mask": MaskReply,
    "confirm": ConfirmReply,
    "unmask": UnmaskReply,
}

MakePlan = Callable[..., TrainingPlan]
MakeFederation = Callable[[int], tuple[Identity, dict[str, Identity], Roster]]


class World:
    """A federation with one attempt behind it, whose replies may still arrive, and one to come."""

    def __init__(self, plan: TrainingPlan, federation: Any) -> None:
        self.plan = plan
        _, self.identities, self.roster = federation
        self.old: dict[str, dict[str, Reply]] = {}
        attempt, sites = self.attempt(1)
        while isinstance(attempt, Attempt):
            stage = attempt.stage
            self.old[stage] = {
                site: sites.answer(site, request) for site, request in attempt.requests().items()
            }
            for site, reply in self.old[stage].items():
                attempt = attempt.receive(site, reply)
            attempt = attempt.advance()

    def attempt(self, number: int) -> tuple[Any, Sites]:
        header = RoundHeader(
            federation="clinics",
            job="job",
            round=1,
            attempt=number,
            plan=self.plan.digest(),
            roster=self.roster.digest(),
            adapter=bytes(32),
            cohort=tuple(sorted(self.identities)),
        )
        nothing = Signed(statement=b"", signature=bytes(64))
        request = TrainRequest(header=nothing, release=nothing, adapter=b"")
        attempt = open_attempt(header, self.roster, self.plan, request, LENGTH, {})
        return attempt, Sites(header, self.plan, self.identities, self.roster, LENGTH)


class Schedule:
    """One attempt under drawn faults, and a plain account of what it should do."""

    def __init__(self, world: World, data: st.DataObject, faulty: dict[str, str]) -> None:
        """`faulty`: site -> the stage from which on it is."""
        self.world = world
        self.draw = data.draw
        self.faulty = faulty
        self.attempt, self.sites = world.attempt(2)
        self.later: list[tuple[str, Reply]] = []
        self.accepted: dict[str, set[str]] = {stage: set() for stage in ANSWERED}
        self.vectors: dict[str, bytes] = {}
        self.lied: set[str] = set()

    def run(self) -> AttemptOutcome | RoundAborted:
        """To the outcome, or to the abort."""
        while True:
            self._stage()
            try:
                state = self.attempt.advance()
            except RoundAborted as abort:
                return abort
            if isinstance(state, AttemptOutcome):
                return state
            self.attempt = state

    def _stage(self) -> None:
        deliveries, self.later = self.later, []
        for site, request in self.attempt.requests().items():
            reply = self.sites.answer(site, request)
            fates = HONEST + FAULTY if self._is_faulty(site) else HONEST
            deliveries += self.draw(st.sampled_from(fates))(self, site, reply)
        random.Random(self.draw(st.integers(0, 2**16))).shuffle(deliveries)
        for site, reply in deliveries:
            self._deliver(site, reply)

    def _is_faulty(self, site: str) -> bool:
        stages = list(ANSWERED)
        since = self.faulty.get(site)
        return since is not None and stages.index(self.attempt.stage) >= stages.index(since)

    def _deliver(self, site: str, reply: Reply) -> None:
        before, stage = self.attempt, self.attempt.stage
        self.attempt = before.receive(site, reply)
        out = site in self.attempt.refusals
        if site not in before.waiting:
            assert self.attempt.waiting == before.waiting
            assert self.attempt.refusals == before.refusals
        elif site not in self.attempt.waiting and not out:
            assert isinstance(reply, ANSWERED[stage])
            self.accepted[stage].add(site)
            if isinstance(reply, MaskReply):
                self.vectors[site] = reply.vector
        assert self.attempt.waiting - {site} == before.waiting - {site}

    def altered(self, site: str, reply: Reply) -> Reply:
        """A lie, as far as this site can tell one."""
        self.lied.add(self.attempt.stage)
        match reply:
            case TrainReply():
                return TrainReply(advert=self.draw(st.sampled_from(self._adverts(site, reply))))
            case ShareReply():
                return self.draw(st.sampled_from(other_shares(site, reply)))
            case MaskReply():
                lengths = (reply.vector[:-1], reply.vector * 2, b"", os.urandom(len(reply.vector)))
                vector = self.draw(st.sampled_from(lengths))
                return MaskReply(context=reply.context, vector=vector)
            case ConfirmReply():
                return self.draw(st.sampled_from(self._confirmations(site, reply)))
            case UnmaskReply():
                return self.draw(st.sampled_from(other_reveals(reply)))
        return reply

    def _adverts(self, site: str, reply: TrainReply) -> list[Signed]:
        advert = decode(reply.advert.statement, KeyAdvert)
        identity = self.sites.identities[site]
        return [
            msgspec.structs.replace(reply.advert, signature=bytes(64)),
            msgspec.structs.replace(reply.advert, statement=b"\xc1"),
            sign(identity, msgspec.structs.replace(advert, mask_key=advert.cipher_key)),
            sign(identity, msgspec.structs.replace(advert, mask_key=bytes(32))),
            sign(identity, msgspec.structs.replace(advert, seed_commitment=bytes(32))),
            sign(identity, msgspec.structs.replace(advert, context=bytes(32))),
        ]

    def _confirmations(self, site: str, reply: ConfirmReply) -> list[ConfirmReply]:
        cohort = self.attempt.header.cohort
        statement = Survivors(context=reply.context, sites=cohort[:2])
        forged = sign(self.sites.identities[site], statement)
        unsigned = msgspec.structs.replace(reply.signature.signed, signature=bytes(64))
        return [
            msgspec.structs.replace(reply, signature=SurvivorSignature(site=name, signed=signed))
            for name, signed in ((site, forged), (site, unsigned), (cohort[0], unsigned))
        ]


def other_shares(site: str, reply: ShareReply) -> list[ShareReply]:
    first, *rest = reply.shares
    garbled = msgspec.structs.replace(first, ciphertext=os.urandom(92))
    swapped = msgspec.structs.replace(first, recipient=site)
    return [
        msgspec.structs.replace(reply, shares=shares)
        for shares in ((garbled, *rest), (swapped, *rest), tuple(rest), (first, *reply.shares))
    ]


def other_reveals(reply: UnmaskReply) -> list[UnmaskReply]:
    wrong = tuple(msgspec.structs.replace(share, share=bytes(32)) for share in reply.shares)
    huge = tuple(msgspec.structs.replace(share, share=b"\xff" * 32) for share in reply.shares)
    kinds = tuple(msgspec.structs.replace(share, kind="mask-key") for share in reply.shares)
    choices = (wrong, wrong, (wrong[0], *reply.shares[1:]), huge, kinds, reply.shares[1:])
    return [msgspec.structs.replace(reply, shares=shares) for shares in choices]


Deliveries = list[tuple[str, Reply]]
Fate = Callable[[Schedule, str, Reply], Deliveries]


def answers(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    return [(site, reply)]


def falls_silent(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    return []


def refuses(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    return [(site, Refusal(check="policy"))]


def is_heard_twice(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    return [(site, reply), (site, reply)]


def lies(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    return [(site, schedule.altered(site, reply))]


def says_two_things(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    return [(site, reply), (site, schedule.altered(site, reply))]


def is_late(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    schedule.later.append((site, reply))
    return []


def is_heard_again_later(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    schedule.later.append((site, reply))
    return [(site, reply)]


def speaks_in_anothers_name(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    """A seal keeps others from it, so these two must be in league."""
    schedule.lied.add(schedule.attempt.stage)
    return [(schedule.draw(st.sampled_from(sorted(schedule.faulty))), reply)]


def is_heard_from_another_attempt(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    stage = schedule.draw(st.sampled_from(list(ANSWERED)))
    return [(site, schedule.world.old[stage][site]), (site, reply)]


def is_unknown(schedule: Schedule, site: str, reply: Reply) -> Deliveries:
    return [("site-99", reply), (site, reply)]


HONEST: tuple[Fate, ...] = (
    answers,
    is_heard_twice,
    is_heard_again_later,
    is_heard_from_another_attempt,
    is_unknown,
)
FAULTY: tuple[Fate, ...] = (
    falls_silent,
    refuses,
    lies,
    says_two_things,
    is_late,
    speaks_in_anothers_name,
)


@pytest.fixture(scope="module")
def worlds() -> dict[tuple[int, int, int], World]:
    """Made once each: by size, threshold and ring."""
    return {}


@pytest.mark.parametrize("examples", [60, pytest.param(400, marks=pytest.mark.full)])
def test_a_schedule_ends_with_the_exact_sum_of_what_was_accepted_or_with_an_abort(
    make_plan: MakePlan,
    make_federation: MakeFederation,
    worlds: dict[tuple[int, int, int], World],
    examples: int,
) -> None:
    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(size=st.integers(3, 6), ring_bits=st.sampled_from([16, 32]), data=st.data())
    def holds(size: int, ring_bits: int, data: st.DataObject) -> None:
        threshold = data.draw(st.integers(size // 2 + 1, size))
        if (size, threshold, ring_bits) not in worlds:
            plan = make_plan(
                aggregation=Aggregation(
                    threshold=threshold, clip_range=1.0, step=0.01, ring_bits=ring_bits
                )
            )
            worlds[size, threshold, ring_bits] = World(plan, make_federation(size))
        world = worlds[size, threshold, ring_bits]
        spare = size - threshold
        faulty = data.draw(
            st.dictionaries(
                st.sampled_from(sorted(world.identities)),
                st.sampled_from(list(ANSWERED)),
                max_size=spare + 1,
            )
        )
        schedule = Schedule(world, data, faulty)
        end = schedule.run()
        accepted = schedule.accepted
        if isinstance(end, RoundAborted):
            event(end.check)
            stage = schedule.attempt.stage
            # A garbled share costs the peer that cannot open it its place; a wrong one hides a key.
            assert len(faulty) > spare or schedule.lied & {"train", "share", "unmask"}
            if end.check == TOO_FEW[stage]:
                assert len(accepted[stage]) < threshold
            else:
                assert end.check in ("seed-commitment", "mask-key")
                assert stage == "unmask"
                # Only a lie about a secret, as it was shared or as it was revealed, makes it so.
                assert schedule.lied & {"train", "share", "unmask"}
            return
        event("sum")
        aggregate = end.aggregate
        assert (
            aggregate.survivors
            == tuple(sorted(accepted["mask"]))
            == tuple(sorted(schedule.vectors))
        )
        assert all(len(sites) >= threshold for sites in accepted.values())
        sites = schedule.sites
        expected = np.zeros(LENGTH, aggregate.total.dtype)
        for site in aggregate.survivors:
            sent = np.frombuffer(schedule.vectors[site], expected.dtype)
            if "mask" not in schedule.lied:
                assert (sent - sites.masks[site] == sites.vectors[site]).all()
            expected += sent - sites.masks[site]
        assert aggregate.total.tobytes() == expected.tobytes()
        assert [c.site for c in end.evidence.confirmations] == sorted(accepted["confirm"])[
            :threshold
        ]

    holds()


@pytest.mark.parametrize("examples", [20, pytest.param(60, marks=pytest.mark.full)])
def test_what_a_network_does_to_honest_sites_costs_nobody_a_place(
    make_plan: MakePlan, make_federation: MakeFederation, examples: int
) -> None:
    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(size=st.integers(3, 6), data=st.data())
    def holds(size: int, data: st.DataObject) -> None:
        plan = make_plan(aggregation=Aggregation(threshold=size, clip_range=1.0, step=0.01))
        schedule = Schedule(World(plan, make_federation(size)), data, faulty={})
        end = schedule.run()
        assert isinstance(end, AttemptOutcome)
        assert end.aggregate.survivors == schedule.attempt.header.cohort
        assert schedule.attempt.refusals == {}

    holds()
