"""Attempts of distributed mode at a real site: interrupted, repeated, and one too many.

`test_retries` makes the same attacks on a ledger alone.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adversarial.federation import Federation
from support.shared_noise_plans import shared_noise_plan
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import machine_register
from umbel_client.ledger.rows import Attempt, RoundState
from umbel_client.privacy.discrete_gaussian import DiscreteGaussian
from umbel_client.privacy.noise import NoiseSource
from umbel_client.storage.journal import Journal
from umbel_client.storage.noisy_sums import NoisySums
from umbel_client.training.round import LocalTrainer
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import LastAdvert, TrainReply
from umbel_common.trust.identity import sign

SITE = "site-00"
MOST = 3
POLICY = "max_shared_epsilon = 1.0\ntotal_shared_epsilon = 2.0"


class Killed(BaseException):
    """The process ended here: nothing that it would have done afterwards happens."""


@pytest.fixture
def federation(open_federation: Callable[..., Federation]) -> Federation:
    """Three real sites; the first has accepted a plan of three attempts."""
    federation = open_federation(3, {"*": POLICY})
    federation.plan = shared_noise_plan(
        federation.plan,
        delta=1e-4,
        honest=2,
        least_survivors=3,
        sampling_rate=0.5,
        attempts=MOST,
    )
    federation.offer(None, SITE)
    return federation


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rounds for which a site drew a batch, one for each draw."""
    rounds: list[int] = []
    compute = LocalTrainer.noisy_sum

    def noted(self: LocalTrainer, number: int, *arguments: Any) -> Any:
        rounds.append(number)
        return compute(self, number, *arguments)

    monkeypatch.setattr(LocalTrainer, "noisy_sum", noted)
    return rounds


def charged(federation: Federation, site: str = SITE) -> list[Attempt]:
    path = federation.folder / site / "state" / "ledger.sqlite"
    return list(read_ledger(path).attempts.values())


def stored(federation: Federation, attempt: Attempt, site: str = SITE) -> np.ndarray:
    folder = federation.folder / site / "state" / "deltas" / federation.plan.job
    assert attempt.vector is not None
    return NoisySums(folder).load(attempt.round, attempt.attempt, attempt.vector)[1]


def ask(federation: Federation, header: RoundHeader) -> Any:
    return federation.ask(SITE, federation.train_request(header))


