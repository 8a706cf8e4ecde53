"""The law of an attempt in distributed mode: its order, and what a crash or a failure leaves."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from adversarial.site_process import Quiet
from support.shared_noise_plans import shared_noise_plan
from support.small_models import one_round, plan_for

from umbel_client.data.site_data import SiteData
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import Register
from umbel_client.ledger.rows import AttemptKey, RoundState
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.site.config import ClientConfig, DataConfig, ModelConfig
from umbel_client.site.policy import Policy
from umbel_client.storage.journal import Published
from umbel_client.storage.noisy_sums import NoisySums
from umbel_client.trainer import distributed_job
from umbel_client.trainer.distributed_job import DistributedJob, failed_digest
from umbel_client.trainer.job import SiteJob
from umbel_client.trainer.opening import open_job
from umbel_client.training import answer_time
from umbel_common.adapters.vector import adapter_digest, initial_vector
from umbel_common.errors import (
    BudgetError,
    LedgerError,
    ModelError,
    RemoteProtocolError,
    StorageError,
)
from umbel_common.plans.plan import COUNTS, Classification, ScoreEvaluation, TrainingPlan
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.encoding import signed_part
from umbel_common.secagg.sums import counts_in, read_sum

pytestmark = pytest.mark.usefixtures("shared_proofs")

SITES = ("east", "north", "west")
ATTEMPTS = 4
DELTA = 1e-5


class Killed(BaseException):
    """Ends what runs, as the end of the process would: nothing of ours catches it."""


def shared_plan(model: Path, *, evaluation: ScoreEvaluation | None = None) -> TrainingPlan:
    """A plan of two rounds and four attempts, whose batches have every record."""
    plan = plan_for(model, Classification(labels=("a", "b")), training=one_round(12))
    training = msgspec.structs.replace(plan.training, rounds=2)
    plan = msgspec.structs.replace(plan, training=training)
    return shared_noise_plan(
        plan,
        sampling_rate=1.0,
        attempts=ATTEMPTS,
        evaluation=evaluation,
        least_survivors=3,
    )


@pytest.fixture(scope="module")
def plan(tiny_model: Path) -> TrainingPlan:
    return shared_plan(tiny_model)


Open = Callable[..., DistributedJob]


@pytest.fixture
def opened(tmp_path: Path, tiny_model: Path, plan: TrainingPlan) -> Iterator[Open]:
    """Opens the job of a site, or opens it again from its disk; the one before is closed."""
    jobs: list[SiteJob] = []

    def open_site(
        site: str = "north", *, plan: TrainingPlan = plan, public_size: int = 12, **settings: Any
    ) -> DistributedJob:
        for job in jobs:
            job.close()
        jobs.clear()
        folder = tmp_path / site
        (folder / "state").mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{site} w{number}", "label": "ab"[number % 2]} for number in range(12)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = ClientConfig(
            site=site,
            state=str(folder / "state"),
            identity="identity.pem",
            roster="roster.json",
            data=DataConfig(
                path=str(folder / "data.jsonl"), public_size=public_size, evaluation_share=0.25
            ),
            model=ModelConfig(path=str(tiny_model)),
            policy=Policy(
                total_epsilon=1000.0,
                max_shared_epsilon=10.0,
                total_shared_epsilon=100.0,
                labels=("a", "b"),
            ),
            physical_batch_size=4,
            **settings,
        )
        roster: Any = None
        job = open_job(
            config,
            plan,
            roster,
            SiteData.load(config),
            register=Register(folder / "ledgers"),
            published=Published(ledger_head=None, answers=0),
            observer=Quiet(),
            entropy=os.urandom,
        )
        assert isinstance(job, DistributedJob)
        jobs.append(job)
        return job

    yield open_site
    for job in jobs:
        job.close()


def header_of(plan: TrainingPlan, *, round_number: int = 1, attempt: int = 1) -> RoundHeader:
    return RoundHeader(
        federation=plan.federation,
        job=plan.job,
        round=round_number,
        attempt=attempt,
        plan=plan.digest(),
        roster=bytes(32),
        adapter=adapter_digest(plan.digest(), initial_vector(plan)),
        cohort=SITES,
    )


def key_of(header: RoundHeader) -> AttemptKey:
    return AttemptKey(header.job, header.round, header.attempt)


def compute(job: DistributedJob, header: RoundHeader) -> Any:
    """What leaves in an attempt."""
    job.compute(header, initial_vector(job.plan))
    return job.ring_vector(header)


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[AttemptKey]:
    """The attempts for which a batch was drawn, in order."""
    drawn: list[AttemptKey] = []
    noisy_sum, reserve = DistributedJob.noisy_sum, DistributedJob.reserve
    reserved: list[AttemptKey] = []

    def noting(self: DistributedJob, key: AttemptKey) -> None:
        reserved.append(key)
        reserve(self, key)

    def drawing(self: DistributedJob, *arguments: Any) -> Any:
        drawn.append(reserved[-1])
        return noisy_sum(self, *arguments)

    monkeypatch.setattr(DistributedJob, "reserve", noting)
    monkeypatch.setattr(DistributedJob, "noisy_sum", drawing)
    return drawn


LAW = ("check", "reserve", "prepare", "noisy_sum", "store", "record", "ring_vector")


def test_an_attempt_goes_through_its_steps_in_their_order(
    opened: Open, plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, taken = header_of(plan), []
    job = opened()

    def noting(name: str, step: Callable[..., object]) -> Callable[..., object]:
        def noted(self: DistributedJob, *arguments: object) -> object:
            known = self._ledger.attempt(key_of(header))
            taken.append((name, None if known is None else known.state))
            return step(self, *arguments)

        return noted

    for name in LAW:
        monkeypatch.setattr(DistributedJob, name, noting(name, getattr(DistributedJob, name)))
    compute(job, header)
    job.record_sent(header)
    reserved, computed = RoundState.RESERVED, RoundState.COMPUTED
    assert taken == [
        ("check", None),
        ("reserve", None),
        *((name, reserved) for name in ("prepare", "noisy_sum", "store", "record")),
        ("ring_vector", computed),
    ]
    known = job._ledger.attempt(key_of(header))
    assert known is not None
    assert known.state == RoundState.SENT


def test_an_attempt_that_is_asked_for_again_sends_the_same_vector(
    opened: Open, plan: TrainingPlan, computations: list[AttemptKey]
) -> None:
    header = header_of(plan)
    first = compute(opened(), header)
    assert np.array_equal(compute(opened(), header), first)
    again = header_of(plan, attempt=2)
    assert not np.array_equal(compute(opened(), again), first)
    assert computations == [key_of(header), key_of(again)]


def dying(step: str, *, after: bool) -> Callable[..., object]:
    """A step that is the last thing that a process does, or the one before it."""
    sound = getattr(DistributedJob, step)

    def dies(*arguments: object) -> None:
        if after:
            sound(*arguments)
        raise Killed

    return dies


AT_LEAST = (("reserve", True), ("store", True), ("record", True))
"""The places between which a ledger and a disk say something else; all are in the full suite."""
PLACES = [(step, after) for step in LAW[1:-1] for after in (False, True)]


@pytest.mark.parametrize(
    ("step", "after"),
    [
        pytest.param(
            *place,
            id=f"{'after' if place[1] else 'before'} {place[0]}",
            marks=() if place in AT_LEAST else pytest.mark.full,
        )
        for place in PLACES
    ],
)
def test_a_site_that_dies_between_two_steps_never_computes_an_attempt_twice(
    opened: Open,
    plan: TrainingPlan,
    computations: list[AttemptKey],
    step: str,
    after: bool,
) -> None:
    header, again = header_of(plan), header_of(plan, attempt=2)
    job = opened()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedJob, step, dying(step, after=after))
        with pytest.raises(Killed):
            compute(job, header)
    if (step, after) == ("reserve", False):
        # Nothing was charged, and nothing computed.
        assert opened()._ledger.attempt(key_of(header)) is None
        return
    job = opened()
    before = list(computations)
    if (step, after) == ("record", True):
        vector = compute(job, header)
    else:
        for _ in range(2):
            with pytest.raises(RemoteProtocolError) as caught:
                compute(job, header)
            assert caught.value.check == "attempt-lost"
        vector = None
    assert computations == before
    assert computations.count(key_of(header)) <= 1
    # It stays charged, and the site takes part in the next attempt, with another vector.
    known = job._ledger.attempt(key_of(header))
    assert known is not None
    other = compute(job, again)
    assert vector is None or not np.array_equal(vector, other)
    cost = job._cost
    assert job._ledger.shared_spent(DELTA) == epsilon([cost.shared] * 2, DELTA)
    assert job._ledger.spent(DELTA) == epsilon([cost.everybody] * 2, DELTA)


def test_without_the_check_the_ledger_still_takes_an_attempt_once(
    opened: Open,
    plan: TrainingPlan,
    computations: list[AttemptKey],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And without both, one charge has two batches: the attack of `test_retries`."""
    header = header_of(plan)
    job = opened()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedJob, "store", dying("store", after=False))
        with pytest.raises(Killed):
            compute(job, header)
    monkeypatch.setattr(distributed_job, "require", lambda *_: None)
    job = opened()
    with pytest.raises(LedgerError, match="not computed again"):
        compute(job, header)
    assert computations == [key_of(header)]
    monkeypatch.setattr(
        Ledger, "reserve_attempt", lambda self, key, *_: self._begun.add(key) or self
    )
    compute(job, header)
    assert computations == [key_of(header)] * 2
    assert job._ledger.shared_spent(DELTA) == epsilon([job._cost.shared], DELTA)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("prepare", marks=pytest.mark.full),
        "noisy_sum",
        pytest.param("store", marks=pytest.mark.full),
    ],
)
def test_a_failure_is_recorded_and_the_site_sits_its_round_out(
    opened: Open,
    plan: TrainingPlan,
    computations: list[AttemptKey],
    step: str,
) -> None:
    header, again = header_of(plan), header_of(plan, attempt=2)
    job = opened()

    def fail(*_: object) -> None:
        raise ModelError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedJob, step, fail)
        with pytest.raises(ModelError, match="no"):
            compute(job, header)
    known = job._ledger.attempt(key_of(header))
    assert known is not None
    assert known.vector == failed_digest(key_of(header))
    drawn = list(computations)
    for site in (job, opened()):
        for later in (header, again):
            with pytest.raises(LedgerError, match="its round is not tried again"):
                compute(site, later)
    assert computations == drawn
    compute(site, header_of(plan, round_number=2))


