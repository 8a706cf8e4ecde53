"""The draft of a plan, as an operator writes it by hand for `umbel-server plan new`."""

import json
from collections.abc import Sequence
from pathlib import Path

from umbel_common.plans.plan import NoPrivacy
from umbel_simulations.scenario.scenario import Scenario

DRAFT_TOML = """\
federation = {name}
job = {name}
seed = {seed}

[model]
name = {model_name}
path = {model}

[task]
task = "classification"
labels = {labels}
max_tokens = {task.max_tokens}
head = "{task.head}"
logit_scale = {task.logit_scale}

[lora]
rank = {lora.rank}
alpha = {lora.alpha}
target_modules = {targets}
{layers}method = "{lora.method}"

[training]
rounds = {training.rounds}
local_steps = {training.local_steps}
expected_batch_size = {training.expected_batch_size}
final_learning_rate = {training.final_learning_rate}

[training.optimizer]
optimizer = "adam"
adapter_learning_rate = {training.adapter_learning_rate}
head_learning_rate = {training.head_learning_rate}
beta1 = {training.beta1}
beta2 = {training.beta2}

[privacy]
{privacy}

[aggregation]
threshold = {aggregation.threshold}
clip_range = {aggregation.clip_range}
step = {aggregation.step}
ring_bits = {aggregation.ring_bits}
"""


def draft_toml(scenario: Scenario, labels: Sequence[str], model: Path) -> str:
    """A draft of the scenario's plan."""
    training, lora, privacy = scenario.training, scenario.lora, scenario.privacy
    layers = "" if lora.layers is None else f"layers = {list(lora.layers)}\n"
    mode = (
        'mode = "none"'
        if isinstance(privacy, NoPrivacy)
        else f'mode = "local"\nepsilon = {privacy.epsilon}\ndelta = {privacy.delta}\n'
        f"clip_norm = {privacy.clip_norm}"
    )
    return DRAFT_TOML.format(
        name=json.dumps(scenario.name),
        seed=scenario.seed,
        model_name=json.dumps(scenario.model.name),
        model=json.dumps(str(model)),
        labels=json.dumps(list(labels)),
        task=scenario.task,
        lora=lora,
        targets=json.dumps(lora.target_modules),
        layers=layers,
        training=training,
        privacy=mode,
        aggregation=scenario.aggregation,
    )
