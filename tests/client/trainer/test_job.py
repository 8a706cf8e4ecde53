"""Opening a job: the order of its steps, and a ledger that a failure leaves free."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from adversarial.site_process import Quiet
from support.small_models import one_round, plan_for

from umbel_client.data.site_data import SiteData
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import Register
from umbel_client.site.config import ClientConfig, DataConfig, ModelConfig
from umbel_client.site.policy import Policy
from umbel_client.storage.journal import Published
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_client.trainer import opening
from umbel_client.trainer.local_job import LocalJob
from umbel_client.trainer.opening import open_job
from umbel_client.training import answer_time
from umbel_client.training.answer_time import AnswerTime
from umbel_common.adapters.vector import initial_vector
from umbel_common.errors import LedgerError, ModelError, PlanError, StorageError
from umbel_common.plans.plan import Classification

Open = Callable[[], LocalJob]
STEPS = (
    "noise_for",
    "Register.require_free",
    "Ledger.open",
    "Register.enter",
    "load_site_model",
    "choose_batch_limit",
    "largest_record_test",
    "self_test",
    "prepare",
)


pytestmark = pytest.mark.usefixtures("shared_proofs")


@pytest.fixture
def opened(tmp_path: Path, tiny_model: Path) -> Open:
    return lambda: job_of(tmp_path, tiny_model, [f"w{number}" for number in range(12)])


def job_of(folder: Path, model: Path, texts: list[str], **settings: Any) -> LocalJob:
    """A job of a site with these texts; keyword arguments are settings of its client.toml."""
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "state").mkdir(exist_ok=True)
    config = ClientConfig(
        site="north",
        state=str(folder / "state"),
        identity="identity.pem",
        roster="roster.json",
        data=DataConfig(path=str(data), public_size=12),
        model=ModelConfig(path=str(model)),
        policy=Policy(total_epsilon=100.0, labels=("a", "b")),
        physical_batch_size=4,
        **settings,
    )
    plan = plan_for(model, Classification(labels=("a", "b")), training=one_round(12))
    # The roster is asked for size classes only, which this plan does not weigh by.
    roster: Any = None
    return open_job(
        config,
        plan,
        roster,
        SiteData.load(config),
        register=Register(folder / "ledgers"),
        published=Published(ledger_head=None, answers=0),
        observer=Quiet(),
        entropy=lambda size: bytes(size),
    )


def target(name: str) -> tuple[object, str]:
    """The owner of a name in the module, and the attribute there."""
    owner: object = opening
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, attribute


def test_the_noise_is_calibrated_first_and_the_ledger_opened_before_the_model(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def noting(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object, **options: object) -> object:
            taken.append(name)
            return function(*arguments, **options)

        return noted

    for name in STEPS:
        owner, attribute = target(name)
        monkeypatch.setattr(owner, attribute, noting(name, getattr(owner, attribute)))
    opened().close()
    assert tuple(taken) == STEPS


@pytest.mark.parametrize("name", [*STEPS[3:], "DeltaCache", "Ledger.require_stated"])
def test_a_step_that_fails_leaves_the_ledger_free(
    opened: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("no")

    with monkeypatch.context() as patch:
        patch.setattr(*target(name), fail)
        with pytest.raises(ModelError, match="no"):
            opened()
    opened().close()


def test_an_open_job_holds_its_ledger(opened: Open, tmp_path: Path) -> None:
    first = opened()
    with pytest.raises(LedgerError, match="use"):
        Ledger.open(tmp_path / "state" / "ledger.sqlite", bytes(32))
    first.close()
    opened().close()


def test_a_job_that_is_printed_shows_neither_records_nor_noise(opened: Open) -> None:
    made = opened()
    try:
        made.prepare()
        shown = f"{made!r} {made._prepared!r} {made._prepared.trainer!r} {made._records!r}"
        assert "ids" not in shown
        assert "noise" not in shown
    finally:
        made.close()


def test_a_round_reserved_without_noise_stops_a_plan_with_privacy(opened: Open) -> None:
    made = opened()
    try:
        made.prepare()
        with pytest.raises(PlanError, match="noise"):
            made.train(1, initial_vector(made.plan), None)
    finally:
        made.close()


@pytest.mark.parametrize("tested", [False, True], ids=["without the test", "with it"])
def test_a_round_whose_adapter_mixes_records_is_refused_before_it_is_charged(
    opened: Open, monkeypatch: pytest.MonkeyPatch, tested: bool
) -> None:
    made = opened()
    layer = made._model.base.encoder.layer[0]  # type: ignore[union-attr, index]  # a BERT
    vector = initial_vector(made.plan)
    header: Any = SimpleNamespace(round=1, adapter=b"a" * 32)
    # Rounding, from the records beside: what an adapter turns into whole gradients.
    layer.register_forward_hook(lambda _, __, output: output + 1e-6 * output.mean(0, keepdim=True))
    if not tested:
        monkeypatch.setattr(LocalJob, "check", lambda *_: None)
    try:
        if tested:
            with pytest.raises(ModelError, match="bits depend on the records beside it"):
                made.compute(header, vector)
            assert made._ledger.history() == ()
        else:
            made.compute(header, vector)
            assert len(made._ledger.history()) == 1
    finally:
        made.close()


class WorkClock:
    """A clock that runs with the tokens that are computed, and while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = WorkClock()