@pytest.mark.parametrize("kept", [False, True], ids=["forgotten", "kept"])
def test_a_failure_that_cannot_be_recorded_is_not_forgotten(
    opened: Open,
    plan: TrainingPlan,
    computations: list[AttemptKey],
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
) -> None:
    header, again = header_of(plan), header_of(plan, attempt=2)
    job = opened()

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as disk:
        disk.setattr(DistributedJob, "store", full)
        disk.setattr(Ledger, "record_vector", full)
        with pytest.raises(StorageError):
            compute(job, header)
    if not kept:
        job._spoiled.clear()
        compute(job, again)
    else:
        with pytest.raises(LedgerError, match="its round is not tried again"):
            compute(job, again)
    assert len(computations) == (1 if kept else 2)


def test_a_vector_of_another_adapter_is_not_sent(opened: Open, plan: TrainingPlan) -> None:
    header = header_of(plan)
    job = opened()
    compute(job, header)
    other = msgspec.structs.replace(header, adapter=b"a" * 32)
    with pytest.raises(RemoteProtocolError) as caught:
        job.compute(other, initial_vector(plan))
    assert caught.value.check == "other-adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_job, "require", lambda *_: None)
        job.compute(other, initial_vector(plan))


def test_a_sum_whose_file_is_gone_is_a_lost_attempt(
    opened: Open, plan: TrainingPlan, computations: list[AttemptKey]
) -> None:
    header, again = header_of(plan), header_of(plan, attempt=2)
    job = opened()
    compute(job, header)
    (job._config.state_folder.deltas(plan.job) / "00001-00001.sum").unlink()
    for asked in (lambda: compute(job, header), lambda: job.ring_vector(header)):
        with pytest.raises(RemoteProtocolError) as caught:
            asked()
        assert caught.value.check == "attempt-lost"
    compute(job, again)
    assert computations == [key_of(header), key_of(again)]
    assert len(job._ledger.charges()) == 2


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(one, marks=pytest.mark.full) for one in ("cut", "a bit")),
        "another attempt's",
    ],
)
def test_a_sum_that_is_not_the_recorded_one_is_not_sent(
    opened: Open, plan: TrainingPlan, computations: list[AttemptKey], damage: str
) -> None:
    header, again = header_of(plan), header_of(plan, attempt=2)
    job = opened()
    compute(job, header)
    compute(job, again)
    folder = job._config.state_folder.deltas(plan.job)
    path, other = folder / "00001-00001.sum", folder / "00001-00002.sum"
    data = bytearray(path.read_bytes())
    match damage:
        case "cut":
            path.write_bytes(data[:-4])
        case "a bit":
            data[-1] ^= 1
            path.write_bytes(data)
        case _:
            path.write_bytes(other.read_bytes())
    for site in (job, opened()):
        with pytest.raises(LedgerError, match="noisy sum") as caught:
            compute(site, header)
        assert caught.value.file == path
    # The other attempt is as it was, and nothing was computed again.
    compute(site, again)
    assert computations == [key_of(header), key_of(again)]


