"""Every path of training and evaluation on a pretended device gives what it gives on the CPU.

The pretended device finds what mixes devices, what waits for the device, and what does not recover
when its memory ends. What a GPU's own kernels compute is found on a GPU only.
"""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support import pretended
from support.on_devices import start_of, zeros
from support.small_models import one_round, plan_for, save_decoder

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Turn
from umbel_client.data.records import load_records
from umbel_client.dpsgd.batch_size import find_physical_batch_size, free_memory
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.evaluation.inference import Sampling, answer_prompts, classify_texts
from umbel_client.evaluation.losses import losses_and_labels, record_losses
from umbel_client.evaluation.score import options_for, score
from umbel_client.models import site_model
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.folder import write_adapter
from umbel_client.models.adapters.merge import merge_adapter
from umbel_client.planning.trial import PublicData, loss_after_training
from umbel_client.privacy.calibration import SiteNoise
from umbel_client.tasks.prepared import PreparedData, prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import task_of
from umbel_client.training.largest_record import largest_record_test
from umbel_client.training.round import LocalTrainer, RoundResult
from umbel_client.training.self_test import self_test
from umbel_common.adapters.vector import Vector, initial_vector
from umbel_common.plans.plan import (
    Adam,
    CausalLm,
    Classification,
    NoPrivacy,
    Training,
    TrainingPlan,
)

torch.set_num_threads(1)

HERE, THERE = pretended.DEVICES
LABELLED = Classification(labels=("a", "b"))
STOCK = Classification(labels=("a", "b"), head="stock")
ANSWERS = CausalLm(max_tokens=32)
CLOSE = 1e-5
"""Largest difference of two adapters: attention is computed by other kernels than on the CPU."""

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"), num_hidden_layers=2, hidden_size=16)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert all(memory.limit is None for memory in pretended.MEMORY.values())


def loaded(
    folder: Path, plan: TrainingPlan, file: Path, device: str, **how: Any
) -> tuple[AdaptedModel, PreparedData]:
    model = AdaptedModel.load(folder, plan, device=device, **how)
    model.set_vector(start_of(plan))
    assert {str(p.device) for p in model.parameters()} == {device}
    data = prepare(model, folder, load_records(file, plan.task), BatchLimit(4), cache=None)
    return model, data


def trained(
    model: AdaptedModel, data: PreparedData, limit: BatchLimit, number: int = 1
) -> RoundResult:
    private = not isinstance(model.plan.privacy, NoPrivacy)
    noise = SiteNoise(0.9, 0.01 if private else None)
    return LocalTrainer(model, data, noise, zeros, limit).round(number, start_of(model.plan))


def difference(found: Vector, wanted: Vector) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_a_tensor_of_another_device_is_refused_as_on_a_gpu() -> None:
    here, there, host = torch.ones(2, device=HERE), torch.ones(2, device=THERE), torch.ones(2)
    for one, other in ((here, there), (here, host), (host, there)):
        with pytest.raises(RuntimeError, match="mixed devices in aten::add"):
            one + other
    assert (here + here.sum() + 1).cpu().tolist() == [4.0, 4.0]
    with pytest.raises(TypeError, match="can't convert"):
        here.numpy()


def test_what_the_host_reads_of_a_device_is_counted() -> None:
    count = pretended.Counted()
    values = torch.ones(3).to(HERE)
    assert (count.writes, count.reads) == (Counter({"aten::copy_": 1}), Counter())
    values.mul_(2)
    assert values.sum().item() == 6.0
    values[values > 1] = 0
    assert values.cpu().tolist() == [0.0] * 3
    assert sum(count.reads.values()) == 3


def test_a_device_has_as_much_memory_as_it_says() -> None:
    gc.collect()
    before = pretended.MEMORY[HERE].used
    with pretended.memory_of(1000) as memory:
        held = torch.zeros(200, device=HERE)
        assert memory.used == before + 800
        assert held.view(2, 100)[0].sum().item() == 0.0
        with pytest.raises(torch.OutOfMemoryError):
            held + 1
        del held
        gc.collect()
        assert memory.used == before
        torch.zeros(240, device=HERE)
        torch.zeros(10_000, device=THERE)


