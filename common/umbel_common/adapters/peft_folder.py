"""The content of a released adapter's folder in PEFT's format; the caller writes it.

A stock head goes where PEFT puts it (`modules_to_save`). The base model has no place for a
mean-pool head, so it travels beside the LoRA tensors in `head.safetensors`, and the card shows the
few lines of plain torch that apply it.

Without a LoRA layer there is nothing for PEFT, which refuses such an adapter: the folder then holds
the head alone, and its card loads it with Transformers.
"""

import json
import re
from typing import Any, Literal, TypeAlias

from umbel_common.adapters.vector import Vector, unflatten
from umbel_common.plans.plan import CausalLm, Classification, Lora, Template, TrainingPlan
from umbel_common.plans.plan_file import plan_to_json
from umbel_common.printable import printable_json

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
HEAD_FILE = "head.safetensors"
PLAN_FILE = "plan.json"
TASK_FILE = "task.json"
CARD_FILE = "README.md"
Kind: TypeAlias = Literal["mean-pool", "stock", "causal-lm"]
"""A kind of adapter: a classification, named by its head, or a language model."""
_TASK_TYPES: dict[Kind, str] = {
    "mean-pool": "FEATURE_EXTRACTION",
    "stock": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
}
PEFT_PREFIX = "base_model.model."
"""Prefix of every name that PEFT saves."""
HEAD_PREFIX = "head."
"""Prefix of the tensors of a mean-pool head; every other name is PEFT's."""
_A = ".lora_A.weight"
_NUMBERED = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""How PEFT reads the number of a layer from a module's name."""


def is_head_alone(plan: TrainingPlan) -> bool:
    """Whether a plan trains a head and no LoRA layer, so that its folder is none of PEFT's."""
    return not plan.lora.target_modules


def file_of(tensor: str) -> str:
    """The safetensors file that a tensor of a plan goes into."""
    return HEAD_FILE if tensor.startswith(HEAD_PREFIX) else ADAPTER_FILE


def tensor_files(plan: TrainingPlan, vector: Vector) -> dict[str, dict[str, Vector]]:
    """The float32 tensors by name, by the safetensors file that they go into."""
    files: dict[str, dict[str, Vector]] = {}
    for name, value in unflatten(vector, plan.lora.tensors).items():
        files.setdefault(file_of(name), {})[name.removeprefix(HEAD_PREFIX)] = value
    return files


def text_files(plan: TrainingPlan, *, alone: bool = False) -> dict[str, str]:
    """The JSON files and the card, by name.

    Args:
        alone: whether one site trained it by itself, and nobody released it.
    """
    files = {
        TASK_FILE: _json(_task_config(plan)),
        PLAN_FILE: plan_to_json(plan),
        CARD_FILE: _card(plan, _ALONE if alone else _TOGETHER),
    }
    if not is_head_alone(plan):
        files[CONFIG_FILE] = _json(_adapter_config(plan))
    return files


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
        "modules_to_save": ["classifier"] if stock else None,
    }
    return config | _targets(lora)


def _targets(lora: Lora) -> dict[str, Any]:
    """The layers with an adapter, as PEFT finds them again.

    PEFT takes the first number behind two names for a layer's. Where that is another number, or
    none, each layer is named in full.
    """
    if lora.layers is None:
        return {"target_modules": list(lora.target_modules)}
    names = [
        tensor.name.removeprefix(PEFT_PREFIX).removesuffix(_A)
        for tensor in lora.tensors
        if tensor.name.endswith(_A)
    ]
    numbers = [_NUMBERED.match(name) for name in names]
    if all(found is not None and int(found.group(1)) in lora.layers for found in numbers):
        return {
            "target_modules": list(lora.target_modules),
            "layers_to_transform": list(lora.layers),
        }
    return {"target_modules": names}


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
    head_alone = is_head_alone(plan)
    return _CARD.format(
        library="transformers" if head_alone else "peft",
        # The plan's author chose the name, which must not become another field of the card.
        name=printable_json(json.dumps(plan.model.name, ensure_ascii=False)),
        job=plan.job,
        origin=origin.format(what="classification head" if head_alone else "LoRA adapter"),
        about=_ABOUT[_kind(plan)],
        usage=_usage(plan),
    )


