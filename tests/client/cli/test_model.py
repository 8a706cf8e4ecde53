"""What a person is told of a base model's folder, and of what is none."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_client.cli.doctor import Verdict, _model
from umbel_client.data.tokens import load_tokenizer
from umbel_client.site.config import ClientConfig, DataConfig, ModelConfig
from umbel_client.site.policy import Policy
from umbel_common.errors import ModelError
from umbel_host.files.model_digest import folder_digest


def test_the_digest_is_shown_with_the_files_that_count(tiny_model: Path) -> None:
    digest = folder_digest(tiny_model).hex()
    said = CliRunner().invoke(app, ["model", "digest", str(tiny_model)]).stdout
    assert f'models = ["{digest}"]' in said
    size = (tiny_model / "model.safetensors").stat().st_size
    assert any(line.split()[::2] == [f"{size:,}", "model.safetensors"] for line in said.split("\n"))
    found = json.loads(
        CliRunner().invoke(app, ["model", "digest", str(tiny_model), "--json"]).stdout
    )
    assert found["digest"] == digest
    assert {"file", "bytes", "sha256"} == set(found["files"][0])


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "hf download sentence-transformers/all-MiniLM"),
        ("nowhere", "correct the path"),
        ("model.gguf", "a GGUF file"),
        ("ggufs", "safetensors: GGUF"),
        ("pickles", "pickles"),
        ("half", "save_pretrained"),
        ("adapter", "folder of their own"),
    ],
)
def test_what_is_no_model_folder_is_told_as_what_it_is(
    tiny_model: Path, tmp_path: Path, path: str, told: str
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "q4.gguf").write_bytes(b"GGUF")
    for name, change in {"pickles": "model.safetensors", "half": "tokenizer.json"}.items():
        (Path(shutil.copytree(tiny_model, tmp_path / name)) / change).unlink()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"")
    shutil.copytree(tiny_model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for read in (folder_digest, load_tokenizer):
        # A tokenizer alone needs no weights.
        if (path, read) == ("pickles", load_tokenizer):
            continue
        with pytest.raises(ModelError) as caught:
            read(tmp_path / path)
        assert told in str(caught.value)
        assert "huggingface.co" not in str(caught.value)


def test_doctor_says_what_to_put_into_the_policy(tiny_model: Path) -> None:
    digest = folder_digest(tiny_model).hex()
    for models, verdict in (((), Verdict.BROKEN), ((digest,), Verdict.FINE)):
        config = ClientConfig(
            site="a",
            state="state",
            identity="i.pem",
            roster="r.json",
            data=DataConfig(path="data.jsonl", public_size=10),
            model=ModelConfig(path=str(tiny_model)),
            policy=Policy(models=models),
        )
        found, text = _model(config)
        assert found == verdict
        assert (f'models = ["{digest}"]' in text) == (verdict == Verdict.BROKEN)
        assert "reads up to" in text