Case = tuple[str, Any, dict[str, Any], dict[str, Any]]
FAST: dict[str, Case] = {
    "a cached encoder": ("bert", LABELLED, {"layers": (1,)}, {}),
    "a language model": ("llama", ANSWERS, {"method": "alternate"}, {}),
}
FULL: dict[str, Case] = {
    "a head alone": ("bert", LABELLED, {"target_modules": ()}, {}),
    "a stock head": ("bert", STOCK, {}, {}),
    "an encoder, ffa": ("bert", LABELLED, {"method": "ffa"}, {}),
    "an encoder, alternate": ("bert", LABELLED, {"method": "alternate"}, {}),
    "eight bits": ("llama", ANSWERS, {}, {"quantisation": "int8"}),
    "checkpointing": ("llama", ANSWERS, {}, {"checkpointing": True}),
    "a cached language model": ("llama", ANSWERS, {"layers": (1,)}, {}),
}
CASES = [
    *(pytest.param(case, id=name) for name, case in FAST.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.full) for name, case in FULL.items()),
]


@pytest.fixture
def parts(
    tiny_model: Path, llama: Path, texts: Path, pairs: Path
) -> Callable[[Case], tuple[Path, Path, Any, dict[str, Any], dict[str, Any]]]:
    places = {"bert": (tiny_model, texts), "llama": (llama, pairs)}

    def of(case: Case) -> Any:
        kind, task, lora, how = case
        return (*places[kind], task, lora, how)

    return of


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
        for device in ("cpu", THERE)
    }
    for here, there in zip(found["cpu"], found[THERE], strict=True):
        assert difference(there, here) < CLOSE


@pytest.mark.parametrize("case", CASES[:1] + CASES[2:])
def test_a_plain_round_is_the_cpus(parts: Any, case: Case) -> None:
    folder, file, task, lora, how = parts(case)
    optimizer = Adam(adapter_learning_rate=1e-3, head_learning_rate=1e-2)
    training = Training(
        rounds=1, local_steps=2, expected_batch_size=8, optimizer=optimizer, average_decay=0.5
    )
    plan = plan_for(folder, task, lora=lora, training=training, privacy=NoPrivacy())
    found = [
        trained(*loaded(folder, plan, file, device, **how), BatchLimit(4)).delta
        for device in ("cpu", HERE)
    ]
    assert difference(found[1], found[0]) < CLOSE


@pytest.mark.parametrize("case", [CASES[0], CASES[1]])
def test_a_step_waits_for_its_device_once_for_each_physical_batch(parts: Any, case: Case) -> None:
    """However many records a physical batch has, the host reads one value: whether all gradients
    are finite. It writes the inputs, the labels and, for a language model, which tokens count; and
    for each step its noise."""
    folder, file, task, lora, how = parts(case)
    plan = plan_for(folder, task, lora=lora)
    model, data = loaded(folder, plan, file, HERE, **how)
    lengths = data.padded
    alike = np.flatnonzero(lengths == np.bincount(lengths).argmax())
    assert len(alike) >= 4

    def counted(records: int, limit: int) -> tuple[int, int]:
        parameters = list(model.select(1).values())
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            StepNoise(zeros, parameters, steps=1),
            noise_multiplier=1.0,
            clip_norm=1.0,
            expected_batch_size=1.0,
        )
        count = pretended.Counted()
        with per_record_gradients(model):
            private_step(task_of(task), model, data, alike[:records], optimizer, BatchLimit(limit))
        return sum(count.reads.values()), sum(count.writes.values())

    writes = 5 if isinstance(task, CausalLm) else 3
    assert counted(1, 4) == counted(4, 4) == (1, 1 + writes)
    assert counted(4, 1) == (4, 1 + 4 * writes)


