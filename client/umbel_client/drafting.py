"""Makes a plan from its draft, a TOML file, and the base model's folder.

`umbel-server plan new` runs this in a process of its own: the model's classes are needed to know
the tensors of an adapter, and to try the model before anybody signs the plan
(`umbel_client.training.model_look`).

```toml
federation = "north"
job = "triage-1"
seed = 7

[model]
name = "sentence-transformers/all-MiniLM-L6-v2"
path = "models/minilm"

[task]
task = "classification"
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

[release_gate]
holdout = "public.jsonl"
max_loss_increase = 0.05
```
"""

import sys
from pathlib import Path

from umbel_client.planning.draft import make_plan, model_folder, read_draft
from umbel_client.trainer.isolation import confine_command
from umbel_client.training.model_look import look_at
from umbel_common.plans.plan_file import plan_to_json
from umbel_host.terminal import exit_code, say


def main() -> int:
    """Writes the plan of the draft named on the command line to standard output."""
    confine_command()
    return exit_code(lambda: _make(Path(sys.argv[1])))


def _make(file: Path) -> None:
    draft, folder = read_draft(file)
    plan = make_plan(draft, folder)
    look = look_at(model_folder(draft, folder), plan)
    if not look.whole:
        say(
            f"The model is large: its first {look.layers} of {look.all_layers} layers were tried,"
            f" on records of {look.tokens} of {look.max_tokens} tokens.",
            err=True,
        )
    print(plan_to_json(plan), end="")


if __name__ == "__main__":
    sys.exit(main())
