"""Makes a plan from its draft, a TOML file, and the base model's folder.

`umbel-server plan new` runs this in a process of its own: the model's classes are needed to know
the tensors of an adapter.

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

from umbel_client.trainer.isolation import confine_command
from umbel_host.entry import enter, exit_code


def main() -> int:
    """Writes the plan of the draft named on the command line to standard output."""
    confine_command()

    from umbel_client.planning.draft import read_plan
    from umbel_common.plans.plan_file import plan_to_json

    return exit_code(lambda: print(plan_to_json(read_plan(Path(sys.argv[1]))), end=""))


if __name__ == "__main__":
    enter(main)