def test_a_step_that_runs_out_of_a_devices_memory_is_done_in_smaller_parts(
    llama: Path, pairs: Path
) -> None:
    plan = plan_for(llama, ANSWERS, training=one_round(8))
    model, data = loaded(llama, plan, pairs, HERE)
    limit = BatchLimit(8)
    wanted = trained(model, data, limit).delta
    assert limit.records == 8
    memory = pretended.MEMORY[HERE]
    memory.peak = memory.used
    trained(model, data, BatchLimit(8))
    needed = memory.peak - memory.used
    with pretended.memory_of(needed * 3 // 4):
        found = trained(model, data, limit).delta
    assert limit.records < 8
    assert difference(found, wanted) < CLOSE


def test_the_search_for_a_batch_size_asks_the_device(tiny_model: Path, texts: Path) -> None:
    plan = plan_for(tiny_model, LABELLED, training=one_round(64))
    model, _ = loaded(tiny_model, plan, texts, HERE)
    with pretended.memory_of(4 << 20):
        assert free_memory(model.device) == 4 << 20
        few = find_physical_batch_size(model)
    with pretended.memory_of(64 << 20):
        assert 1 <= few < find_physical_batch_size(model)


def test_answers_labels_and_figures_are_the_cpus(
    tiny_model: Path,
    llama: Path,
    texts: Path,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_for(llama, ANSWERS)
    said, losses, figures = [], [], []
    for device in ("cpu", HERE):
        model, data = loaded(llama, plan, pairs, device)
        chat = Chat.load(llama, ANSWERS, model.files)
        asked = [[Turn("user", "q")], [Turn("user", "qq")]]
        with monkeypatch.context() as patched:
            patched.setattr(torch, "tensor", pretended.tensor)
            said.append(list(answer_prompts(model, chat, asked, Sampling(max_new_tokens=4))))
        losses.append(record_losses(model, data, BatchLimit(4)))
    assert said[0] == said[1]
    assert np.allclose(losses[0], losses[1], rtol=1e-5)
    plan = plan_for(tiny_model, LABELLED)
    labels = []
    for device in ("cpu", THERE):
        model, data = loaded(tiny_model, plan, texts, device)
        labels.append(
            [
                *losses_and_labels(model, data, BatchLimit(4)),
                [one.probability for one in classify_texts(model, data.tokens)],
            ]
        )
        figures.append(score(model, tiny_model, texts, options_for(LABELLED, columns={})))
    for one, other in zip(*labels, strict=True):
        assert np.allclose(one, other, rtol=1e-4)
    assert figures[0].figures == figures[1].figures


def test_a_merged_model_has_the_cpus_weights(tmp_path: Path, llama: Path) -> None:
    plan = plan_for(llama, ANSWERS)
    adapter = tmp_path / "adapter"
    write_adapter(adapter, plan, start_of(plan), None, base_model=llama)
    found = []
    for number, device in enumerate(("cpu", HERE)):
        out = tmp_path / str(number)
        merge_adapter(adapter, llama, out, dtype="float32", device=torch.device(device))
        found.append(load_file(out / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(np.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


@pytest.mark.full
def test_a_trial_of_the_tuner_is_the_cpus(
    tiny_model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny_model, LABELLED, training=one_round(4, steps=2))
    monkeypatch.setattr(site_model, "chosen_device", lambda name, **_: torch.device(name))
    monkeypatch.setattr(site_model, "prepare_training", lambda *_, **__: None)
    # A CPU may be faster in bfloat16, which the pretended device does not offer.
    monkeypatch.setattr(site_model, "fastest_precision", lambda _device: "float32")
    losses = []
    for device in ("cpu", THERE):
        data = PublicData.load(plan, tiny_model, texts, {}, share=0.5, seed=1, device=device)
        assert str(data.model.device) == device
        losses.append(loss_after_training(plan, data, public_size=100, sites=1, seed=1))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("case", [*FAST.values(), *FULL.values()], ids=[*FAST, *FULL])
def test_the_tests_before_a_job_pass_on_a_device(parts: Any, case: Case) -> None:
    folder, _, task, lora, how = parts(case)
    plan = plan_for(folder, task, lora=lora)
    choices = []
    for device in ("cpu", THERE):
        model = AdaptedModel.load(folder, plan, device=device, **how)
        model.set_vector(initial_vector(plan))
        limit = BatchLimit(4)
        largest_record_test(model)
        self_test(model, 1.0, limit, entropy=os.urandom)
        choices.append(limit.choices)
    assert choices[0] == choices[1]
