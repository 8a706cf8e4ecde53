"""Both state machines of an attempt, wired together in memory; tests stop them at any stage."""

import os
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from umbel_common.canonical import decode, encode
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg import coordinator, participant
from umbel_common.secagg.messages import preparation_of
from umbel_common.secagg.participant import AttemptState
from umbel_common.secagg.preparation import prepare
from umbel_common.secagg.preparing import Preparing
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, Member, Roster

STAGES = ("advertise", "share", "mask", "confirm", "reveal")


@cache
def identity_of(name: str) -> Identity:
    return Identity.generate(os.urandom)


class Attempt:
    """An honest attempt. Each state is encoded and decoded between stages, as by a journal."""

    def __init__(
        self,
        size: int,
        threshold: int,
        *,
        vectors: Mapping[str, Any] | None = None,
        ring_bits: int = 32,
        length: int = 3,
        colluding: int = 0,
        minimum_cohort: int = 2,
        prepared: bool = False,
    ) -> None:
        names = tuple(f"site-{index:02}" for index in range(size))
        self.identities = {name: identity_of(name) for name in names}
        self.roster = Roster(
            federation="clinics",
            operator=identity_of("operator").public_key,
            members=tuple(
                Member(name=name, public_key=identity.public_key)
                for name, identity in self.identities.items()
            ),
        )
        self.header = RoundHeader(
            federation="clinics",
            job="job",
            round=1,
            attempt=1,
            plan=bytes(32),
            roster=self.roster.digest(),
            adapter=bytes(32),
            cohort=names,
        )
        self.context = self.header.context()
        self.rules = Rules(threshold=threshold, colluding=colluding, minimum_cohort=minimum_cohort)
        generator = np.random.default_rng(size)
        self.vectors = vectors or {
            name: generator.integers(0, 2**ring_bits, length).astype(f"<u{ring_bits // 8}")
            for name in names
        }
        self.states: dict[str, Any] = {}
        self.slots: dict[str, Any] = {}
        self.prepared = self.prepare() if prepared else None
        self.share_context = self.context
        if self.prepared is not None:
            self.share_context = self.prepared.preparation.context()
        self.machine: Any = coordinator.open_attempt(
            self.header, self.roster, threshold, ring_bits, length, prepared=self.prepared
        )
        self.stage = "advertise"

    def prepare(self) -> Any:
        """The keys and shares of the whole cohort for this attempt."""
        machine: Any = self.begin_to_prepare()
        for site, slot in self.slots.items():
            self.slots[site], shares = slot.fill(machine.signed, self.roster, os.urandom)
            machine = machine.receive(site, shares)
        return machine.close()

    def begin_to_prepare(self) -> Any:
        """The machine that waits for shares; the keys of each site are out."""
        for_attempt = preparation_of(self.header)
        machine: Any = Preparing(for_attempt, self.roster)
        for site in self.header.cohort:
            self.slots[site], keys = prepare(
                for_attempt, site, self.rules, self.identities[site], os.urandom
            )
            machine = machine.receive(site, keys)
        return machine.close()

    def requests(self) -> dict[str, Any]:
        """The coordinator's requests in this stage."""
        if self.stage == "advertise":
            return dict.fromkeys(self.header.cohort, self.header)
        requests: dict[str, Any] = self.machine.requests()
        if isinstance(self.machine, coordinator.Masking) and self.machine.unseen is not None:
            return {site: (self.machine.unseen, shares) for site, shares in requests.items()}
        return requests

    def answer(self, site: str, request: Any) -> Any:
        """The answer of a site, whose state advances."""
        if isinstance(request, RoundHeader) and site in self.slots:
            slot = self.slots.pop(site)
            state, payload = slot.advertise(request, self.identities[site], bytes(32))
        elif isinstance(request, RoundHeader):
            state, payload = participant.advertise(
                request, site, self.rules, self.identities[site], bytes(32), os.urandom
            )
        else:
            state, payload = self.receive(site, request)
        self.states[site] = decode(encode(state), AttemptState)
        return payload

    def receive(self, site: str, request: Any) -> Any:
        """A site's next state and answer; the site stays as it is."""
        state = self.states[site]
        match state:
            case participant.Advertised():
                again = self.machine.again
                return state.receive(request, self.roster, os.urandom, again=again)
            case participant.Prepared() if self.stage == "share":
                return state.advertised.receive(request, self.roster, os.urandom, again=True)
            case participant.Prepared():
                vector = self.vectors[site].copy()
                state, vector = state.receive(*request, self.roster, vector)
                return state, vector.tobytes()
            case participant.Shared():
                state, vector = state.receive(request, self.vectors[site].copy())
                return state, vector.tobytes()
            case participant.Masked():
                return state.receive(request, self.identities[site])
            case participant.Confirmed():
                return state.receive(request, self.roster)

    def collect(self, silent: Collection[str] = ()) -> None:
        """Lets every site but the silent ones answer the present stage."""
        for site, request in self.requests().items():
            if site not in silent:
                self.machine = self.machine.receive(site, self.answer(site, request))

    def close(self) -> Any:
        """Closes the stage; after the last one, the aggregate."""
        self.machine = self.machine.close()
        following = (*STAGES[1:], "end")
        self.stage = following[STAGES.index(self.stage)]
        if isinstance(self.machine, coordinator.Masking):
            # A prepared attempt has no stage of sharing.
            self.stage = "mask"
        return self.machine

    def run_to(self, stage: str, silent: Mapping[str, Collection[str]] | None = None) -> "Attempt":
        """Runs the stages before `stage`; `silent`: stage -> sites that do not answer it."""
        while self.stage != stage:
            self.collect((silent or {}).get(self.stage, ()))
            self.close()
        return self

    def plain_sum(self, sites: Collection[str]) -> Any:
        """The sum in the ring of the vectors of `sites`, in plaintext."""
        total = np.zeros_like(next(iter(self.vectors.values())))
        for site in sites:
            total += self.vectors[site]
        return total


@pytest.fixture(scope="session")
def make_attempt() -> Callable[..., Attempt]:
    """Makes an honest attempt with a number of sites and a threshold."""
    return Attempt
