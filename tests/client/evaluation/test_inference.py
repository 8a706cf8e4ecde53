"""Answers end where the model's context ends, and each prompt has its own room."""

from pathlib import Path
from typing import Any

import pytest
from support.small_models import plan_for, save_decoder

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Turn
from umbel_client.evaluation.inference import Sampling, answer_prompts
from umbel_client.models.adapted_model import AdaptedModel
from umbel_common.adapters.vector import initial_vector
from umbel_common.errors import DataError
from umbel_common.plans.plan import CausalLm


def test_an_answer_ends_at_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_decoder(tmp_path / "gpt2", "gpt2", n_positions=24, chat_template=None)
    task = CausalLm(max_tokens=16, template="plain")
    plan = plan_for(folder, task, lora={"target_modules": ("c_attn",)})
    model = AdaptedModel.load(folder, plan)
    model.set_vector(initial_vector(plan))
    chat = Chat.load(folder, task)
    prompts = [[Turn("user", "a" * length)] for length in (20, 2, 23)]
    long = Sampling(max_new_tokens=100)
    room: list[int] = []
    generate: Any = model.base.generate

    def noted(**options: Any) -> Any:
        room.append(options["max_new_tokens"])
        return generate(**options)

    monkeypatch.setattr(model.base, "generate", noted)
    together = list(answer_prompts(model, chat, prompts, long))
    assert together == [
        answer for p in prompts for answer in answer_prompts(model, chat, [p], long)
    ]
    assert room == [4, 22, 1] * 2
    with pytest.raises(DataError, match="prompt 2 leaves no room"):
        list(answer_prompts(model, chat, [prompts[0], [Turn("user", "a" * 24)]], long))
