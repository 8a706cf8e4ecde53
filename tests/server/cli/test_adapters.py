"""What an operator's copy of an adapter has beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from umbel_common.plans.plan import BaseModel, TrainingPlan
from umbel_host.files.model_digest import folder_digest
from umbel_server.cli.adapters import tokenizer_files
from umbel_server.operator.config import EvaluationConfig, ServerConfig


def test_a_copy_has_the_tokenizer_of_exactly_the_plans_model(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., TrainingPlan]
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    plan = make_plan(model=BaseModel(name="tiny", digest=folder_digest(folder)))
    settings = ServerConfig(evaluation=EvaluationConfig(holdout="public.jsonl", model=str(folder)))
    found = tokenizer_files(settings, plan)
    assert found["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert "config.json" not in found
    assert tokenizer_files(ServerConfig(), plan) == {}
    (folder / "tokenizer.json").write_bytes(found["tokenizer.json"] + b" ")
    assert tokenizer_files(settings, plan) == {}
    shutil.rmtree(folder)
    assert tokenizer_files(settings, plan) == {}
