"""Copies of a model on two pretended devices, which divide a step's records, train as one does.

What two GPUs do, and how fast, is not shown here: see `tests/support/pretended.py`.
"""

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adversarial.site_process import Quiet
from support import amplifying, pretended
from support.amplifying import CLIPPING, amplifying_adapter, sensitivity
from support.on_devices import save_narrow_bert, start_of, zeros
from support.small_models import one_round, plan_for, save_decoder

from umbel_client.data.records import load_records
from umbel_client.data.site_data import SiteData
from umbel_client.data.tokens import Tokens
from umbel_client.data.units import Units
from umbel_client.dpsgd.batch_size import find_physical_batch_size
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.evaluation.losses import record_losses
from umbel_client.ledger.register import Register
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base import device
from umbel_client.models.base.layers import all_layers
from umbel_client.models.inputs import Batch
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.site.config import ClientConfig, DataConfig, ModelConfig
from umbel_client.site.policy import Policy
from umbel_client.storage.journal import Published
from umbel_client.tasks.physical_batches import compute_parts, in_threads
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_client.tasks.task import ClassificationTask, task_of
from umbel_client.trainer import opening
from umbel_client.trainer.job import SiteJob
from umbel_client.trainer.opening import open_job
from umbel_client.training import bit_test
from umbel_client.training.answer_time import most_parts
from umbel_client.training.bit_test import check_round
from umbel_client.training.local import Validation, fine_tune
from umbel_client.training.round import LocalTrainer
from umbel_client.training.self_test import self_test
from umbel_common.adapters.vector import Vector
from umbel_common.errors import ModelError
from umbel_common.plans.plan import (
    Adam,
    CausalLm,
    Classification,
    LocalPrivacy,
    NoPrivacy,
    Training,
    TrainingPlan,
)

torch.set_num_threads(1)

BOTH = pretended.DEVICES
HERE, THERE = BOTH
ONE = (HERE,)
LABELLED = Classification(labels=("a", "b"), max_tokens=16)
ANSWERS = CausalLm(max_tokens=32)
CLOSE = 1e-6
"""Largest difference of two adapters, relative to their length."""

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"), num_hidden_layers=2, hidden_size=16)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_narrow_bert(tmp_path_factory.mktemp("bert"), layers=2)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert all(memory.limit is None for memory in pretended.MEMORY.values())
    assert not [one.name for one in threading.enumerate() if one.name.startswith("copy")]


def loaded(folder: Path, plan: TrainingPlan, devices: tuple[str, ...], **how: Any) -> AdaptedModel:
    model, *others = (AdaptedModel.load(folder, plan, device=one, **how) for one in devices)
    model.add_copies(others)
    model.set_vector(start_of(plan))
    assert tuple(str(copy.device) for copy in model.copies) == devices
    return model


def prepared(model: AdaptedModel, folder: Path, file: Path) -> PreparedData:
    records = load_records(file, model.plan.task)
    return prepare(model, folder, records, BatchLimit(4), cache=None)


def trained(model: AdaptedModel, data: PreparedData, limit: BatchLimit, number: int = 1) -> Vector:
    private = not isinstance(model.plan.privacy, NoPrivacy)
    noise = SiteNoise(0.9, 0.8 if private else None)
    trainer = LocalTrainer(model, data, noise, zeros, limit)
    return trainer.round(number, start_of(model.plan)).delta


def difference(found: Vector, wanted: Vector) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def records_of_each(model: AdaptedModel) -> Counter[str]:
    """Counts, from now on, the rows that each copy's layers get."""
    seen: Counter[str] = Counter()

    def see(place: str, _module: object, given: tuple[torch.Tensor, ...]) -> None:
        seen[place] += len(given[0])

    for copy in model.copies:
        layers = all_layers(copy.base)
        assert layers is not None
        layers[-1].register_forward_pre_hook(partial(see, str(copy.device)))
    return seen