@pytest.mark.full
def test_sums_of_earlier_rounds_leave_the_disk(opened: Open, plan: TrainingPlan) -> None:
    job = opened()
    folder = job._config.state_folder.deltas(plan.job)
    compute(job, header_of(plan))
    compute(job, header_of(plan, attempt=2))
    compute(job, header_of(plan, round_number=2))
    assert [path.name for path in folder.iterdir()] == ["00002-00001.sum"]
    assert (folder / "00002-00001.sum").stat().st_mode & 0o077 == 0


@pytest.mark.full
def test_attempts_past_the_plans_most_are_refused_before_any_gradient(
    opened: Open, plan: TrainingPlan, computations: list[AttemptKey]
) -> None:
    job = opened()
    for attempt in range(1, ATTEMPTS + 1):
        compute(job, header_of(plan, attempt=attempt))
    with pytest.raises(BudgetError, match="most attempts"):
        compute(opened(), header_of(plan, round_number=2))
    assert len(computations) == ATTEMPTS


def test_an_adapter_that_mixes_records_is_refused_before_it_is_charged(
    opened: Open, plan: TrainingPlan, computations: list[AttemptKey]
) -> None:
    job = opened()
    layer = job._model.base.encoder.layer[0]  # type: ignore[union-attr, index]  # a BERT
    layer.register_forward_hook(lambda _, __, output: output + 1e-6 * output.mean(0, keepdim=True))
    with pytest.raises(ModelError, match="bits depend on the records beside it"):
        compute(job, header_of(plan))
    assert computations == []
    assert job._ledger.charges() == []


