"""A site that dies anywhere between charging a round and sending it, and its ledger afterwards.

The server plays all peers, so it can open every masked vector that leaves the site.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from adversarial import training_steps
from adversarial.federation import Federation, moved
from adversarial.killable_site import PUBLIC_SIZE, SITE, KillableSite
from adversarial.site_process import Prepare

from umbel_client.ledger.contents import Contents
from umbel_client.ledger.file import read_ledger
from umbel_client.storage.deltas import DeltaCache
from umbel_common.adapters.vector import adapter_digest
from umbel_common.plans.plan import Sgd, Training
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    MaskRequest,
    OfferRequest,
    Refusal,
    ShareRequest,
    TrainRequest,
)
from umbel_common.secagg.encoding import RingVector
from umbel_common.trust.identity import sign

KILLS = 50
"""Number of kills of a site under an honest server, and of one under a dishonest server."""
ATTEMPTS = 2
ROUNDS = 100
MOST_STEPS = 30


@pytest.fixture
def federation(open_federation: Callable[..., Federation]) -> Federation:
    """Four sites, one of them real; the server plays the others with their own keys."""
    training = Training(
        rounds=ROUNDS,
        local_steps=2,
        expected_batch_size=PUBLIC_SIZE,
        optimizer=Sgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
    )
    federation = open_federation(4, training=training)
    for trainer in federation.trainers.values():
        trainer.close()
    federation.trainers.clear()
    federation.play("site-01", "site-02", "site-03", own_keys=True)
    return federation


@pytest.fixture
def start(federation: Federation) -> Iterator[Callable[..., KillableSite]]:
    """Starts the site as a process that a function prepares."""
    started: list[KillableSite] = []

    def make(prepare: Prepare) -> KillableSite:
        site = KillableSite(federation, random.Random(7), most_steps=MOST_STEPS, prepare=prepare)
        started.append(site)
        return site

    yield make
    for site in started:
        site.stop()


class Witness:
    """Sees everything that leaves the site, reads its ledger, and fails if the two disagree."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.folder = federation.folder / SITE
        self.recorded: dict[int, bytes] = {}
        self.released: dict[int, list[RingVector]] = defaultdict(list)

    def ledger(self) -> Contents:
        path = self.folder / "state" / "ledger.sqlite"
        return read_ledger(path) if path.exists() else Contents()

    def look(self) -> None:
        """Checks that every gradient is charged and that no recorded delta changes."""
        rounds = {number: entry for (_, number), entry in self.ledger().rounds.items()}
        log = self.folder / training_steps.GRADIENTS
        used = set(map(int, log.read_text().split())) if log.exists() else set()
        assert used <= rounds.keys(), "a gradient was not charged"
        recorded = {
            number: entry.delta_digest
            for number, entry in rounds.items()
            if entry.delta_digest is not None
        }
        assert self.recorded.items() <= recorded.items(), "another delta was recorded"
        self.recorded = recorded

    def release(self, number: int, opened: RingVector) -> None:
        """Checks that a released delta is the one in the ledger for its round, up to rounding."""
        self.look()
        assert number in self.recorded, "a delta left that was not recorded"
        deltas = DeltaCache(self.folder / "state" / "deltas" / self.federation.plan.job)
        _, delta, _ = deltas.load(number, self.recorded[number])
        step = self.federation.plan.aggregation.step
        error = opened.view(np.int32)[1:] * step - np.clip(delta, -1, 1).astype(np.float64)
        assert np.abs(error).max() <= 1.001 * step, "what left is not what was recorded"
        for former in self.released[number]:
            apart = (opened - former).view(np.int32)
            assert np.abs(apart).max() <= 1, "a second release with other noise"
        self.released[number].append(opened)


def until_answered(
    site: KillableSite, witness: Witness, stage: str, choices: list[Any]
) -> tuple[Any, Any]:
    """The request that the site answered, and its answer; after a kill the server chooses again."""
    while True:
        request = site.chance.choice(choices)
        reply = site.ask(stage, request)
        witness.look()
        if reply is not None:
            return request, reply


