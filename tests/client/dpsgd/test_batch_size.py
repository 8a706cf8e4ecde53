"""The number of records at once, from what a record takes and what memory is free."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.architectures import save_architecture
from support.small_models import one_round, plan_for

from umbel_client.dpsgd.batch_size import (
    SHARE,
    TOKENS_AT_ONCE,
    UNKNOWN,
    find_physical_batch_size,
    free_memory,
    record_bytes,
    saved_bytes,
)
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.targets import all_linear
from umbel_client.models.inputs import Batch, PooledInputs, TokenInputs
from umbel_common.errors import ModelError
from umbel_common.plans.plan import Classification, NoPrivacy, TrainingPlan

torch.set_num_threads(1)

CPU = torch.device("cpu")
MEBI = 2**20


def plan_of(
    folder: Path, max_tokens: int = 16, lora: dict | None = None, **parts: object
) -> TrainingPlan:
    task = Classification(labels=("a", "b", "c"), max_tokens=max_tokens)
    return plan_for(folder, task, lora, **{"training": one_round(400), **parts})


def loaded(folder: Path, plan: TrainingPlan) -> AdaptedModel:
    model = AdaptedModel.load(folder, plan)
    model.set_vector(np.full(plan.lora.size, 0.1, dtype=np.float32))
    model.select(1)
    return model


def tokens_batch(records: int, tokens: int) -> Batch:
    mask = torch.ones(records, tokens, dtype=torch.int64)
    return Batch(TokenInputs(mask, mask), torch.zeros(records, dtype=torch.int64))


def test_the_width_of_a_model_with_a_tower_is_that_of_its_text(tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "m", "Gemma3")
    task = Classification(labels=("a", "b", "c"), max_tokens=16)
    for targets in ((), all_linear(folder, task)):
        model = loaded(folder, plan_of(folder, lora={"target_modules": targets}))
        assert find_physical_batch_size(model) > 1


def test_a_head_alone_keeps_what_can_be_counted_by_hand(tiny_model: Path) -> None:
    """Its input, the log probabilities, the label; not its weight, nor a storage twice."""
    plan = plan_of(tiny_model, lora={"target_modules": ()})
    model = loaded(tiny_model, plan)
    found = [
        saved_bytes(
            model, Batch(PooledInputs(torch.ones(n, 16)), torch.zeros(n, dtype=torch.int64))
        )
        for n in (1, 2, 9)
    ]
    record = 16 * 4 + 3 * 4 + 8
    # Cross entropy also keeps the sum of its weights, whatever the number of records.
    assert [size - n * record for n, size in zip((1, 2, 9), found, strict=True)] == [4, 4, 4]


def test_activations_grow_with_records_and_tokens(tiny_model: Path) -> None:
    model = loaded(tiny_model, plan_of(tiny_model))
    one, two, nine = (saved_bytes(model, tokens_batch(n, 16)) for n in (1, 2, 9))
    assert abs(nine - one - 8 * (two - one)) < 0.01 * nine
    # A layer keeps several vectors of each token at least.
    assert two - one > 2 * 4 * 16 * 16 * 4
    longer = saved_bytes(model, tokens_batch(1, 32))
    assert 1.8 * one < longer < 4 * one


def test_weights_are_not_counted(tiny_model: Path) -> None:
    """Frozen weights are kept for the backward pass, too, and are there anyway."""
    model = loaded(tiny_model, plan_of(tiny_model))
    kept: list[torch.Tensor] = []
    batch = tokens_batch(1, 4)
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor.detach(), lambda tensor: tensor
        ),
        torch.enable_grad(),
    ):
        losses = model.logits(batch.inputs)
    weights = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    assert any(tensor.untyped_storage().data_ptr() in weights for tensor in kept)
    every = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert saved_bytes(model, batch) < sum(every.values())
    del losses


def test_a_records_gradient_is_four_bytes_an_element_of_the_largest_kind_of_round(
    tiny_model: Path,
) -> None:
    sizes = {}
    for method in ("both", "ffa", "alternate"):
        training = msgspec.structs.replace(one_round(400), rounds=2)
        plan = plan_of(tiny_model, lora={"method": method}, training=training)
        model = loaded(tiny_model, plan)
        _, activations, gradients = record_bytes(model)
        rounds = [sum(t.size for t in plan.trained_tensors(number)) for number in (1, 2)]
        # With `alternate` that of A is the larger: it keeps the inputs of its layers.
        assert gradients == 4 * rounds[1]
        sizes[method] = activations
    assert sizes["ffa"] < sizes["alternate"] < sizes["both"]


def test_without_privacy_no_record_has_a_gradient_of_its_own(tiny_model: Path) -> None:
    model = loaded(tiny_model, plan_of(tiny_model, privacy=NoPrivacy()))
    assert record_bytes(model)[2] == 0


def test_as_many_records_as_fit_into_a_share_of_the_free_memory(tiny_model: Path) -> None:
    model = loaded(tiny_model, plan_of(tiny_model))
    fixed, activations, gradients = record_bytes(model)
    assert gradients < activations
    for records in (1, 7, 20):
        free = int((fixed + (records + 0.5) * (activations + gradients)) / SHARE)
        assert find_physical_batch_size(model, free=free) == records


def test_gradients_take_half_of_the_share_at_most(tiny_model: Path) -> None:
    """Four tokens with an adapter of rank 64: a record's gradient outweighs its activations."""
    model = loaded(tiny_model, plan_of(tiny_model, 4, {"rank": 64}))
    _, activations, gradients = record_bytes(model)
    assert gradients > 2 * activations
    free = int(20.5 * gradients / SHARE)
    assert find_physical_batch_size(model, free=free) == 10