Case = tuple[str, Any, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "an encoder, alternate": ("bert", LABELLED, {"method": "alternate"}, {}),
    "a cached encoder": ("bert", LABELLED, {"layers": (1,), "method": "ffa"}, {}),
    "a head alone": ("bert", LABELLED, {"target_modules": ()}, {}),
    "a stock head": ("bert", Classification(labels=("a", "b"), head="stock"), {}, {}),
    "a language model": ("llama", ANSWERS, {}, {"checkpointing": True}),
    "a cached language model": ("llama", ANSWERS, {"layers": (1,)}, {}),
}


@pytest.fixture
def parts(bert: Path, llama: Path, texts: Path, pairs: Path) -> Callable[[str], Any]:
    places = {"bert": (bert, texts), "llama": (llama, pairs)}

    def of(name: str) -> Any:
        kind, task, lora, how = CASES[name]
        return (*places[kind], task, lora, how)

    return of


IN_EVERY_RUN = {
    ("a cached encoder", True),
    ("a head alone", False),
}


@pytest.mark.parametrize(
    ("name", "units"),
    [
        pytest.param(*one, marks=[] if one in IN_EVERY_RUN else [pytest.mark.full])
        for one in product(CASES, (False, True))
    ],
)
def test_a_private_round_is_that_of_one_device_noise_and_all(
    parts: Any, name: str, units: bool
) -> None:
    folder, file, task, lora, how = parts(name)
    plan = plan_for(folder, task, lora=lora, training=one_round(8, steps=2))
    rounds = (1, 2) if plan.lora.method == "alternate" else (1,)
    found = []
    for devices in (ONE, BOTH):
        model = loaded(folder, plan, devices, **how)
        data = prepared(model, folder, file)
        if units:
            data = replace(data, units=Units(np.array([0, 0, 0, 1, 2, 2, 3, 4])))
        seen = records_of_each(model)
        found.append([trained(model, data, BatchLimit(3), number) for number in rounds])
        assert set(seen) == set(devices) or name == "a head alone"
        for copy in model.copies:
            assert np.array_equal(copy.vector(), model.vector())
    for one, both in zip(*found, strict=True):
        assert difference(both, one) < CLOSE


@pytest.mark.parametrize(
    "name", ["a cached encoder", pytest.param("a language model", marks=pytest.mark.full)]
)
def test_a_plain_round_is_that_of_one_device(parts: Any, name: str) -> None:
    folder, file, task, lora, how = parts(name)
    optimizer = Adam(adapter_learning_rate=1e-3, head_learning_rate=1e-2)
    training = Training(
        rounds=1, local_steps=2, expected_batch_size=8, optimizer=optimizer, average_decay=0.5
    )
    plan = plan_for(folder, task, lora=lora, training=training, privacy=NoPrivacy())
    found = []
    for devices in (ONE, BOTH):
        model = loaded(folder, plan, devices, **how)
        found.append(trained(model, prepared(model, folder, file), BatchLimit(2)))
        for copy in model.copies:
            assert np.array_equal(copy.vector(), model.vector())
    assert difference(found[1], found[0]) < 1e-5  # Adam divides by gradients next to zero


def test_a_batch_of_fewer_parts_than_devices_is_a_step(bert: Path, texts: Path) -> None:
    plan = plan_for(bert, LABELLED)
    deltas = []
    for devices in (ONE, BOTH):
        model = loaded(bert, plan, devices)
        data = prepared(model, bert, texts)
        for records in (0, 1):
            model.set_vector(start_of(plan))
            step_of(model, data, np.arange(records), BatchLimit(4))
            deltas.append(model.vector() - start_of(plan))
    for one, both in zip(deltas[:2], deltas[2:], strict=True):
        assert np.abs(one).max() > 0
        assert np.array_equal(one, both)


def step_of(model: AdaptedModel, data: PreparedData, chosen: np.ndarray, limit: BatchLimit) -> None:
    inner = torch.optim.SGD(list(model.select(1).values()), lr=1.0)
    optimizer = optimizer_of(model, inner)
    task, units = task_of(model.plan.task), None if data.units is None else data.units.of_record
    with per_record_gradients(*model.copies):
        private_step(task, model, data, chosen, optimizer, limit, units)