def kill_at(federation: Federation, owner: type, name: str, action: Callable[[], object]) -> None:
    """Ends a site's process where it would call a method, and starts it again."""

    def killed(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            action()
        federation.start(SITE)


def test_what_was_reserved_and_lost_stays_charged_and_is_never_computed_again(
    federation: Federation, computed: list[int]
) -> None:
    first, second = federation.header(attempt=1), federation.header(attempt=2)
    kill_at(federation, Ledger, "record_vector", lambda: ask(federation, first))
    assert federation.refusal(SITE, federation.train_request(first)) == "attempt-lost"
    assert [one.state for one in charged(federation)] == [RoundState.RESERVED]
    assert len(computed) == 1
    assert isinstance(ask(federation, second), TrainReply)
    assert [one.state for one in charged(federation)] == [RoundState.RESERVED, RoundState.COMPUTED]
    assert len(computed) == 2


def test_what_was_computed_leaves_in_its_attempt_and_is_not_drawn_again(
    federation: Federation, computed: list[int]
) -> None:
    header = federation.header()
    kill_at(federation, Journal, "open_attempt", lambda: ask(federation, header))
    (lost,) = charged(federation)
    assert isinstance(ask(federation, header), TrainReply)
    assert charged(federation) == [lost]
    assert (lost.state, len(computed)) == (RoundState.COMPUTED, 1)


def test_a_sum_that_is_gone_is_lost_and_the_site_takes_part_in_the_next_attempt(
    federation: Federation, computed: list[int]
) -> None:
    header = federation.header()
    kill_at(federation, Journal, "open_attempt", lambda: ask(federation, header))
    (kept,) = (federation.folder / SITE / "state" / "deltas" / "job").glob("*.sum")
    kept.unlink()
    assert federation.refusal(SITE, federation.train_request(header)) == "attempt-lost"
    assert len(computed) == 1
    assert isinstance(ask(federation, federation.header(attempt=2)), TrainReply)
    assert [len(charged(federation)), len(computed)] == [2, 2]


def test_what_was_sent_is_sent_again_and_the_sum_holds_it_once(
    federation: Federation, computed: list[int]
) -> None:
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    requests = attempt.requests()
    kill_at(federation, Journal, "record_answer", lambda: federation.ask(SITE, requests[SITE]))
    (sent,) = charged(federation)
    assert sent.state is RoundState.SENT
    outcome = federation.drive(attempt)
    sites = list(federation.identities)
    expected = sum(stored(federation, charged(federation, site)[0], site) for site in sites)
    total = outcome.aggregate.total
    assert total[0] == len(sites)
    assert np.array_equal(total[1:], np.asarray(expected).astype(total.dtype))
    assert len(computed) == len(sites)


@pytest.mark.parametrize("kept", [False, True], ids=["drawn", "kept"])
def test_a_retry_has_a_batch_and_noise_of_its_own(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """A site that keeps its batch is seen where noise is taken away: both sums are the same."""
    if kept:
        batches: list[Any] = []
        draw = NoiseSource.poisson_batch

        def cached(self: NoiseSource, *arguments: Any) -> Any:
            batches.append(batches[0] if batches else draw(self, *arguments))
            return batches[-1]

        monkeypatch.setattr(NoiseSource, "poisson_batch", cached)
    attempts = [federation.header(attempt=number) for number in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiscreteGaussian, "fill", lambda _, draws: draws.fill(0))
        for header in attempts:
            ask(federation, header)
    first, second = (stored(federation, one) for one in charged(federation))
    assert np.array_equal(first, second) == kept
    assert len(charged(federation)) == 2


def test_no_attempt_past_the_plans_most_looks_at_a_record(
    federation: Federation, computed: list[int]
) -> None:
    for number in range(1, MOST + 1):
        ask(federation, federation.header(attempt=number))
    past = federation.train_request(federation.header(attempt=MOST + 1))
    assert federation.refusal(SITE, past) == "budget"
    assert len(charged(federation)) == len(computed) == MOST


def test_a_policy_that_was_tightened_is_asked_before_each_attempt(
    federation: Federation, computed: list[int]
) -> None:
    ask(federation, federation.header(attempt=1))
    path: Path = federation.folder / SITE / "client.toml"
    allowed = path.read_text()
    again = federation.train_request(federation.header(attempt=2))
    for before, after, check in (
        ("max_shared_epsilon = 1.0", "", "distributed-not-allowed"),
        ("max_epsilon = 8.0", "max_epsilon = 1.1", "epsilon-too-large"),
    ):
        path.write_text(allowed.replace(f"\n{before}", f"\n{after}"))
        federation.start(SITE)
        assert federation.refusal(SITE, again) == check
    assert len(charged(federation)) == len(computed) == 1


def test_a_machine_that_was_put_back_repeats_no_attempt(
    federation: Federation, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server shows the site its last advert, whose ledger head the old copy does not know."""
    state = federation.folder / SITE / "state"
    places = {"state": state, "ledgers": machine_register().folder}
    federation.trainers[SITE].close()
    for name, folder in places.items():
        shutil.copytree(folder, federation.folder / "copy" / name)
    federation.start(SITE)
    header = federation.header(attempt=1)
    reply = ask(federation, header)
    last = LastAdvert(header=sign(federation.operator, header), advert=reply.advert)
    federation.trainers[SITE].close()
    for name, folder in places.items():
        shutil.rmtree(folder)
        shutil.copytree(federation.folder / "copy" / name, folder)
    federation.start(SITE)
    again = federation.showing(federation.header(attempt=1), last)
    assert federation.refusal(SITE, again) == "ledger-rolled-back"
    assert charged(federation) == []
    federation.trainers[SITE].close()
    monkeypatch.chdir(federation.folder / SITE)
    line = "budget state-spend --by weber --why snapshot --rounds job=1 --attempts job=1"
    done = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    assert "job came to round 1, with 1 attempts more" in " ".join(done.stdout.split())
    federation.start(SITE)
    for number in (1, 2):
        request = federation.showing(federation.header(attempt=number), last)
        assert federation.refusal(SITE, request) == "site-fault"
        assert "closed when its spend was stated" in federation.observers[SITE].errors[-1].message
    assert len(computed) == 1
    contents = read_ledger(state / "ledger.sqlite")
    assert (contents.jobs["job"].count, contents.jobs["job"].closed) == (1, 1)
