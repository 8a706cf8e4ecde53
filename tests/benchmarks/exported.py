"""`make exported`: an adapter of `make medical-qa`, exported, in an environment without Umbel.

A fresh virtual environment gets PyTorch and Transformers, and loads the merged model; then also
PEFT, and loads base model and adapter. Their logits are compared with Umbel's own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umbel_client.data.chat import Chat
from umbel_client.data.conversations import Turn
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.folder import read_adapter
from umbel_client.models.adapters.merge import merge_adapter
from umbel_common.adapters.vector import initial_vector
from umbel_common.plans.plan import CausalLm, TrainingPlan
from umbel_simulations.inputs.base_model import model_folder
from umbel_simulations.scenario.file import find_scenario

ROOT = Path(__file__).parents[2]
QUESTIONS = ("What is Ataxia?", "What is Cleft palate?", "What is Bradycardia?", "Say hello.")
ELSEWHERE = """
import importlib.util, json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
model, adapter, prompts, out = sys.argv[1:]
assert importlib.util.find_spec("umbel_client") is None
loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
if adapter:
    from peft import PeftModel
    loaded = PeftModel.from_pretrained(loaded, adapter)
else:
    assert importlib.util.find_spec("peft") is None
loaded.eval()
with torch.no_grad():
    rows = [loaded(input_ids=torch.tensor([ids])).logits[0] for ids in json.loads(prompts)]
np.save(out, torch.cat(rows).numpy())
"""


class Environment:
    """A virtual environment without Umbel."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self._python = folder / "bin" / "python"
        self._logits = folder / "logits.npy"

    def install(self, *packages: str) -> None:
        """As constraints.txt pins them."""
        pip = (self._python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *packages], check=True)

    def logits(self, model: Path, adapter: Path | None, prompts: list[list[int]]) -> Any:
        """float32[tokens, vocabulary]: of all prompts, one after the other."""
        given = (model, adapter or "", json.dumps(prompts), self._logits)
        # -I: neither this folder nor an environment variable adds a module.
        subprocess.run([self._python, "-I", "-c", ELSEWHERE, *given], check=True)
        return np.load(self._logits)


def own_logits(plan: TrainingPlan, base: Path, vector: Any, prompts: list[list[int]]) -> Any:
    """The same by Umbel's own model."""
    model = AdaptedModel.load(base, plan)
    model.set_vector(vector)
    with torch.no_grad():
        rows = [model.base(input_ids=torch.tensor([ids])).logits[0] for ids in prompts]
    return torch.cat(rows).numpy()


def main(adapter: Path, path: Path) -> None:
    """Compares, and writes `path`."""
    torch.set_num_threads(1)
    plan, vector = read_adapter(adapter)
    assert isinstance(plan.task, CausalLm)
    base = model_folder(find_scenario("medical-qa").model)
    chat = Chat.load(base, plan.task)
    prompts = [chat.prompt_ids(chat.frame([Turn("user", text)]).prompt) for text in QUESTIONS]
    own = own_logits(plan, base, vector, prompts)
    bare = own_logits(plan, base, initial_vector(plan), prompts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merge_adapter(adapter, base, folder / "merged", dtype="float32")
        elsewhere = Environment(folder / "environment")
        elsewhere.install("torch==2.13.0", "transformers", "numpy")
        merged = elsewhere.logits(folder / "merged", None, prompts)
        elsewhere.install("peft")
        plain = elsewhere.logits(base, adapter, prompts)

    def farthest(logits: Any) -> float:
        return float(f"{np.abs(logits - own).max():.3g}")

    found = {
        "command": "make exported",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "model": plan.model.name,
        "tokens": len(own),
        "largest_logit": round(float(np.abs(own).max()), 2),
        "max_abs_difference": {
            "base model and adapter by PEFT": farthest(plain),
            "merged model by Transformers": farthest(merged),
            "for comparison, base model without adapter": farthest(bare),
        },
    }
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter", type=Path)
    parser.add_argument("path", type=Path)
    asked = parser.parse_args()
    main(asked.adapter, asked.path)