def optimizer_of(model: AdaptedModel, inner: torch.optim.Optimizer) -> PrivateOptimizer:
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    return PrivateOptimizer(
        inner,
        StepNoise(zeros, parameters, steps=1),
        noise_multiplier=1.0,
        clip_norm=1.0,
        expected_batch_size=1.0,
        copies=model.in_copies(inner),
    )


def test_the_host_waits_once_for_each_physical_batch_and_draws_the_noise_once(
    bert: Path, texts: Path
) -> None:
    model = loaded(bert, plan_for(bert, LABELLED), BOTH)
    data = prepared(model, bert, texts)
    count = pretended.Counted()
    step_of(model, data, np.arange(8), BatchLimit(2))
    # Four parts with three inputs each; noise, and nothing for the second copy.
    assert (sum(count.reads.values()), sum(count.writes.values())) == (4, 4 * 3 + 1)


def test_two_copies_on_one_device_are_refused(bert: Path) -> None:
    model = loaded(bert, plan_for(bert, LABELLED), (HERE, HERE))
    with pytest.raises(RuntimeError, match="two copies of a model are on one device"):
        optimizer_of(model, torch.optim.SGD(list(model.select(1).values()), lr=1.0))


def test_losses_are_those_of_the_first_copy(llama: Path, pairs: Path) -> None:
    model = loaded(llama, plan_for(llama, ANSWERS), BOTH)
    data, seen = prepared(model, llama, pairs), records_of_each(model)
    assert np.isfinite(record_losses(model, data, BatchLimit(4))).all()
    assert set(seen) == {HERE}


# Memory, and errors.


def memory_for(model: AdaptedModel, data: PreparedData, records: int) -> int:
    """Bytes beside the model that a round takes on the second device."""
    memory = pretended.MEMORY[THERE]
    gc.collect()
    memory.peak = before = memory.used
    trained(model, data, BatchLimit(records))
    return memory.peak - before


@pytest.mark.parametrize(
    "privacy",
    [
        pytest.param(None, id="private"),
        pytest.param(NoPrivacy(), id="plain", marks=pytest.mark.full),
    ],
)
def test_where_one_copy_runs_out_of_memory_nothing_is_added_twice_or_left_out(
    llama: Path, pairs: Path, privacy: NoPrivacy | None
) -> None:
    """The first copy has added its part by then."""
    given = {} if privacy is None else {"privacy": privacy}
    plan = plan_for(llama, ANSWERS, training=one_round(8), **given)
    wanted = trained(one := loaded(llama, plan, ONE), prepared(one, llama, pairs), BatchLimit(4))
    model = loaded(llama, plan, BOTH)
    data, limit = prepared(model, llama, pairs), BatchLimit(4)
    seen = records_of_each(model)
    with pretended.memory_of(memory_for(model, data, 4) * 3 // 4, THERE):
        seen.clear()
        found = trained(model, data, limit)
    assert limit.records < 4
    assert seen[HERE] > 0
    assert difference(found, wanted) < CLOSE


class Log:
    """What each of some copies has added; one that has too little memory adds nothing."""

    def __init__(self, *most: float) -> None:
        """Args:
        most: for each copy, the largest number of rows that it has memory for.
        """
        self._most = most
        self.added: list[tuple[int, list[int]]] = []
        self.tried = 0

    def compute(self, copy: int, part: Part) -> None:
        self.tried += 1
        if part.rows > self._most[copy]:
            raise torch.OutOfMemoryError("made up")
        self.added.append((copy, part.records.tolist()))

    def run(self, data: PreparedData, limit: BatchLimit, **how: Any) -> list[int]:
        units = None if data.units is None else data.units.of_record
        on_each = [partial(self.compute, copy) for copy in range(len(self._most))]
        every = np.arange(len(data))
        compute_parts(data, every, limit, units, compute=on_each, discard=lambda: None, **how)
        return sorted(record for _, records in self.added for record in records)


OWNERS = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7, 8])


