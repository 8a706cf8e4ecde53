"""Two sites with one model digest load one model, whatever else lies in their folders.

Each attack has two versions of a folder: the files that count are the same, and something else
differs. First the base model is loaded as a careless program does it, by giving Transformers the
folder; then the attack must reach its goal: one digest, and two models.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import plan_for, save_bert, save_decoder
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from umbel_client.data import tokens
from umbel_client.data.records import load_records
from umbel_client.data.tokens import load_tokenizer
from umbel_client.models import adapted_model
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base import folder as base_folder
from umbel_client.models.base import skeleton as base_skeleton
from umbel_client.tasks.prepared import prepare
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, Task
from umbel_host.files import model_digest, model_folder
from umbel_host.files.model_digest import folder_digest, require_digest

torch.set_num_threads(1)

LM = CausalLm()
LABELS = Classification(labels=("a", "b"))
WORDS = tuple(f"w{number}" for number in range(30))
IDS = torch.tensor([[5, 6, 7, 8]])
SHARD = "w.safetensors"
WEIGHTS = "model.safetensors"
EMBEDDING = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return save_bert(tmp_path_factory.mktemp("encoder"), WORDS, **sizes)


def changed(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def other_weights(folder: Path, version: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor * version if "v_proj" in name else tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
    }


def shards(folder: Path, name: str, place: Path, version: int) -> None:
    """An index that names a file elsewhere, beside a decoy that counts."""
    tensors = other_weights(folder, version)
    (folder / WEIGHTS).unlink()
    place.parent.mkdir(exist_ok=True)
    save_file(tensors, place, {"format": "pt"})
    save_file({"decoy": torch.zeros(1)}, folder / SHARD, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_below(folder: Path, version: int) -> None:
    shards(folder, f"deep/{SHARD}", folder / "deep" / SHARD, version)


def shard_beside(folder: Path, version: int) -> None:
    shards(folder, f"../{SHARD}", folder.parent / SHARD, version)


def shard_anywhere(folder: Path, version: int) -> None:
    place = folder.parent / "absolute" / SHARD
    shards(folder, str(place), place, version)


def named_weights(folder: Path, version: int) -> None:
    (folder / "deep").mkdir()
    save_file(other_weights(folder, version), folder / "deep" / SHARD, {"format": "pt"})
    changed(folder / "config.json", transformers_weights=f"deep/{SHARD}")


def adapter(folder: Path, version: int) -> None:
    """Its weights count, as every safetensors file does; how they are applied does not."""
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": 1, "lora_alpha": version, "target_modules": ["q_proj"]}
        )
    )
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {
        f"{prefix}.lora_A.weight": torch.ones(1, 32),
        f"{prefix}.lora_B.weight": torch.ones(32, 1),
    }
    save_file(matrices, folder / "adapter_model.safetensors", {"format": "pt"})


def further_template(folder: Path, version: int) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text(f"version {version}")


def generation_settings(folder: Path, version: int) -> None:
    settings = {"repetition_penalty": float(version), "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def further_configuration(folder: Path, version: int) -> None:
    shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
    changed(folder / "config.4.0.0.json", rms_norm_eps=float(version))
    changed(folder / "config.json", configuration_files=["config.4.0.0.json"])


def further_tokenizer(folder: Path, version: int) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    if version == 2:
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (folder / "tokenizer.4.0.0.json").write_text(json.dumps(content))
    changed(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])


def named_vocabulary(folder: Path, version: int) -> None:
    place = folder.parent / "vocabulary.txt"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[:: 3 - 2 * version]]
    place.write_text("\n".join(names))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    changed(folder / "tokenizer.json", model=model | {"vocab": str(place)})


def special_tokens(folder: Path, version: int) -> None:
    """Transformers takes each field of this file for a setting of the tokenizer."""
    further_tokenizer(folder, version)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["fast_tokenizer_files"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    place = folder.parent / "tokenizer.json"
    (folder / "tokenizer.4.0.0.json").rename(place)
    changed_to = {"tokenizer_file": str(place)}
    (folder / "special_tokens_map.json").write_text(json.dumps(changed_to))


ATTACKS: dict[Callable[[Path, int], None], str | None] = {
    shard_below: "weight_map",
    shard_beside: "weight_map",
    shard_anywhere: "weight_map",
    named_weights: "transformers_weights",
    adapter: "adapter_config.json",
    further_configuration: "configuration_files",
    further_tokenizer: "fast_tokenizer_files",
    named_vocabulary: "model.vocab",
    special_tokens: "tokenizer_file",
    further_template: None,
    generation_settings: None,
}
"""Each attack, and the field by which its folder is refused; None: what differs is never read."""


@contextmanager
def carelessly(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives Transformers the folder itself, and checks nothing but the digest."""

    def build(content: base_folder.BaseContent, task: Task) -> PreTrainedModel:
        factory = AutoModelForCausalLM if isinstance(task, CausalLm) else AutoModel
        return factory.from_pretrained(content.folder, dtype=torch.float32, use_safetensors=True)

    @contextmanager
    def itself(folder: Path, texts: Mapping[str, bytes]) -> Iterator[Path]:
        yield folder

    with patch.context() as removed:
        removed.setattr(model_folder, "_check_stands_alone", lambda *_: None)
        removed.setattr(model_folder, "_check_unchanged", lambda *_: None)
        removed.setattr(model_folder, "_ADAPTER_FILE", "none")
        for module in (base_folder, model_digest):
            removed.setattr(module, "shards_of", lambda *_: [])
        for module in (base_skeleton, tokens):
            removed.setattr(module, "private_folder", itself)
        for module in (base_folder, adapted_model):
            removed.setattr(module, "build_base", build)
        yield


