"""An adapter that is exported or merged is the plan's, whatever its folder says besides.

Each attack first reaches its goal where the folder is believed, as PEFT and `copytree` do.
"""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.small_models import plan_for, save_bert, save_decoder
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from umbel_client.models.adapters import folder as adapter_folder
from umbel_client.models.adapters import merge
from umbel_client.models.adapters.folder import export_adapter, read_adapter, write_adapter
from umbel_client.models.adapters.merge import merge_adapter
from umbel_client.models.base.folder import load_base
from umbel_common.adapters.vector import Vector, adapter_digest
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, Task, TrainingPlan
from umbel_common.plans.statements import Release
from umbel_common.trust.identity import Identity, Signed, sign

torch.set_num_threads(1)

LABELS = Classification(labels=("a", "b"))
STOCK = Classification(labels=("a", "b"), head="stock")
IDS = torch.tensor([[5, 6, 7, 8]])
Leave = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return save_bert(tmp_path_factory.mktemp("encoder"), [f"w{n}" for n in range(9)], **sizes)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("gpt2"), "gpt2")


def released(plan: TrainingPlan, vector: Vector) -> Signed:
    release = Release(
        federation=plan.federation,
        job=plan.job,
        plan=plan.digest(),
        round=1,
        attempt=1,
        context=bytes(32),
        adapter=adapter_digest(plan.digest(), vector),
        survivors=("a", "b"),
        total_weight=2,
    )
    return sign(Identity.generate(os.urandom), release)


def adapter_of(folder: Path, base: Path, task: Task = LABELS, *, release: bool = False) -> Path:
    targets = ("c_attn",) if (base / "config.json").read_text().count("gpt2") else None
    plan = plan_for(base, task, {} if targets is None else {"target_modules": targets})
    vector = np.random.default_rng(0).normal(0, 0.3, plan.lora.size).astype(np.float32)
    signed = released(plan, vector) if release else None
    write_adapter(folder, plan, vector, signed, base_model=base)
    return folder


def exported(base: Path) -> Leave:
    return export_adapter


def merged(base: Path) -> Leave:
    return lambda folder, out: merge_adapter(folder, base, out, dtype="float32")


@pytest.mark.parametrize("task", [LABELS, STOCK, CausalLm()], ids=["mean-pool", "stock", "gpt2"])
def test_a_merged_model_is_what_the_plan_says(
    task: Task, encoder: Path, gpt2: Path, tmp_path: Path
) -> None:
    base = gpt2 if isinstance(task, CausalLm) else encoder
    folder = adapter_of(tmp_path / "adapter", base, task)

    def by_peft() -> torch.Tensor:
        model = load_base(base, task)
        return PeftModel.from_pretrained(model, folder).eval()(input_ids=IDS)[0].detach()

    honest = by_peft()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 400.0}))
    assert float((by_peft() - honest).abs().max()) > 0.1
    merged(base)(folder, tmp_path / "merged")
    factory = {
        LABELS: AutoModel,
        STOCK: AutoModelForSequenceClassification,
    }.get(task, AutoModelForCausalLM)
    found = factory.from_pretrained(tmp_path / "merged").eval()(input_ids=IDS)[0]
    assert float((found - honest).abs().max()) < 1e-4
    if task == LABELS:
        assert load_file(tmp_path / "merged" / "head.safetensors")["weight"].shape == (2, 16)


def test_an_exported_adapter_is_written_from_its_plan(encoder: Path, tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "adapter", encoder)
    honest = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 400.0}')
    (folder / "README.md").write_text("another card")
    (folder / "evil.py").write_text("")
    shutil.copytree(folder, tmp_path / "carelessly")
    assert (tmp_path / "carelessly" / "evil.py").exists()
    export_adapter(folder, tmp_path / "copy")
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == honest


@pytest.mark.parametrize("leave", [exported, merged])
def test_a_link_brings_no_other_file_out(
    leave: Callable[[Path], Leave], encoder: Path, tmp_path: Path
) -> None:
    folder = adapter_of(tmp_path / "adapter", encoder)
    (tmp_path / "secret").write_text("a record")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    shutil.copytree(folder, tmp_path / "carelessly")
    assert (tmp_path / "carelessly" / "vocab.txt").read_text() == "a record"
    with pytest.raises(ModelError, match="holds a link") as caught:
        leave(encoder)(folder, tmp_path / "out")
    assert caught.value.file == folder / "vocab.txt"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("leave", [exported, merged])
def test_what_a_site_trained_alone_is_its_owners_alone(
    leave: Callable[[Path], Leave],
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mode(name: str, *, release: bool = False) -> int:
        folder = adapter_of(tmp_path / f"{name} adapter", encoder, release=release)
        leave(encoder)(folder, tmp_path / name)
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    former = os.umask(0o022)
    try:
        with monkeypatch.context() as removed:
            for module in (adapter_folder, merge):
                removed.setattr(module, "folder_mode", lambda release: 0o777)
            assert mode("careless") == 0o755
        assert mode("alone") == 0o700
        assert mode("released", release=True) == 0o755
    finally:
        os.umask(former)


@pytest.mark.parametrize("leave", [exported, merged])
def test_the_release_of_another_adapter_opens_nothing(
    leave: Callable[[Path], Leave], encoder: Path, tmp_path: Path
) -> None:
    folder = adapter_of(tmp_path / "adapter", encoder, release=True)
    plan, vector = read_adapter(folder)
    write_adapter(folder, plan, vector + 1, released(plan, vector), base_model=encoder)
    with pytest.raises(ModelError, match="release is of another adapter"):
        leave(encoder)(folder, tmp_path / "out")
    (folder / "release.msgpack").write_bytes(msgspec.msgpack.encode({"adapter": "mine"}))
    with pytest.raises(ModelError, match="release cannot be read"):
        leave(encoder)(folder, tmp_path / "out")