def lines(owners: np.ndarray | None = None) -> PreparedData:
    """Sixteen records of one length; nothing computes them."""
    tokens = Tokens(np.ones(16, dtype=np.int32), np.arange(17, dtype=np.int64), 0)
    units = None if owners is None else Units(owners)
    return PreparedData(tokens, np.zeros(16, dtype=np.int64), None, units)


@pytest.mark.parametrize("owners", [None, OWNERS], ids=["records", "units"])
@pytest.mark.parametrize("most", [(9, 9), (4, 16), (16, 4), (4, 5), (5, 16, 8), (16, 16, 4, 4)])
def test_each_record_is_added_once_whichever_copies_have_too_little_memory(
    most: tuple[int, ...], owners: np.ndarray | None
) -> None:
    log, limit = Log(*most), BatchLimit(16 // len(most))
    assert log.run(lines(owners), BatchLimit(8)) == list(range(16))
    assert log.run(lines(owners), limit) == sorted([*range(16)] * 2)


def test_parts_are_dealt_to_the_copies_in_turn() -> None:
    log = Log(16, 16, 16)
    log.run(lines(), BatchLimit(2))
    dealt = sorted((records[0], copy) for copy, records in log.added)
    assert dealt == [(2 * number, number % 3) for number in range(8)]


@pytest.mark.parametrize("most", [(4, 3), (3, 4)])
def test_whether_a_unit_counts_does_not_follow_from_the_copy_that_it_comes_to(
    most: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """One record more in the batch would move it to the other copy: it counts if any holds it."""
    data = lines(OWNERS)
    for first in range(4):
        log = Log(*most)
        fewer = replace(data, units=Units(OWNERS))
        on_each = [partial(log.compute, copy) for copy in range(2)]
        chosen = np.array([record for record in range(16) if record not in range(first)])
        chosen = chosen[~np.isin(OWNERS[chosen], OWNERS[:first])]
        compute_parts(
            fewer,
            chosen,
            BatchLimit(4),
            OWNERS,
            compute=on_each,
            discard=lambda: None,
            private=True,
        )
        assert sorted(r for _, records in log.added for r in records) == chosen.tolist()
    assert "do not fit" not in caplog.text
    log = Log(3, 3)
    assert log.run(data, BatchLimit(4), private=True) == np.flatnonzero(OWNERS != 4).tolist()
    assert "records of one unit do not fit into memory" in caplog.text
    with pytest.raises(ModelError, match="records of one unit do not fit"):
        Log(3, 3).run(data, BatchLimit(4))


def test_nothing_stays_of_units_that_no_copy_has_memory_for(
    bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fails on its own copy when its gradients are there, and then on the other copy."""
    model = loaded(bert, plan_for(bert, LABELLED), BOTH)
    data = replace(prepared(model, bert, texts), units=Units(np.array([0, 0, 0, 1, 1, 1, 2, 3])))
    step_of(model, data, np.array([6, 7]), BatchLimit(3))
    wanted = model.vector()
    sound, tried = PrivateOptimizer.accumulate, []

    def small(self: PrivateOptimizer, records: int, *units: Any, rows: int, copy: int) -> None:
        if rows > 2:
            tried.append(copy)
            raise torch.OutOfMemoryError("made up")
        sound(self, records, *units, rows=rows, copy=copy)

    monkeypatch.setattr(PrivateOptimizer, "accumulate", small)
    model.set_vector(start_of(model.plan))
    step_of(model, data, np.arange(8), BatchLimit(3))
    assert sorted(tried) == [0, 0, 1, 1]
    assert difference(model.vector() - start_of(model.plan), wanted - start_of(model.plan)) < CLOSE


def test_what_a_unit_left_on_a_copy_is_gone_before_another_unit_is_tried_there() -> None:
    """With three copies, two units may be tried on the same copy, one after the other."""
    left, tried = set(), Counter[int]()

    def small(copy: int, part: Part) -> None:
        assert copy not in left
        tried[copy] += 1
        left.add(copy)
        if part.rows > 3:
            raise torch.OutOfMemoryError("made up")
        left.remove(copy)

    owners = np.repeat(np.arange(4), 4)
    compute_parts(
        lines(owners),
        np.arange(16),
        BatchLimit(4),
        owners,
        compute=[partial(small, copy) for copy in range(3)],
        discard=left.clear,
        private=True,
    )
    # Four units, and each is tried on every copy.
    assert tried == {0: 4, 1: 4, 2: 4}
    assert not left


def test_rows_above_a_lowered_limit_are_computed_by_the_first_copy_that_holds_them() -> None:
    """The tests of bits before later rounds do not compare them on the copies."""
    owners = np.repeat(np.arange(7), [2, 2, 3, 1, 1, 4, 3])
    for most, by in ((16, 0), (2, 1)):
        log, limit = Log(most, 16), BatchLimit(8)
        limit.lower(2)
        assert log.run(lines(owners), limit) == [*range(16)]
        assert {copy for copy, records in log.added if len(records) > 2} == {by}
        assert {copy for copy, records in log.added if len(records) <= 2} == {0, 1}


def units_that_count(
    sizes: dict[int, int], memory: tuple[int, ...], limit: BatchLimit
) -> dict[int, int | None]:
    """The units that a step counts, on copies with memory for some rows of 16 tokens.

    Every other unit has 16 tokens in each record, and the rest 48. Each unit has the number of rows
    that it was computed in, if these were not shown to give its records the bits of others; None:
    they were.
    """
    shown = limit.choices
    owners = np.repeat(list(sizes), list(sizes.values()))
    starts = np.concatenate([[0], np.cumsum(16 + owners % 2 * 32)])
    tokens = Tokens(np.ones(starts[-1], dtype=np.int32), starts, 0)
    data = PreparedData(tokens, np.zeros(len(owners), dtype=np.int64), None, Units(owners))
    found: dict[int, int | None] = {}

    def compute(most: int, part: Part) -> None:
        if part.rows * part.length > 16 * most:
            raise torch.OutOfMemoryError("made up")
        units = np.unique(owners[part.records]).tolist()
        assert part.rows in shown or len(units) == 1
        assert found.keys().isdisjoint(units)
        found.update(dict.fromkeys(units, None if part.rows in shown else part.rows))

    compute_parts(
        data,
        np.arange(len(owners)),
        limit,
        owners,
        compute=[partial(compute, most) for most in memory],
        discard=lambda: None,
        private=True,
    )
    return found


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_no_unit_decides_where_memory_runs_out_whether_another_counts(copies: int) -> None:
    """One unit beside a larger one had the limit lowered: the larger one then had rows enough."""
    assert units_that_count({0: 1, 2: 3}, (3,) * copies, BatchLimit(4)) == {0: None, 2: 3}
    assert units_that_count({2: 3}, (3,) * copies, BatchLimit(4)) == {2: 3}
    random = np.random.default_rng(0)
    for _ in range(300):
        most = int(random.integers(2, 17))
        memory = tuple(random.integers(1, 3 * most + 2, copies).tolist())
        kept = random.permutation(BatchLimit(most).choices)[: random.integers(1, 5)].tolist()
        sizes = {unit: int(random.integers(1, most + 1)) for unit in range(random.integers(1, 7))}
        counted = []
        for units in (sizes, {unit: size for unit, size in sizes.items() if unit > 0}):
            limit = BatchLimit(most)
            limit.keep(kept)
            counted.append(units_that_count(units, memory, limit) if units else {})
        every, others = counted
        every.pop(0, None)
        assert every == others


def test_an_error_of_one_copy_ends_when_all_have_ended() -> None:
    going, ended = threading.Event(), []

    def fail() -> None:
        going.set()
        raise ValueError("one")

    def go_on() -> None:
        going.wait()
        ended.append(True)

    for calls in ((fail, go_on), (go_on, fail), (fail, go_on, fail)):
        ended.clear()
        with pytest.raises(ValueError, match="one"):
            in_threads(calls)
        assert ended
    with pytest.raises(ValueError, match="one"):
        in_threads([fail])


def test_an_error_of_one_copy_fails_the_round(
    bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = ClassificationTask.losses

    def gone(self: ClassificationTask, model: AdaptedModel, batch: Batch) -> torch.Tensor:
        if str(model.device) == THERE:
            raise RuntimeError("CUDA error: device has fallen off the bus")
        return sound(self, model, batch)

    model = loaded(bert, plan_for(bert, LABELLED, training=one_round(8)), BOTH)
    data = prepared(model, bert, texts)
    monkeypatch.setattr(ClassificationTask, "losses", gone)
    with pytest.raises(RuntimeError, match="fallen off the bus"):
        trained(model, data, BatchLimit(2))
    assert not [one.name for one in threading.enumerate() if one.name.startswith("noise")]


# Bits.


@pytest.mark.full
def test_copies_whose_bits_are_equal_pass_the_tests_of_a_job_and_of_a_round(bert: Path) -> None:
    model, limit = loaded(bert, plan_for(bert, LABELLED), BOTH), BatchLimit(2)
    before, seen = model.vector(), records_of_each(model)
    self_test(model, 1.0, limit, entropy=os.urandom)
    assert limit.records == 2
    assert seen[THERE] > seen[HERE] // 3
    for copy in model.copies:
        assert np.array_equal(copy.vector(), before)
    model.select(1)
    check_round(model, limit, entropy=os.urandom)


@pytest.mark.parametrize("other", [pytest.param(HERE, marks=pytest.mark.full), THERE])
def test_a_device_that_rounds_otherwise_is_refused(
    bert: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bit_test, "_IN_A_ROUND", 2)
    model = loaded(bert, plan_for(bert, LABELLED), BOTH)
    model.select(1)
    check_round(model, BatchLimit(1), entropy=os.urandom)
    with pretended.other_bits(other):
        for test in (check_round, bit_test.prove_shapes):
            with pytest.raises(ModelError, match="depend on the device that computes it") as error:
                test(model, BatchLimit(1), entropy=os.urandom)
            assert error.value.field == "model.split"
            assert "pretend:0, pretend:1" in str(error.value.found)


@pytest.mark.full
def test_a_copy_with_another_adapter_is_refused(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(bert, plan_for(bert, LABELLED), BOTH)
    monkeypatch.setattr(AdaptedModel, "update_copies", lambda self: None)
    with pytest.raises(ModelError, match="different adapters after a training step"):
        self_test(model, 1.0, BatchLimit(2), entropy=os.urandom)


@pytest.mark.full
def test_a_number_of_rows_with_other_bits_on_one_device_is_not_used(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bit_test, "_IN_A_ROUND", 2)
    model, limit = loaded(bert, plan_for(bert, LABELLED), BOTH), BatchLimit(4)
    layer: Any = model.copies[1].base.encoder.layer[0]  # type: ignore[union-attr, index]  # BERT
    layer.register_forward_hook(
        lambda _layer, _inputs, output: output * (1 + 1e-6) if len(output) == 2 else output
    )
    model.select(1)
    check_round(model, limit, entropy=os.urandom)
    assert 2 not in limit.choices
    assert 4 in limit.choices


def test_without_the_test_of_bits_one_record_moves_the_sum_by_many_clip_norms(
    tmp_path: Path,
) -> None:
    """One short record more, and each part of the others comes to the other copy."""
    folder = amplifying.CASES["bert"][0](tmp_path / "model")
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1e-3)
    task = Classification(labels=("a", "b"), max_tokens=24)
    plan = plan_for(folder, task, privacy=privacy)
    model = loaded(folder, plan, BOTH)
    adapter = amplifying_adapter(model)
    lengths = [20] * 384 + [9]
    attack = partial(sensitivity, model, adapter, lengths, limit=BatchLimit(96))
    assert attack() <= 1 + CLIPPING
    with pretended.other_bits(THERE):
        assert attack() > 10
        model.set_vector(adapter)
        with pytest.raises(ModelError, match="depend on the device"):
            check_round(model, BatchLimit(2), entropy=os.urandom)


def job_on(folder: Path, bert: Path, texts: Path) -> SiteJob:
    folder.mkdir()
    config = ClientConfig(
        site="north",
        state=str(folder),
        identity="identity.pem",
        roster="roster.json",
        data=DataConfig(path=str(texts), public_size=8),
        model=ModelConfig(path=str(bert), device=BOTH, split="records"),
        policy=Policy(total_epsilon=100.0, labels=("a", "b")),
        physical_batch_size=1,
    )
    # The roster is asked for size classes only, which this plan does not weigh by.
    roster: Any = None
    return open_job(
        config,
        plan_for(bert, LABELLED, training=one_round(8)),
        roster,
        SiteData.load(config),
        register=Register(folder / "ledgers"),
        published=Published(ledger_head=None, answers=0),
        observer=Quiet(),
        entropy=zeros,
    )


def test_a_job_whose_devices_round_otherwise_in_some_round_is_not_charged_for_it(
    tmp_path: Path, bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "require_device", lambda name, **_: None)
    monkeypatch.setattr(device, "require_devices", lambda names, **_: None)
    # As if they had agreed when the job was opened.
    monkeypatch.setattr(opening, "self_test", lambda *_, **__: None)
    monkeypatch.setattr(bit_test, "_IN_A_ROUND", 1)
    header: Any = SimpleNamespace(round=1, adapter=b"a" * 32)
    job = job_on(tmp_path / "opened", bert, texts)
    try:
        start, before = start_of(job.plan), job.ledger_head()
        refused = pytest.raises(ModelError, match="depend on the device")
        with pretended.other_bits(THERE), refused:
            job.compute(header, start)
        assert job.ledger_head() == before
        job.compute(header, start)
        assert job.ledger_head() != before
    finally:
        job.close()


@pytest.mark.full
def test_training_alone_is_that_of_one_device(
    bert: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "require_device", lambda name, **_: None)
    monkeypatch.setattr(device, "require_devices", lambda names, **_: None)
    plan = plan_for(bert, LABELLED, training=one_round(8, steps=2))
    found = []
    for devices in (ONE, BOTH):
        settings: Any = SimpleNamespace(
            threads=1,
            model=ModelConfig(path=str(bert), device=devices, split="records"),
            physical_batch_size=2,
            data=DataConfig(path=str(texts), public_size=8),
        )
        records = load_records(texts, LABELLED)
        result = fine_tune(
            settings,
            plan,
            records,
            Validation(records, patience=3),
            lambda *_: None,
            public_size=10,
            entropy=zeros,
        )
        found.append(result.adapter)
    assert difference(found[1], found[0]) < CLOSE


# How much at once.


def test_the_device_with_the_least_room_decides_how_many_records_are_computed_at_once(
    llama: Path,
) -> None:
    plan = plan_for(llama, ANSWERS, training=one_round(64))
    model = loaded(llama, plan, BOTH)
    most = find_physical_batch_size(model)
    # Each copy computes its share: the largest batch, 64 + 4 x 8, is divided.
    assert most == 48
    found = []
    for place in BOTH:
        with pretended.memory_of(2 << 20, place):
            found.append(find_physical_batch_size(model))
    assert found[0] == found[1]
    assert 1 <= found[0] < most


def test_the_parts_of_a_step_are_computed_by_all_copies_and_scores_by_one(bert: Path) -> None:
    plan = plan_for(bert, LABELLED, training=one_round(64, steps=3))
    # 96 records in eights, and one length.
    assert most_parts(plan, BatchLimit(8), 1, 0.0, 64.0) == 3 * 13
    assert most_parts(plan, BatchLimit(8), 1, 0.0, 64.0, copies=2) == 3 * 7
    scored = most_parts(plan, BatchLimit(8), 1, 16.0, 64.0, copies=2) - 3 * 7
    assert scored == most_parts(plan, BatchLimit(8), 1, 16.0, 64.0) - 3 * 13
