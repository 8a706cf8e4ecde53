"""A model whose layers are spread over two pretended devices trains as it does on one.

What two GPUs do, and how fast, is not shown here: see `tests/support/pretended.py`.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import pretended
from support.on_devices import save_narrow_bert, start_of, zeros
from support.small_models import one_round, plan_for, save_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Turn
from umbel_client.data.records import load_records
from umbel_client.dpsgd.batch_size import find_physical_batch_size, record_bytes
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.evaluation.inference import Sampling, answer_prompts
from umbel_client.evaluation.losses import record_losses
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base import spread
from umbel_client.models.base.placement import AsComputed
from umbel_client.models.base.skeleton import skeleton
from umbel_client.models.inputs import TokenInputs
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.tasks.physical_batches import ran_out_of_memory
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import task_of
from umbel_client.training.largest_record import largest_record_test
from umbel_client.training.round import LocalTrainer, RoundResult
from umbel_client.training.self_test import self_test
from umbel_common.adapters.vector import Vector, initial_vector
from umbel_common.errors import ModelError
from umbel_common.plans.plan import (
    Adam,
    CausalLm,
    Classification,
    NoPrivacy,
    Training,
    TrainingPlan,
)

torch.set_num_threads(1)

BOTH = pretended.DEVICES
HERE, THERE = BOTH
LABELLED = Classification(labels=("a", "b"))
STOCK = Classification(labels=("a", "b"), head="stock")
ANSWERS = CausalLm(max_tokens=32)
CLOSE = 1e-6
"""Largest difference of two adapters, relative to their length."""
NEXT_TO_NOTHING = 1e-9
"""A noise multiplier: where blocks of noise begin depends on the devices."""

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"), num_hidden_layers=4, hidden_size=16)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_narrow_bert(tmp_path_factory.mktemp("bert"), layers=4)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert all(memory.limit is None for memory in pretended.MEMORY.values())


def loaded(
    folder: Path, plan: TrainingPlan, file: Path, device: str | tuple[str, ...], **how: Any
) -> tuple[AdaptedModel, PreparedData]:
    model = AdaptedModel.load(folder, plan, device=device, **how)
    model.set_vector(start_of(plan))
    assert tuple(map(str, model.devices)) == ((device,) if isinstance(device, str) else device)
    data = prepare(model, folder, load_records(file, plan.task), BatchLimit(4), cache=None)
    return model, data


def trained(
    model: AdaptedModel,
    data: PreparedData,
    limit: BatchLimit,
    number: int = 1,
    sampling_rate: float = 0.9,
) -> RoundResult:
    private = not isinstance(model.plan.privacy, NoPrivacy)
    noise = SiteNoise(sampling_rate, NEXT_TO_NOTHING if private else None)
    trainer = LocalTrainer(model, data, noise, zeros, limit)
    return trainer.round(number, start_of(model.plan))


def difference(found: Vector, wanted: Vector) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


Case = tuple[str, Any, dict[str, Any], dict[str, Any]]
FAST: dict[str, Case] = {
    "an encoder": ("bert", LABELLED, {"method": "alternate"}, {}),
    "a language model": ("llama", ANSWERS, {}, {"checkpointing": True}),
}
FULL: dict[str, Case] = {
    "a stock head": ("bert", STOCK, {}, {}),
    "a head alone": ("bert", LABELLED, {"target_modules": ()}, {}),
    "a cached encoder": ("bert", LABELLED, {"layers": (1, 2)}, {}),
    "a cache up to the second device": ("bert", LABELLED, {"layers": (2, 3)}, {}),
    "a language model, alternate": ("llama", ANSWERS, {"method": "alternate"}, {}),
    "all linear layers": (
        "llama",
        ANSWERS,
        {"target_modules": ("q_proj", "o_proj", "up_proj", "down_proj"), "method": "ffa"},
        {},
    ),
}
CASES = [
    *(pytest.param(case, id=name) for name, case in FAST.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.full) for name, case in FULL.items()),
]


@pytest.fixture
def parts(
    bert: Path, llama: Path, texts: Path, pairs: Path
) -> Callable[[Case], tuple[Path, Path, Any, dict[str, Any], dict[str, Any]]]:
    places = {"bert": (bert, texts), "llama": (llama, pairs)}

    def of(case: Case) -> Any:
        kind, task, lora, how = case
        return (*places[kind], task, lora, how)

    return of


def test_layers_are_where_they_compute_and_all_else_is_on_the_first_device(llama: Path) -> None:
    plan = plan_for(llama, ANSWERS)
    model = AdaptedModel.load(llama, plan, device=BOTH)
    devices = {name: str(parameter.device) for name, parameter in model.base.named_parameters()}
    for name, device in devices.items():
        # Of four layers, and their adapters, one: it has the embedding and the output layer.
        there = any(f".layers.{number}." in name for number in (1, 2, 3))
        assert device == (THERE if there else HERE), name
    assert {str(model.adapter[name].device) for name in model.adapter} == set(BOTH)


def test_a_layer_goes_where_the_bytes_are_fewer(llama: Path) -> None:
    """The embedding and the output layer count: the first device has fewer layers for them."""
    devices = tuple(map(torch.device, BOTH))
    empty = skeleton(llama, ANSWERS)
    held = {id(parameter): parameter.numel() * 4.0 for parameter in empty.parameters()}
    size = sum(held[id(one)] for one in empty.model.layers[0].parameters())
    outer = sum(held.values()) - 4 * size
    for factor, first in ((0.0, 2), (2 * size / outer, 1), (4 * size / outer, 0)):
        for one in (empty.model.embed_tokens.weight, empty.lm_head.weight, empty.model.norm.weight):
            held[id(one)] = one.numel() * 4.0 * factor
        chosen = spread.balanced(empty, held, devices)
        assert chosen == (devices[0],) * first + (devices[1],) * (4 - first)
    assert spread.balanced(empty, held, devices[:1]) == devices[:1] * 4


def test_what_is_held_in_fewer_bytes_counts_as_fewer(tmp_path: Path) -> None:
    """Embeddings stay float32, so in bfloat16 they weigh as much as twice the layers."""
    folder = save_decoder(tmp_path / "m", num_hidden_layers=8, tie_word_embeddings=True)
    empty, devices = skeleton(folder, ANSWERS), tuple(map(torch.device, BOTH))
    first = [
        AsComputed(devices, precision, quantisation).layer_devices(empty, ANSWERS).count(devices[0])
        for precision, quantisation in (
            ("float32", "none"),
            ("bfloat16", "none"),
            ("float32", "nf4"),
        )
    ]
    assert first[0] >= first[1] >= first[2]
    assert first[0] > first[2]


def test_a_model_that_cannot_be_spread_is_refused_with_one_device_as_the_remedy(
    tmp_path: Path, llama: Path
) -> None:
    gpt2 = save_decoder(tmp_path / "gpt2", "gpt2")
    plan = plan_for(gpt2, ANSWERS, lora={"target_modules": ("c_attn",)})
    with pytest.raises(ModelError, match="cannot be spread") as error:
        AdaptedModel.load(gpt2, plan, device=BOTH)
    assert (error.value.field, error.value.accepted) == ("model.device", "one device")
    assert "GPT2LMHeadModel" in str(error.value.found)
    short = save_decoder(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(ModelError, match="cannot be spread") as error:
        AdaptedModel.load(short, plan_for(short, ANSWERS), device=BOTH)
    assert "1 layers, and 2 devices" in str(error.value.found)


def test_layers_that_share_a_weight_are_not_spread(llama: Path) -> None:
    empty = skeleton(llama, ANSWERS)
    empty.model.layers[3].self_attn.q_proj.weight = empty.model.layers[0].self_attn.q_proj.weight
    held = {id(parameter): 1.0 for parameter in empty.parameters()}
    with pytest.raises(ModelError, match="cannot be spread") as error:
        spread.balanced(empty, held, tuple(map(torch.device, BOTH)))
    assert "share a weight" in str(error.value.found)


def test_devices_that_do_not_reach_each_other_are_found_before_a_model_is_read(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = pretended.Pretended.to

    def zeros(self: Any, *args: Any, **kwargs: Any) -> Any:
        copied = sound(self, *args, **kwargs)
        return copied * (str(self.device) != THERE or str(copied.device) != HERE)

    spread.require_exact_copies(tuple(map(torch.device, BOTH)))
    monkeypatch.setattr(pretended.Pretended, "to", zeros)
    with pytest.raises(ModelError, match="changes what it copies") as error:
        AdaptedModel.load(tmp_path / "none", plan_for(llama, ANSWERS), device=BOTH)
    assert (error.value.field, error.value.found) == ("model.device", f"{THERE} to {HERE}")
    with pytest.raises(ModelError) as other:
        AdaptedModel.load(tmp_path / "none", plan_for(llama, ANSWERS), device=HERE)
    assert other.value.field != "model.device"


@pytest.mark.parametrize("case", CASES)
def test_a_private_round_is_the_cpus(parts: Any, case: Case) -> None:
    folder, file, task, lora, how = parts(case)
    plan = plan_for(folder, task, lora=lora, training=one_round(8, steps=2))
    rounds = (1, 2) if plan.lora.method == "alternate" else (1,)
    found = {
        device: [
            trained(model, data, BatchLimit(4), number).delta
            for model, data in [loaded(folder, plan, file, device, **how)]
            for number in rounds
        ]
        for device in ("cpu", BOTH)
    }
    for here, there in zip(found["cpu"], found[BOTH], strict=True):
        assert difference(there, here) < CLOSE


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[6]])
def test_a_plain_round_is_the_cpus(parts: Any, case: Case) -> None:
    folder, file, task, lora, how = parts(case)
    optimizer = Adam(adapter_learning_rate=1e-3, head_learning_rate=1e-2)
    training = Training(
        rounds=1, local_steps=2, expected_batch_size=8, optimizer=optimizer, average_decay=0.5
    )
    plan = plan_for(folder, task, lora=lora, training=training, privacy=NoPrivacy())
    found = [
        trained(*loaded(folder, plan, file, device, **how), BatchLimit(4)).delta
        for device in ("cpu", BOTH)
    ]
    assert difference(found[1], found[0]) < 1e-5  # Adam divides by gradients next to zero


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[6]])
def test_the_cache_of_frozen_layers_is_that_of_one_device(parts: Any, case: Case) -> None:
    folder, file, task, _, _ = parts(case)
    for layers in ((1, 2), (3,)):
        plan = plan_for(folder, task, lora={"layers": layers})
        one, other = (loaded(folder, plan, file, device)[1].prefix for device in (HERE, BOTH))
        assert one is not None
        assert other is not None
        assert np.array_equal(one.values, other.values)


@pytest.mark.parametrize("case", [CASES[0], CASES[1]])
def test_a_step_waits_for_its_devices_once_for_each_physical_batch(parts: Any, case: Case) -> None:
    """The host reads whether all gradients are finite, and no second value for a second device. It
    writes noise to each device, and the batch to the first."""
    folder, file, task, _, _ = parts(case)
    model, data = loaded(folder, plan_for(folder, task), file, BOTH)
    lengths = data.padded
    alike = np.flatnonzero(lengths == np.bincount(lengths).argmax())
    parameters = list(model.select(1).values())
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        StepNoise(os.urandom, parameters, steps=1),
        noise_multiplier=1.0,
        clip_norm=1.0,
        expected_batch_size=1.0,
    )
    count = pretended.Counted()
    with per_record_gradients(model):
        private_step(task_of(task), model, data, alike[:4], optimizer, BatchLimit(4))
    inputs = 5 if isinstance(task, CausalLm) else 3
    assert (sum(count.reads.values()), sum(count.writes.values())) == (1, 2 + inputs)


def test_a_mask_is_copied_once_for_all_layers_of_a_device() -> None:
    copies = spread.WeakTensorKeyDictionary()
    there, mask = torch.device(THERE), torch.ones(2, 3, device=HERE)
    copy = spread._there(there, copies, mask)
    assert (str(copy.device), copy.cpu().tolist()) == (THERE, mask.cpu().tolist())
    assert spread._there(there, copies, mask) is copy
    assert spread._there(there, copies, (mask, [copy, None])) == (copy, [copy, None])
    mask[0] = 0
    assert spread._there(there, copies, mask).cpu().tolist() == [[0.0] * 3, [1.0] * 3]
    gradient = torch.ones(2, device=HERE, requires_grad=True)
    one, other = (spread._there(there, copies, gradient) for _ in range(2))
    assert one is not other
    (one.sum() + 2 * other.sum()).backward()
    assert str(gradient.grad.device) == HERE
    assert gradient.grad.cpu().tolist() == [3.0, 3.0]
    assert len(copies) == 1
    del mask
    gc.collect()
    assert len(copies) == 0


def test_a_model_that_one_device_has_no_room_for_trains_on_two(tmp_path: Path, pairs: Path) -> None:
    folder = save_decoder(
        tmp_path / "m", num_hidden_layers=6, hidden_size=96, intermediate_size=512
    )
    plan = plan_for(folder, ANSWERS, training=one_round(8))
    saving = {"checkpointing": True}
    model, data = loaded(folder, plan, pairs, HERE, **saving)
    wanted = trained(model, data, BatchLimit(1), sampling_rate=0.4).delta
    assert np.linalg.norm(wanted) > 1e-3
    size = sum(parameter.numel() * 4 for parameter in model.base.parameters())
    del model, data
    gc.collect()
    room = int(0.8 * size)
    with ExitStack() as limits:
        for device in BOTH:
            limits.enter_context(pretended.memory_of(room, device))
        with pytest.raises((torch.OutOfMemoryError, ModelError), match="out of memory"):
            AdaptedModel.load(folder, plan, device=HERE)
        gc.collect()
        model, data = loaded(folder, plan, pairs, BOTH, **saving)
        found = trained(model, data, BatchLimit(1), sampling_rate=0.4).delta
    assert difference(found, wanted) < CLOSE


def test_a_step_that_runs_out_of_the_second_devices_memory_is_done_in_smaller_parts(
    llama: Path, pairs: Path
) -> None:
    plan = plan_for(llama, ANSWERS, training=one_round(8))
    model, data = loaded(llama, plan, pairs, BOTH)
    wanted = trained(model, data, BatchLimit(8)).delta
    memory = pretended.MEMORY[THERE]
    memory.peak = memory.used
    trained(model, data, BatchLimit(8))
    needed, limit = memory.peak - memory.used, BatchLimit(8)
    with pretended.memory_of(needed * 3 // 4, THERE):
        found = trained(model, data, limit).delta
    assert limit.records < 8
    assert difference(found, wanted) < CLOSE


def test_the_device_with_the_least_room_decides_how_many_records_are_computed_at_once(
    llama: Path, pairs: Path
) -> None:
    plan = plan_for(llama, ANSWERS, training=one_round(64))
    model, _ = loaded(llama, plan, pairs, BOTH)
    here, there = (record_bytes(model, torch.device(device)) for device in BOTH)
    alone = record_bytes(AdaptedModel.load(llama, plan))
    assert here[2] + there[2] == alone[2]
    assert min(here[1], there[1]) > 0
    found = {}
    for device in BOTH:
        with pretended.memory_of(4 << 20, device):
            found[device] = find_physical_batch_size(model)
    assert 1 <= max(found.values()) < find_physical_batch_size(model)


def test_losses_and_answers_are_the_cpus(
    llama: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(llama, ANSWERS)
    said, losses = [], []
    for device in ("cpu", BOTH):
        model, data = loaded(llama, plan, pairs, device)
        chat = Chat.load(llama, ANSWERS, model.files)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "tensor", pretended.tensor)
            asked = [[Turn("user", "q")], [Turn("user", "qq")]]
            said.append(list(answer_prompts(model, chat, asked, Sampling(max_new_tokens=4))))
        losses.append(record_losses(model, data, BatchLimit(4)))
    assert said[0] == said[1]
    assert np.allclose(losses[0], losses[1], rtol=1e-5)


def test_without_a_copy_between_devices_a_layer_is_refused_its_inputs(llama: Path) -> None:
    """The pretended devices do not help: what is not moved is an error."""
    model = AdaptedModel.load(llama, plan_for(llama, ANSWERS), device=BOTH)
    ids = torch.ones(2, 5, dtype=torch.int64)
    model.logits(TokenInputs(ids, ids))
    for module in model.base.modules():
        module._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="mixed devices"):
        model.logits(TokenInputs(ids, ids))


@pytest.mark.full
@pytest.mark.parametrize("case", [*FAST.values(), *FULL.values()], ids=[*FAST, *FULL])
def test_the_tests_before_a_job_pass(parts: Any, case: Case) -> None:
    folder, _, task, lora, how = parts(case)
    plan = plan_for(folder, task, lora=lora)
    choices = []
    for device in ("cpu", BOTH):
        model = AdaptedModel.load(folder, plan, device=device, **how)
        model.set_vector(initial_vector(plan))
        limit = BatchLimit(4)
        largest_record_test(model)
        self_test(model, 1.0, limit, entropy=os.urandom)
        choices.append(limit.choices)
    assert choices[0] == choices[1]


class RunsOut(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Memory runs out at one operation."""

    def __init__(self, operation: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self._left = operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._left -= 1
        if self._left == 0:
            raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("units", [None, np.array([0, 0, 1])], ids=["records", "units"])
def test_no_part_is_computed_again_of_which_a_device_has_added_something(
    units: np.ndarray[Any, Any] | None,
) -> None:
    """Its gradients would be in that device's sum twice."""
    parameters = [torch.nn.Parameter(torch.zeros(2, device=device)) for device in BOTH]
    outcomes = []
    for operation in range(1, 200):
        with StepNoise(os.urandom, parameters, steps=1) as noise:
            optimizer = PrivateOptimizer(
                torch.optim.SGD(parameters, lr=1.0),
                noise,
                noise_multiplier=1.0,
                clip_norm=1.0,
                expected_batch_size=1.0,
            )
            for parameter in parameters:
                holder: Any = parameter
                holder.grad_sample = torch.ones(3, 2, device=parameter.device)
            try:
                with torch.no_grad(), RunsOut(operation):
                    optimizer.accumulate(3, units)
            except (RuntimeError, MemoryError) as error:
                again = ran_out_of_memory(error)
            else:
                break
            added = any(total.any() for total in optimizer._sums.values())
            assert not (again and added)
            outcomes.append(again)
    assert set(outcomes) == {True, False}
