"""Records, start and keys that tests on pretended devices share with the CPU's run."""

import json
from pathlib import Path

import numpy as np
from support.small_models import save_bert

from umbel_common.adapters.vector import Vector
from umbel_common.plans.plan import TrainingPlan


def write_texts(path: Path) -> Path:
    """Writes eight labelled texts, and returns their file."""
    rows = [{"text": f"w{n} w{n + 1} w{n + 2}", "label": "ab"[n % 2]} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path: Path) -> Path:
    """Writes eight prompts with their answers, of several lengths, and returns their file."""
    rows = [{"prompt": "q" * (n % 3 + 1), "completion": "a" * (n + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_narrow_bert(folder: Path, *, layers: int) -> Path:
    """Saves a narrow BERT that knows the words of `write_texts`, and returns its folder."""
    return save_bert(
        folder,
        [f"w{number}" for number in range(12)],
        num_hidden_layers=layers,
        hidden_size=16,
        intermediate_size=32,
    )


def start_of(plan: TrainingPlan) -> Vector:
    """The adapter that a round starts from, float32[plan.lora.size]."""
    random = np.random.default_rng(0)
    return random.normal(0, 0.1, plan.lora.size).astype(np.float32)


def zeros(size: int) -> bytes:
    """The same batches and noise for each device."""
    return bytes(size)