def _usage(plan: TrainingPlan) -> str:
    """Lines of Python that load the folder and use it once."""
    head_alone, kind = is_head_alone(plan), _kind(plan)
    if isinstance(plan.task, CausalLm):
        parts = [_LANGUAGE_IMPORTS, _BASE, _LANGUAGE_MODEL, _PROMPTS[plan.task.template], _ANSWER]
    elif kind == "stock":
        load = _STOCK_HEAD if head_alone else _STOCK_ADAPTER
        parts = [_STOCK_IMPORTS, _BASE, _TASK, _STOCK_MODEL, load, _TEXTS, _STOCK_LOGITS]
    else:
        load = _POOLED_HEAD if head_alone else _POOLED_ADAPTER
        parts = [_POOLED_IMPORTS, _BASE, _TASK, load, _TEXTS, _POOLED_LOGITS]
    code = "".join(parts)
    for name, line in _IMPORTS.items():
        if f"{name}(" in code or f"{name}." in code:
            code = line + code
    return code


_CARD = """\
---
library_name: {library}
base_model: {name}
---

# {job}

{origin} {about}

The tokenizer is the base model's.

```python
{usage}```
"""

_BASE = """\
folder = "."  # this folder
base = "path or hub id of the base model"
"""

_TEXTS = """\
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token  # never read: the mask leaves it out
texts = ["the text to label"]
batch = tokenizer(texts, truncation=True, max_length=task["max_tokens"], padding=True,
                  return_tensors="pt", return_token_type_ids=False)
"""

_IMPORTS = {
    "load_file": "from safetensors.torch import load_file\n",
    "PeftModel": "from peft import PeftModel\n",
    "torch": "import torch\n",
    "json": "import json\n",
}
"""Lines above the code that needs them, from the last to the first."""

_TASK = """\
task = json.load(open(f"{folder}/task.json"))
"""

_POOLED_IMPORTS = """\
from transformers import AutoModel, AutoTokenizer

"""
_POOLED_ADAPTER = """\
head = load_file(f"{folder}/head.safetensors")
model = AutoModel.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder).eval()

"""
_POOLED_HEAD = """\
head = load_file(f"{folder}/head.safetensors")
model = AutoModel.from_pretrained(base, dtype=torch.float32).eval()

"""
_POOLED_LOGITS = """\
with torch.no_grad():
    tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    logits = task["logit_scale"] * pooled @ head["weight"].T + head["bias"]
print([task["labels"][index] for index in logits.argmax(-1)])
"""

_STOCK_IMPORTS = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

"""
_STOCK_MODEL = """\
model = AutoModelForSequenceClassification.from_pretrained(
    base, dtype=torch.float32, num_labels=len(task["labels"]), ignore_mismatched_sizes=True)
"""
_STOCK_ADAPTER = """\
model = PeftModel.from_pretrained(model, folder).eval()

"""
_STOCK_HEAD = """\
head = load_file(f"{folder}/adapter_model.safetensors")
head = {name.removeprefix("base_model.model."): value for name, value in head.items()}
model.load_state_dict(head, strict=False)
model.eval()

"""
_STOCK_LOGITS = """\
with torch.no_grad():
    logits = model(**batch).logits
print([task["labels"][index] for index in logits.argmax(-1)])
"""

_LANGUAGE_IMPORTS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

"""
_LANGUAGE_MODEL = """\
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()

"""
_PROMPTS: dict[Template, str] = {
    "chat": """\
turns = [{"role": "user", "content": "the question to answer"}]
batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True,
                                      return_tensors="pt")
# An answer ends at the token that the chat template writes behind one, which not every model names
# in its settings of generation.
turns.append({"role": "assistant", "content": "ANSWER"})
closing = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
behind = tokenizer(closing, add_special_tokens=False)["input_ids"]
own = model.generation_config.eos_token_id
ends = {*[token for token in behind if token in special][:1], tokenizer.eos_token_id,
        *(own if isinstance(own, list) else [own])} & special
answer = model.generate(**batch, max_new_tokens=64, eos_token_id=sorted(ends) or None)
answer = answer[0, batch["input_ids"].shape[1]:]
""",
    "plain": """\
ids = tokenizer("the question to answer", return_tensors="pt")["input_ids"]
if ids[0, -1] == tokenizer.eos_token_id:
    ids = ids[:, :-1]  # this tokenizer ends each text, and the answer is still to come
answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                        eos_token_id=tokenizer.eos_token_id)[0, ids.shape[1]:]
""",
}
_ANSWER = """\
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

_TOGETHER = """\
A {what} that several organisations trained together with Umbel, without showing each other
their data."""
_ALONE = """\
A {what} that one site trained by itself with Umbel. No privacy ledger was charged for it:
treat it as the data that it was trained on."""
_LABELS = "`task.json` has the labels in the order of the logits."
_ABOUT: dict[Kind, str] = {
    "mean-pool": _LABELS,
    "stock": _LABELS,
    "causal-lm": "`plan.json` says how it was trained.",
}