def test_a_unit_always_fits_and_one_record_always_does(tiny_model: Path) -> None:
    model = loaded(tiny_model, plan_of(tiny_model))
    assert find_physical_batch_size(model, free=0) == 1
    assert find_physical_batch_size(model, free=0, records_per_unit=32) == 32


def test_more_than_is_useful_is_not_taken(tiny_model: Path) -> None:
    plenty = 2**50
    long = loaded(tiny_model, plan_of(tiny_model, 64))
    assert find_physical_batch_size(long, free=plenty) == TOKENS_AT_ONCE // 64
    # The mean and four standard deviations of a Poisson batch.
    few = loaded(tiny_model, plan_of(tiny_model, training=one_round(9)))
    assert find_physical_batch_size(few, free=plenty) == 21
    head = loaded(tiny_model, plan_of(tiny_model, 64, {"target_modules": ()}))
    assert find_physical_batch_size(head, free=plenty) == 480


def test_what_the_cache_of_frozen_layers_saves_is_not_counted(tiny_model: Path) -> None:
    model = loaded(tiny_model, plan_of(tiny_model, lora={"layers": (1,)}))
    assert model.frozen_output == "hidden"
    cached = record_bytes(model)[1]
    model.frozen_output = "nothing"
    assert cached <= record_bytes(model)[1]
    assert find_physical_batch_size(model, free=2**50) > 1


def test_two_records_that_do_not_fit_are_an_error_that_says_what_to_do(tiny_model: Path) -> None:
    model = loaded(tiny_model, plan_of(tiny_model))

    def run_out(*_given: object) -> None:
        raise torch.OutOfMemoryError("made up")

    model.base.register_forward_pre_hook(run_out)
    with pytest.raises(ModelError, match="two records do not fit") as caught:
        find_physical_batch_size(model, free=MEBI)
    assert caught.value.exit_code == 12
    assert caught.value.found == "16 tokens in each"


def root_with(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


MEMINFO = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    8192 kB\n"


def test_free_memory_is_what_the_system_says(tmp_path: Path) -> None:
    assert free_memory(CPU, root_with(tmp_path, {"proc/meminfo": MEMINFO})) == 8 * MEBI


def test_a_control_group_around_the_process_may_leave_less(tmp_path: Path) -> None:
    """Version 2; the limit of an outer group counts, cached files do not."""
    root = root_with(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/site.slice/trainer.service\n",
            "sys/fs/cgroup/site.slice/trainer.service/memory.max": "max\n",
            "sys/fs/cgroup/site.slice/trainer.service/memory.current": f"{MEBI}\n",
            "sys/fs/cgroup/site.slice/memory.max": f"{6 * MEBI}\n",
            "sys/fs/cgroup/site.slice/memory.current": f"{3 * MEBI}\n",
            "sys/fs/cgroup/site.slice/memory.stat": f"anon 7\ninactive_file {MEBI}\n",
        },
    )
    assert free_memory(CPU, root) == 4 * MEBI
    (root / "sys/fs/cgroup/site.slice/memory.current").write_text(f"{9 * MEBI}\n")
    assert free_memory(CPU, root) == 0


def test_a_control_group_of_the_first_version_counts_too(tmp_path: Path) -> None:
    """In a container the group's name is the host's, and the mounted top is the group."""
    root = root_with(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{5 * MEBI}",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * MEBI}",
        },
    )
    assert free_memory(CPU, root) == 2 * MEBI


def test_a_system_that_does_not_say_gets_a_cautious_number(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_memory(CPU, tmp_path) is None
    model = loaded(tiny_model, plan_of(tiny_model))
    monkeypatch.setattr("umbel_client.dpsgd.batch_size.free_memory", lambda _device: None)
    assert find_physical_batch_size(model) == UNKNOWN


@pytest.mark.skipif(
    not Path("/proc/meminfo").exists(), reason="only Linux says how much memory is free"
)
def test_this_machine_has_some_memory_and_a_size(tiny_model: Path) -> None:
    free = free_memory(CPU)
    assert free is not None
    assert MEBI < free < 2**50
    assert find_physical_batch_size(loaded(tiny_model, plan_of(tiny_model))) >= 1