"""One for all tests, so that what is replaced is the same and their jobs share one proof."""
_batch = PreparedData.batch


def counted_batch(data: PreparedData, part: Part) -> Any:
    CLOCK.now += part.rows * part.length
    return _batch(data, part)


SHORT = [f"w{number}" for number in range(12)]
LONG = [*SHORT[:-1], "w1 " * 100]


@pytest.fixture
def work_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    CLOCK.now = 0.0
    monkeypatch.setattr(answer_time, "time", CLOCK)
    monkeypatch.setattr(PreparedData, "batch", counted_batch)


def first_answer_of(made: LocalJob) -> float:
    """When a job answers to its first round, by the clock of the work; it is closed then."""
    header: Any = SimpleNamespace(round=1, adapter=b"a" * 32)
    vector = initial_vector(made.plan)
    made.check(1, vector)
    began = CLOCK.now
    try:
        made.compute(header, vector)
    except ZeroDivisionError:
        pass
    finally:
        made.close()
    return CLOCK.now - began


@pytest.mark.usefixtures("work_clock")
@pytest.mark.parametrize("fails", [False, True], ids=["trained", "failed"])
@pytest.mark.parametrize("when", ["when-done", "even"])
def test_the_time_of_an_answer_does_not_tell_of_a_long_record(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, when: str, fails: bool
) -> None:
    """Without the option, the same time would be a coincidence: this is the attack."""
    if fails:
        monkeypatch.setattr(LocalJob, "store", lambda *_: 1 / 0)

    def seconds(texts: list[str], name: str) -> float:
        (tmp_path / name).mkdir()
        return first_answer_of(job_of(tmp_path / name, tiny_model, texts, answer_time=when))

    same = seconds(SHORT, "short") == seconds(LONG, "long")
    assert same == (when == "even")


@pytest.mark.usefixtures("work_clock")
@pytest.mark.parametrize("apart", [False, True], ids=["added up", "apart"])
def test_a_preparation_that_ends_near_an_answer_time_does_not_tell_of_a_long_record(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """A server can have records prepared again before each round: it offers another plan."""
    prepare = LocalJob.prepare

    def slowly(self: LocalJob) -> None:
        prepare(self)
        # Short records, of 16 tokens each, are just in time.
        CLOCK.now += self._answer_time.seconds - len(SHORT) * 16

    monkeypatch.setattr(LocalJob, "prepare", slowly)
    if not apart:
        kept, compute = AnswerTime.kept, LocalJob._compute_reserved

        def together(self: LocalJob, *arguments: Any) -> None:
            with kept(self._answer_time):
                compute(self, *arguments)

        monkeypatch.setattr(LocalJob, "_compute_reserved", together)
        monkeypatch.setattr(AnswerTime, "kept", lambda _: nullcontext())

    def seconds(texts: list[str], name: str) -> float:
        (tmp_path / name).mkdir()
        return first_answer_of(job_of(tmp_path / name, tiny_model, texts, answer_time="even"))

    assert (seconds(SHORT, "short") == seconds(LONG, "long")) == apart


@pytest.mark.parametrize(
    ("limit", "records_per_unit", "scored_units", "parts"),
    [(8, 1, 0.0, 3 * (4 + 7)), (8, 1, 100.0, 3 * (4 + 7) + 18 + 7), (8, 5, 0.0, 3 * (26 + 7))],
    ids=["records", "scored", "units that share no batch"],
)
def test_an_answer_time_is_for_as_many_batches_as_a_round_may_have(
    tiny_model: Path, limit: int, records_per_unit: int, scored_units: float, parts: int
) -> None:
    """A mean of 12 units is at most 26 units, and one of 100 at most 140; there are 7 lengths."""
    plan = plan_for(tiny_model, Classification(labels=("a", "b")), training=one_round(12))
    training = msgspec.structs.replace(plan.training, local_steps=3)
    plan = msgspec.structs.replace(plan, training=training)
    found = answer_time.most_parts(
        plan, BatchLimit(limit), records_per_unit, scored_units, answer_time.drawn_units(plan, 12)
    )
    assert found == parts


@pytest.mark.parametrize("kept", [False, True], ids=["forgotten", "kept"])
def test_a_round_that_failed_is_not_drawn_again_though_its_ledger_could_not_be_written(
    opened: Open, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    made = opened()
    header: Any = SimpleNamespace(round=1, adapter=b"a" * 32)
    vector = initial_vector(made.plan)
    drawn = []
    train = LocalJob.train

    def failing(self: LocalJob, *arguments: Any) -> Any:
        drawn.append(train(self, *arguments))
        raise ModelError("no")

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    try:
        monkeypatch.setattr(LocalJob, "train", failing)
        with monkeypatch.context() as disk:
            disk.setattr(Ledger, "record_delta", full)
            with pytest.raises(StorageError):
                made.compute(header, vector)
        if not kept:
            made._spoiled.clear()
        with pytest.raises(LedgerError if kept else ModelError):
            made.compute(header, vector)
        assert len(drawn) == (1 if kept else 2)
    finally:
        made.close()
