"""From a plan's draft, a TOML file, and the base model's folder to the plan.

`umbel-server plan new` runs this in a process of its own: it takes the model's classes to know
which tensors an adapter has.

```toml
federation = "north"
job = "triage-1"
seed = 7

[model]
name = "sentence-transformers/all-MiniLM-L6-v2"
path = "models/minilm"

[task]
labels = ["benign", "malignant"]

[lora]
rank = 8
alpha = 16
target_modules = ["query", "value"]
method = "ffa"

[training]
rounds = 6
local_steps = 5
expected_batch_size = 480
optimizer = { optimizer = "adam", adapter_learning_rate = 1e-3, head_learning_rate = 4e-2 }

[privacy]
mode = "local"
epsilon = 3.0
delta = 1e-5
clip_norm = 1.0

[aggregation]
threshold = 3
clip_range = 1.0
step = 1e-6
```
"""

import sys
from pathlib import Path
from typing import Annotated

import msgspec

from umbel_client.lora import plan_lora
from umbel_client.model_folder import folder_digest
from umbel_common.canonical import Name, Value
from umbel_common.plan import (
    Aggregation,
    BaseModel,
    LocalPrivacy,
    Method,
    NoPrivacy,
    Scale,
    Task,
    Training,
    TrainingPlan,
    check_plan,
)
from umbel_common.plan_file import plan_to_json
from umbel_host.console import exit_code
from umbel_host.toml_file import read_toml


class DraftModel(Value, frozen=True):
    """`[model]`."""

    name: str
    """What people call it, as the released adapter names its base model."""
    path: str
    """Its folder; a relative path starts at the draft's folder."""


class DraftLora(Value, frozen=True):
    """`[lora]`; see `umbel_common.plan.Lora`."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=512)]
    alpha: Scale
    target_modules: tuple[str, ...]
    layers: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] | None = None
    method: Method = "alternate"


class Draft(Value, frozen=True):
    """A plan without what the model's folder says."""

    federation: Name
    job: Name
    model: DraftModel
    task: Task
    lora: DraftLora
    training: Training
    privacy: LocalPrivacy | NoPrivacy
    aggregation: Aggregation
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)] = 0
    """Public seed of the initial adapter."""


def make_plan(draft: Draft, model: Path) -> TrainingPlan:
    """The plan of a draft.

    Args:
        model: folder of the base model.

    Raises:
        ModelError, PlanError: the model does not have what the draft targets, or the parts of the
            plan do not fit together.
    """
    lora = plan_lora(
        model,
        draft.task,
        rank=draft.lora.rank,
        alpha=draft.lora.alpha,
        target_modules=draft.lora.target_modules,
        layers=draft.lora.layers,
        method=draft.lora.method,
        seed=draft.seed,
    )
    plan = TrainingPlan(
        federation=draft.federation,
        job=draft.job,
        model=BaseModel(name=draft.model.name, digest=folder_digest(model)),
        task=draft.task,
        lora=lora,
        training=draft.training,
        privacy=draft.privacy,
        aggregation=draft.aggregation,
    )
    check_plan(plan)
    return plan


def read_plan(path: Path) -> TrainingPlan:
    """The plan of a draft's file.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or has an unknown, missing or wrong field.
        ModelError, PlanError: see `make_plan`.
    """
    draft = read_toml(path, Draft, "give the path of a draft; docs/operator.md describes it")
    return make_plan(draft, path.absolute().parent / Path(draft.model.path).expanduser())


def main() -> int:
    """Writes the plan of the draft that is named on the command line to standard output."""
    return exit_code(lambda: print(plan_to_json(read_plan(Path(sys.argv[1]))), end=""))


if __name__ == "__main__":
    sys.exit(main())