def loaded(folder: Path, task: Task) -> tuple[bytes, Any]:
    """The folder's digest, and what it makes of a text."""
    base = base_folder.load_base(folder, task)
    tokenizer = load_tokenizer(folder)
    with torch.no_grad():
        output = base.eval()(input_ids=IDS)[0].tolist()
    penalty = base.generation_config.repetition_penalty if isinstance(task, CausalLm) else None
    ids = tokenizer("AB w1 w2")["input_ids"]
    return folder_digest(folder), (output, ids, tokenizer.chat_template, penalty)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_one_digest_is_one_model(
    attack: Callable[[Path, int], None],
    encoder: Path,
    decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, task = (encoder, LABELS) if attack is named_vocabulary else (decoder, LM)

    def version(number: int) -> Path:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder)
        attack(folder, number)
        return folder

    with carelessly(monkeypatch):
        one, two = (loaded(version(number), task) for number in (1, 2))
        assert one[0] == two[0]
        assert one[1] != two[1]
    field = ATTACKS[attack]
    if field is None:
        assert loaded(version(1), task) == loaded(version(2), task) == loaded(model, task)
        return
    folder = version(1)
    for read in (folder_digest, model_digest.require_model, lambda path: loaded(path, task)):
        with pytest.raises(ModelError) as caught:
            read(folder)
        assert caught.value.field == field


def test_a_name_cannot_stand_for_two_files_of_the_digest(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest has a line for each file. A name with a line break in it writes two of them."""
    folder = tmp_path / "model"
    honest = model_digest.file_digest(decoder / WEIGHTS)
    joined = f"model.a.safetensors\n{honest}  {WEIGHTS}"

    def version(number: int) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(decoder, folder)
        tensors = other_weights(folder, 2)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, joined)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file(tensors, folder / "model.a.safetensors", {"format": "pt"})
        if number == 2:
            (folder / WEIGHTS).unlink()
            (folder / "model.a.safetensors").rename(folder / joined)
        return folder

    with monkeypatch.context() as removed:
        removed.setattr(model_digest, "_is_plain", lambda _: True)
        one, two = (loaded(version(number), LM) for number in (1, 2))
        assert one[0] == two[0]
        assert one[1] != two[1]
    for read in (folder_digest, model_digest.require_model, lambda path: loaded(path, LM)):
        with pytest.raises(ModelError, match="not printable"):
            read(version(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "somebody/attention"},
        {"_attn_implementation": {"": "paged|somebody/attention:module"}},
        {"text_config": {"experts_implementation": "somebody/experts"}},
    ],
)
def test_a_configuration_names_no_code_of_a_repository(
    settings: dict[str, object], decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the package `kernels`, Transformers runs what a cache of the machine holds of it."""
    folder = tmp_path / "model"
    shutil.copytree(decoder, folder)
    changed(folder / "config.json", **settings)
    with monkeypatch.context() as removed:
        removed.setattr(model_folder, "_implementations", lambda _: [])
        folder_digest(folder)
    with pytest.raises(ModelError, match="names a file"):
        folder_digest(folder)


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_change_after_they_were_hashed_are_not_loaded(
    in_place: bool, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    plan = plan_for(encoder, LABELS)
    weights = {name: tensor * 2 for name, tensor in load_file(encoder / WEIGHTS).items()}

    def exchange(*arguments: Any) -> None:
        require_digest(*arguments)
        save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
        if in_place:
            (folder / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes())
        else:
            (tmp_path / WEIGHTS).rename(folder / WEIGHTS)

    def load() -> torch.Tensor:
        shutil.copytree(encoder, folder, dirs_exist_ok=True)
        return AdaptedModel.load(folder, plan).base.get_parameter(EMBEDDING)

    monkeypatch.setattr(adapted_model, "require_digest", exchange)
    with carelessly(monkeypatch):
        assert torch.equal(load(), weights[EMBEDDING])
    assert torch.equal(load() * 2, weights[EMBEDDING])


def test_a_loaded_model_does_not_change_with_its_file(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"

    def attack() -> torch.Tensor:
        shutil.copytree(encoder, folder, dirs_exist_ok=True)
        base = base_folder.load_base(folder, LABELS)
        content = (folder / WEIGHTS).read_bytes()
        with (folder / WEIGHTS).open("r+b") as file:
            file.seek(len(content) // 4)
            file.write(bytes(len(content) - len(content) // 4))
        return base.get_parameter(EMBEDDING)

    weights = load_file(encoder / WEIGHTS)[EMBEDDING]
    with carelessly(monkeypatch):
        assert not torch.equal(attack(), weights)
    assert torch.equal(attack(), weights)


def test_a_tokenizer_that_changes_after_the_model_was_loaded_is_refused(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    plan = plan_for(encoder, LABELS)
    (tmp_path / "data.jsonl").write_text('{"text": "w1", "label": "a"}\n')
    records = load_records(tmp_path / "data.jsonl", LABELS)

    def attack() -> list[int]:
        shutil.copytree(encoder, folder, dirs_exist_ok=True)
        model = AdaptedModel.load(folder, plan)
        content = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(content.replace('"w1"', '"w_"'))
        return prepare(model, folder, records, BatchLimit(8), cache=None).tokens.ids.tolist()

    with carelessly(monkeypatch):
        assert 1 in attack()  # the id of unknown words
    with pytest.raises(ModelError, match="changed after the model was loaded") as caught:
        attack()
    assert caught.value.file == folder / "tokenizer.json"