def test_a_size_that_is_wrong_by_ten_times_changes_no_figure(
    opened: Open, plan: TrainingPlan
) -> None:
    """What an attempt costs stands in the plan: no size that a site states is in it."""
    found = set()
    for number, size in enumerate((12, 120, 1)):
        job = opened(f"site-{number}", public_size=size)
        compute(job, header_of(plan))
        charged = job._ledger.attempt(key_of(header_of(plan)))
        assert charged is not None
        found.add((charged.cost, job._ledger.spent(DELTA), job._ledger.shared_spent(DELTA)))
    assert len(found) == 1


@pytest.mark.parametrize(
    "evaluation",
    [
        None,
        pytest.param(
            ScoreEvaluation(noise_multiplier=1.0, max_records=100), marks=pytest.mark.full
        ),
    ],
    ids=["without counts", "with counts"],
)
def test_the_ring_vectors_of_sites_add_up_to_the_sum_of_their_noisy_sums(
    opened: Open, tiny_model: Path, evaluation: ScoreEvaluation | None
) -> None:
    plan = shared_plan(tiny_model, evaluation=evaluation)
    header, total, sums = header_of(plan), None, []
    counts = None if evaluation is None else DpEvent(1.0, 1.0, 1)
    for site in SITES:
        job = opened(site, plan=plan)
        vector = compute(job, header)
        total = vector if total is None else total + vector
        charged = job._ledger.attempt(key_of(header))
        assert charged is not None
        sums.append(
            NoisySums(job._config.state_folder.deltas(plan.job)).load(1, 1, charged.vector)[1]
        )
        assert charged.cost.counts == counts
        events = [event for event in (charged.cost.everybody, counts) if event is not None]
        assert job._ledger.spent(DELTA) == epsilon(events, DELTA)
    assert read_sum(plan, 1, total, cohort=3) == 3
    assert np.array_equal(signed_part(total), sum(sums))
    if evaluation is not None:
        assert total.size == plan.lora.size + COUNTS + 1
        # Each of three sites holds about three records out; the noise of the sum is 2.4.
        found = counts_in(plan, total, cohort=3, survivors=3)
        assert found.records == pytest.approx(9, abs=15)


def test_an_answer_time_follows_from_the_sites_own_size_and_not_from_a_number_of_the_plan(
    plan: TrainingPlan,
) -> None:
    """A plan could state a batch of one record, and its batches would exceed their time: the time
    of an answer would tell how long they are."""
    small = msgspec.structs.replace(plan.training, expected_batch_size=1)
    lying = msgspec.structs.replace(plan, training=small)
    assert answer_time.drawn_units(lying, 500) == answer_time.drawn_units(plan, 500) == 500