def others(federation: Federation, request: Any, header: RoundHeader) -> list[Any]:
    """The requests that a dishonest server may send in the place of a request."""
    match request:
        case TrainRequest():
            smaller = msgspec.structs.replace(header, cohort=header.cohort[:3])
            elsewhere = header_of(federation, header.round, header.attempt, shift=0.5)
            return [
                msgspec.structs.replace(request, header=sign(federation.operator, smaller)),
                federation.train_request(elsewhere),
            ]
        case ShareRequest():
            return [msgspec.structs.replace(request, adverts=request.adverts[:3])]
        case MaskRequest():
            return [msgspec.structs.replace(request, shares=request.shares[:2])]
    raise AssertionError(request)


def header_of(federation: Federation, number: int, attempt: int, shift: float = 0.0) -> RoundHeader:
    """The header of an attempt at a round, which starts from an adapter of its own."""
    vector = moved(federation.plan, 0.1 * (number - 1 + shift))
    digest = adapter_digest(federation.plan.digest(), vector)
    federation.releases[digest] = federation.release(vector, round=number - 1)
    return federation.header(round=number, attempt=attempt, adapter=digest)


def try_round(
    site: KillableSite, witness: Witness, number: int, attempt_number: int, honest: bool
) -> None:
    """Runs one attempt; if it gives a masked vector, the server opens it."""
    federation = witness.federation
    header = header_of(federation, number, attempt_number)
    attempt = federation.attempt(header)
    while attempt.stage != "confirm":
        requests = attempt.requests()
        request = requests.pop(SITE)
        choices = [request] * 4
        if not honest:
            choices += others(federation, request, header)
        asked, reply = until_answered(site, witness, attempt.stage, choices)
        if asked is not request or isinstance(reply, Refusal):
            assert not honest, reply
            return
        replies = {peer: federation.ask(peer, ask) for peer, ask in requests.items()}
        attempt = federation.take(attempt, {SITE: reply, **replies})
    witness.release(number, federation.drive(attempt, silent=SITE).aggregate.total)


def run(site: KillableSite, witness: Witness, honest: bool) -> None:
    """Runs rounds, each in several attempts, until the site was killed often enough."""
    federation = witness.federation
    offer = OfferRequest(plan=sign(federation.operator, federation.plan))
    until_answered(site, witness, "offer", [offer])
    for number in range(1, ROUNDS + 1):
        for attempt in range(1, ATTEMPTS + 1):
            if site.killed_at.total() >= KILLS:
                return
            try_round(site, witness, number, attempt, honest)
    raise AssertionError(f"only {site.killed_at.total()} kills")


@pytest.mark.soak
@pytest.mark.parametrize("honest", [True, False], ids=["honest", "dishonest"])
def test_a_site_that_dies_anywhere_releases_one_delta_for_each_round_that_it_charged(
    federation: Federation, start: Callable[..., KillableSite], honest: bool
) -> None:
    site, witness = start(training_steps.every_step), Witness(federation)
    run(site, witness, honest)
    died_before = {what for _, what in site.killed_at}
    assert died_before >= {"gradient", "answer"}
    assert len(died_before & {"file fsync", "rename", "folder fsync"}) >= 2
    assert any(len(releases) > 1 for releases in witness.released.values())
    assert witness.released.keys() <= {number for _, number in witness.ledger().rounds}


@pytest.mark.parametrize(
    ("fault", "noticed"),
    [
        (training_steps.recorded_in_memory_only, "a delta left that was not recorded"),
        (training_steps.fresh_noise_after_each_start, "what left is not what was recorded"),
        (training_steps.charged_after_training, "a gradient was not charged"),
    ],
)
def test_a_faulty_site_is_found_out(
    federation: Federation,
    start: Callable[..., KillableSite],
    fault: Prepare,
    noticed: str,
) -> None:
    site, witness = start(fault), Witness(federation)
    with pytest.raises(AssertionError, match=noticed):
        run(site, witness, honest=False)
