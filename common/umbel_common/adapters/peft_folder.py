"""The content of a released adapter's folder in PEFT's format; the caller writes it.

A stock head goes where PEFT puts it (`modules_to_save`). The base model has no place for a
mean-pool head, so it travels beside the LoRA tensors in `head.safetensors`, and the card shows the
few lines of plain torch that apply it.
"""

import json
from typing import Any, Literal, TypeAlias

from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.plans.plan import Classification, TrainingPlan
from umbel_common.plans.plan_file import plan_to_json
from umbel_common.printable import printable_json

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
HEAD_FILE = "head.safetensors"
PLAN_FILE = "plan.json"
TASK_FILE = "task.json"
Kind: TypeAlias = Literal["mean-pool", "stock", "causal-lm"]
"""A kind of adapter: a classification, named by its head, or a language model."""
_TASK_TYPES: dict[Kind, str] = {
    "mean-pool": "FEATURE_EXTRACTION",
    "stock": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
}
HEAD_PREFIX = "head."
"""Prefix of the tensors of a mean-pool head; every other name is PEFT's."""


def tensor_files(plan: TrainingPlan, vector: Vector) -> dict[str, dict[str, Vector]]:
    """The float32 tensors by name, by the safetensors file that they go into."""
    files: dict[str, dict[str, Vector]] = {ADAPTER_FILE: {}}
    for name, value in unflatten(vector, plan.lora.tensors).items():
        if name.startswith(HEAD_PREFIX):
            files.setdefault(HEAD_FILE, {})[name.removeprefix(HEAD_PREFIX)] = value
        else:
            files[ADAPTER_FILE][name] = value
    return files


def text_files(plan: TrainingPlan, *, alone: bool = False) -> dict[str, str]:
    """The JSON files and the card, by name.

    Args:
        alone: whether one site trained it by itself, and nobody released it.
    """
    return {
        CONFIG_FILE: _json(_adapter_config(plan)),
        TASK_FILE: _json(_task_config(plan)),
        PLAN_FILE: plan_to_json(plan),
        "README.md": _card(plan, _ALONE if alone else _TOGETHER),
    }


def _adapter_config(plan: TrainingPlan) -> dict[str, Any]:
    lora = plan.lora
    stock = _kind(plan) == "stock"
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[_kind(plan)],
        "base_model_name_or_path": plan.model.name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.scaling == "rank-stabilised",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(lora.target_modules),
        "modules_to_save": ["classifier"] if stock else None,
    }
    if lora.layers is not None:
        config["layers_to_transform"] = list(lora.layers)
    return config


def _kind(plan: TrainingPlan) -> Kind:
    return plan.task.head if isinstance(plan.task, Classification) else "causal-lm"


def _task_config(plan: TrainingPlan) -> dict[str, Any]:
    task = plan.task
    settings: dict[str, Any] = {"task": "causal-lm"}
    if isinstance(task, Classification):
        settings = {
            "task": "classification",
            "head": task.head,
            "labels": list(task.labels),
            "logit_scale": task.logit_scale if task.head == "mean-pool" else 1.0,
        }
    else:
        settings["template"] = task.template
    return {
        **settings,
        "max_tokens": task.max_tokens,
        "federation": plan.federation,
        "job": plan.job,
        "plan": plan.digest().hex(),
    }


def _json(value: dict[str, Any]) -> str:
    return printable_json(json.dumps(value, indent=2, ensure_ascii=False)) + "\n"


def _card(plan: TrainingPlan, origin: str) -> str:
    return _CARD.format(
        # The plan's author chose the name, which must not become another field of the card.
        name=printable_json(json.dumps(plan.model.name, ensure_ascii=False)),
        job=plan.job,
        origin=origin,
        about=_ABOUT[_kind(plan)],
        usage=_USAGE[_kind(plan)],
    )


_CARD = """\
---
library_name: peft
base_model: {name}
---

# {job}

{origin} {about}

```python
{usage}```
"""

_MEAN_POOL_USAGE = """\
import json, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."  # this folder
base = "path or hub id of the base model"
task = json.load(open(f"{folder}/task.json"))
head = load_file(f"{folder}/head.safetensors")
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval()

batch = tokenizer(["acute appendicitis"], truncation=True, max_length=task["max_tokens"],
                  padding=True, return_tensors="pt")
with torch.no_grad():
    tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    logits = task["logit_scale"] * pooled @ head["weight"].T + head["bias"]
print([task["labels"][index] for index in logits.argmax(-1)])
"""

_STOCK_USAGE = """\
import json
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this folder
base = "path or hub id of the base model"
task = json.load(open(f"{folder}/task.json"))
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(task["labels"]))
model = PeftModel.from_pretrained(model, folder).eval()

batch = tokenizer(["acute appendicitis"], truncation=True, max_length=task["max_tokens"],
                  padding=True, return_tensors="pt")
print([task["labels"][index] for index in model(**batch).logits.argmax(-1)])
"""

_CAUSAL_LM_USAGE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
base = "path or hub id of the base model"
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()

turns = [{"role": "user", "content": "What is acute appendicitis?"}]
batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True,
                                      return_tensors="pt")
answer = model.generate(**batch, max_new_tokens=64)[0, batch["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

_TOGETHER = """\
A LoRA adapter that several organisations trained together with Umbel, without showing each other
their data."""
_ALONE = """\
A LoRA adapter that one site trained by itself with Umbel. No privacy ledger was charged for it:
treat it as the data that it was trained on."""
_LABELS = "`task.json` has the labels in the order of the logits."
_ABOUT: dict[Kind, str] = {
    "mean-pool": _LABELS,
    "stock": _LABELS,
    "causal-lm": "`plan.json` says how it was trained.",
}
_USAGE: dict[Kind, str] = {
    "mean-pool": _MEAN_POOL_USAGE,
    "stock": _STOCK_USAGE,
    "causal-lm": _CAUSAL_LM_USAGE,
}
