"""A site's device: the one that its people chose, or one clear error with what to do."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import pretended
from support.small_models import plan_for, save_decoder

from umbel_client.cli import doctor
from umbel_client.dpsgd.fused import fused_linear
from umbel_client.models.base import device as module
from umbel_client.models.base.device import (
    WORKSPACE,
    chosen_device,
    chosen_devices,
    described,
    has_nvidia_gpu,
    prepare_training,
    require_alike,
)
from umbel_client.models.base.precision import chosen_precision, fastest_precision
from umbel_client.models.site_model import load_site_model
from umbel_client.site.config import ModelConfig
from umbel_client.training import device_check
from umbel_client.training.device_check import try_private_step
from umbel_common.device import require_device, require_devices
from umbel_common.errors import ConfigError, ModelError
from umbel_common.plans.plan import CausalLm, Classification, NoPrivacy

GPU, MPS = torch.device("cuda:1"), torch.device("mps")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a machine with a GPU that nobody hides."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    return tmp_path


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves this process as it was."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:", "cuda:x", "cuda:01", "cuda:0,1", "cpu:0", "mps:1", "CUDA", "cpu\n"]
)
def test_a_text_that_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no device") as error:
        require_device(text, field="model.device", file="client.toml")
    assert (error.value.field, error.value.found) == ("model.device", text)


@pytest.mark.parametrize(
    ("devices", "problem", "found"),
    [
        ((), "list of devices is empty", "[]"),
        (("cuda:0", "cpu"), "other things than CUDA devices", "cpu"),
        (("mps", "cuda:0", "cpu"), "other things than CUDA devices", "mps, cpu"),
        (("auto", "cuda:1"), "other things than CUDA devices", "auto"),
        (("auto",), "other things than CUDA devices", "auto"),
        (("cuda:1", "cuda:1"), "one of them twice", "cuda:1, cuda:1"),
        (("cuda", "cuda:0"), "one of them twice", "cuda, cuda:0"),
        (("cuda:0", "cuda:x"), "names no device", "cuda:x"),
    ],
)
def test_a_list_that_is_not_one_of_different_gpus_is_refused(
    devices: tuple[str, ...], problem: str, found: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        require_devices(devices, field="model.device", file="client.toml")
    assert (error.value.field, error.value.found) == ("model.device", found)
    assert error.value.file == "client.toml"
    assert error.value.accepted
    with pytest.raises(ConfigError, match=problem):
        chosen_devices(devices)


def test_a_list_of_gpus_is_each_of_them(two_gpus: None) -> None:
    both = (torch.device("cuda:0"), torch.device("cuda:1"))
    assert chosen_devices(("cuda:0", "cuda:1")) == chosen_devices(("cuda", "cuda:1")) == both
    assert chosen_devices(("cuda:1", "cuda:0")) == both[::-1]
    assert chosen_devices(("cuda:1",)) == chosen_devices("cuda:1") == both[1:]
    assert chosen_devices(("cpu",)) == chosen_devices("cpu") == (torch.device("cpu"),)
    with pytest.raises(ConfigError, match="is not there") as error:
        chosen_devices(("cuda:0", "cuda:2"))
    assert (error.value.field, error.value.found) == ("model.device", "cuda:2")
    assert error.value.accepted == "cuda:0, cuda:1"


def test_an_option_takes_one_device_and_says_where_a_list_goes() -> None:
    with pytest.raises(ConfigError, match="names no device") as error:
        require_device("cuda:0,cuda:1", field="--device")
    assert "model.device in client.toml takes several" in str(error.value.remedy)


def test_auto_is_the_first_gpu(two_gpus: None) -> None:
    assert chosen_device("auto") == chosen_device("cuda") == torch.device("cuda:0")
    assert chosen_device("cuda:1") == torch.device("cuda:1")
    assert chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="is not there") as error:
        chosen_device("cuda:2", field="--device")
    assert error.value.accepted == "cuda:0, cuda:1"
    assert error.value.field == "--device"


def test_auto_is_the_cpu_where_there_is_no_gpu(no_cuda: None, tmp_path: Path) -> None:
    assert chosen_device("auto", root=tmp_path) == torch.device("cpu")
    assert described(torch.device("cpu")) == "cpu"
    with pytest.raises(ConfigError):
        chosen_device("cuda", root=tmp_path)


@pytest.mark.parametrize("choice", ["auto", "cuda", "cuda:1"])
def test_a_pytorch_without_cuda_on_a_machine_with_a_gpu_is_an_error_that_says_what_to_install(
    no_cuda: None, machine: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(ConfigError, match="built without CUDA") as error:
        chosen_device(choice, root=machine)
    assert '"torch==2.13.0"' in (error.value.remedy or "")
    assert error.value.exit_code == 10
    assert chosen_device("cpu", root=machine) == torch.device("cpu")


def test_a_driver_that_is_too_old_is_an_error_and_not_a_slow_start(
    no_cuda: None, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match="no CUDA device") as error:
        chosen_device("auto", root=machine)
    assert "driver for CUDA 13.0" in str(error.value.accepted)


def test_a_gpu_that_another_process_has_alone_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def busy(_device: object) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "get_device_properties", busy)
    with pytest.raises(ConfigError, match="cannot be used") as error:
        described(GPU)
    assert "busy or unavailable" in str(error.value.found)


def test_a_gpu_that_is_hidden_is_none(
    no_cuda: None, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_nvidia_gpu(machine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not has_nvidia_gpu(machine)
    assert chosen_device("auto", root=machine) == torch.device("cpu")


def test_the_driver_knows_of_a_gpu_whose_node_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not has_nvidia_gpu(tmp_path)
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert has_nvidia_gpu(tmp_path)


def test_private_steps_on_cuda_use_deterministic_kernels_only(arithmetic: None) -> None:
    prepare_training(torch.device("cpu"), private=True)
    assert WORKSPACE not in os.environ
    prepare_training(GPU, private=False)
    # Read when cuBLAS first computes: a private job may follow one without privacy.
    assert os.environ[WORKSPACE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    prepare_training(GPU, private=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_mps_is_refused_for_private_training_alone() -> None:
    prepare_training(MPS, private=False)
    with pytest.raises(ConfigError, match="float64") as error:
        prepare_training(MPS, private=True)
    assert error.value.found == "mps"


def test_a_private_job_is_prepared_on_its_device_before_the_model_is_read(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny_model, Classification(labels=("a", "b")))
    plain = plan_for(tiny_model, Classification(labels=("a", "b")), privacy=NoPrivacy())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    nothing = ModelConfig(path=str(tmp_path / "nothing"), device="mps")
    with pytest.raises(ConfigError, match="float64"):
        load_site_model(nothing, plan, trains=True)
    for given, trains in ((plan, False), (plain, True)):
        with pytest.raises(Exception, match="nothing"):
            load_site_model(nothing, given, trains=trains)


def test_a_site_loads_its_model_onto_its_device_and_says_so(
    tiny_model: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "require_device", lambda device, **_: None)
    plan = plan_for(tiny_model, Classification(labels=("a", "b")))
    config = ModelConfig(path=str(tiny_model), precision="fastest", device=pretended.DEVICES[1])
    with caplog.at_level(logging.INFO, "umbel"):
        model = load_site_model(config, plan, trains=True)
    assert model.device == torch.device(pretended.DEVICES[1])
    assert "the model computes on pretend:1 in float32" in caplog.text


def test_a_site_spreads_its_model_over_its_devices_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "require_device", lambda device, **_: None)
    monkeypatch.setattr(module, "require_devices", lambda devices, **_: None)
    folder = save_decoder(tmp_path / "m", hidden_size=16)
    config = ModelConfig(path=str(folder), device=pretended.DEVICES)
    with caplog.at_level(logging.INFO, "umbel"):
        model = load_site_model(config, plan_for(folder, CausalLm(max_tokens=32)), trains=True)
    assert model.devices == tuple(map(torch.device, pretended.DEVICES))
    assert "the model computes on pretend:0, pretend:1 in float32" in caplog.text


def test_a_site_that_divides_records_has_the_whole_model_on_each_device(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "require_device", lambda device, **_: None)
    monkeypatch.setattr(module, "require_devices", lambda devices, **_: None)
    plan = plan_for(tiny_model, Classification(labels=("a", "b")))
    config = ModelConfig(path=str(tiny_model), device=pretended.DEVICES, split="records")
    model = load_site_model(config, plan, trains=True)
    places = tuple(torch.device(name) for name in pretended.DEVICES)
    assert tuple(copy.devices for copy in model.copies) == tuple((place,) for place in places)
    # To score or to answer, one is enough.
    model = load_site_model(config, plan, trains=False)
    assert model.copies == (model,)
    assert model.device == places[0]


def test_copies_of_a_model_are_on_gpus_of_one_kind(
    tmp_path: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["A 40GB", "A 40GB"]

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name=names[device.index], total_memory=40 << 30)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    both = (torch.device("cuda:0"), torch.device("cuda:1"))
    require_alike(both)
    names[1] = "B 40GB"
    for devices in (both[:1], both[1:]):
        require_alike(devices)
    config = ModelConfig(path=str(tmp_path), device=("cuda:0", "cuda:1"), split="records")
    plan: Any = None
    with pytest.raises(ConfigError, match="different kinds of GPU") as error:
        load_site_model(config, plan, trains=True)
    assert error.value.field == "model.device"
    assert error.value.found == "cuda:0 (A 40GB, 40 GiB), cuda:1 (B 40GB, 40 GiB)"


def test_a_device_without_bfloat16_computes_in_float32_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = torch.device(pretended.DEVICES[0])
    assert fastest_precision(device) == "float32"
    assert chosen_precision("fastest", device) == "float32"
    assert not caplog.messages
    assert chosen_precision("bfloat16", device) == "float32"
    assert "does not multiply bfloat16" in caplog.text
    # A CPU that was told to emulate it does, slowly.
    assert chosen_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    assert chosen_precision("float32", GPU) == "float32"
    # What one device computes, the next one takes.
    assert chosen_precision("bfloat16", torch.device("cpu"), device) == "float32"


def test_a_small_private_step_on_a_device_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_private_step(torch.device(pretended.DEVICES[1]), entropy=os.urandom) > 0
    with pytest.raises(ConfigError, match="float64"):
        try_private_step(MPS, entropy=os.urandom)

    def forgets(rows: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
        shown = torch.cat([rows[:1], rows[1:] * (rows.device.type == "cpu")])
        return fused_linear(shown, layer)

    monkeypatch.setattr(device_check, "fused_linear", forgets)
    with pytest.raises(ModelError, match="another private step"):
        try_private_step(torch.device(pretended.DEVICES[0]), entropy=os.urandom)
    with pretended.memory_of(1000), pytest.raises(ModelError, match="cannot compute"):
        try_private_step(torch.device(pretended.DEVICES[0]), entropy=os.urandom)


def test_doctor_names_each_device_of_a_list_and_tries_a_step_on_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "require_device", lambda device, **_: None)
    monkeypatch.setattr(module, "require_devices", lambda devices, **_: None)
    config: Any = SimpleNamespace(model=ModelConfig(path="none", device=pretended.DEVICES))
    verdict, text = doctor.CHECKS["device"](config)
    assert verdict is doctor.Verdict.FINE
    assert re.match(r"pretend:0, pretend:1, frozen layers .* takes \d+\.\d, \d+\.\d ms", text)
    config.model = ModelConfig(path="none", device=pretended.DEVICES, split="records")
    _, text = doctor.CHECKS["device"](config)
    assert text.startswith("pretend:0, pretend:1, each with a copy of the model, frozen layers")
