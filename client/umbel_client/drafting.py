"""Makes a plan from its draft, a TOML file, and the base model's folder.

`umbel-server plan new` runs this in a process of its own, with the draft's file. With the packages
that load a model it builds the model and looks at it (`umbel_client.training.model_look`). Without
them it reads what the model's files say (`planning.untried`). `umbel-server plan try` gives a plan
and a folder, whose model is loaded.

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

[start]
start = "label-names"
```

A draft with `[start]` comes with `--start FILE`. A head that starts at its labels' names is written
to this file. For an adapter that an earlier job released, the file says which one it is.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from umbel_client.trainer.isolation import confine_command
from umbel_common.plans.plan import TrainingPlan
from umbel_host.entry import enter, exit_code
from umbel_host.terminal import say

if TYPE_CHECKING:
    from umbel_client.planning.draft_file import Draft
    from umbel_common.plans.drafted_start import DraftedStart
    from umbel_common.plans.requests import EarlierAdapter

START = Path("--start")


def main() -> int:
    """Writes the plan of the draft or plan on the command line to standard output."""
    confine_command()
    paths = [Path(argument) for argument in sys.argv[1:]]
    if START in paths:
        place = paths.index(START)
        _, start = paths[place : place + 2]
        return exit_code(lambda: print(made(*paths[:place], start=start), end=""))
    return exit_code(lambda: print(made(*paths), end=""))


def made(file: Path, model: Path | None = None, *, start: Path | None = None) -> str:
    """The text of a plan's file.

    Args:
        file: a draft; or a plan, with `model`.
        model: the folder of the plan's base model, which is loaded to try it.
        start: the file of a draft's `[start]`, see above.

    Raises:
        UmbelError: the file or the model does not make a plan.
    """
    from umbel_common.errors import ModelError, PlanError
    from umbel_common.plans.plan_file import plan_from_json, plan_to_json
    from umbel_host.files.model_digest import folder_digest, require_digest
    from umbel_host.files.text_file import read_text
    from umbel_host.installation import install

    if model is not None:
        plan, _ = plan_from_json(read_text(file, PlanError), file)
        if not _can_load():
            raise ModelError(
                "a plan is tried with the packages that load a model, which are not installed here",
                file=model,
                remedy="name a Python that has them in evaluation.python of server.toml"
                f" ({install('client')}), or copy the plan and the model to such a machine, and"
                " the tried plan back",
            )
        require_digest(model, folder_digest(model), plan.model)
        _look_at(model, plan)

        from umbel_client.models.site_model import load_public

        load_public(model, plan, "cpu", field="--model", trains=True)
        return plan_to_json(plan)

    from umbel_client.planning.draft_file import model_folder, read_draft

    # Before the packages are imported, which takes seconds.
    draft, folder = read_draft(file), file.absolute().parent
    from umbel_client.planning.start import is_computed, started

    if not _can_load():
        _require_no_accountant(draft, file)
        if is_computed(draft.start):
            raise ModelError(
                "a head starts at the embeddings of its labels' names, for which the model has to"
                " be loaded, and the packages for that are not installed here",
                file=file,
                field="start",
                found="label-names",
                remedy="name a Python that has them in evaluation.python of server.toml"
                f" ({install('client')}), or make the plan on such a machine and copy it with the"
                " file of its start",
            )
        from umbel_client.planning.untried import untried_plan

        untried = untried_plan(draft, folder)
        untried, _ = started(untried, draft, folder, _earlier(draft.start, start))
        return plan_to_json(untried, not_tried=True)

    from umbel_client.planning.draft import make_plan

    plan = make_plan(draft, folder)
    _look_at(model_folder(draft, folder), plan)
    plan, vector = started(plan, draft, folder, _earlier(draft.start, start))
    if vector is not None and start is not None:
        from umbel_host.files.start_file import write_start

        write_start(start, plan, vector)
    return plan_to_json(plan)


def _require_no_accountant(draft: "Draft", file: Path) -> None:
    """Refuses a draft whose noise has to be calibrated, which the client's packages do."""
    from umbel_client.planning.distributed import DraftDistributed
    from umbel_common.errors import PlanError
    from umbel_host.installation import install

    if isinstance(draft.privacy, DraftDistributed):
        raise PlanError(
            "a plan of distributed mode has the noise in it, and the packages that calibrate it are"
            " not installed here",
            file=file,
            field="privacy.mode",
            found="distributed",
            remedy="name a Python that has them in evaluation.python of server.toml"
            f" ({install('client')}), or make the plan on such a machine and copy it",
        )


def _earlier(asked: "DraftedStart | None", file: Path | None) -> "EarlierAdapter | None":
    """What the operator's registry says about the adapter that a draft names."""
    from umbel_common.errors import PlanError
    from umbel_common.plans.drafted_start import DraftedReleased
    from umbel_common.plans.requests import EarlierAdapter
    from umbel_common.toml_values import from_table
    from umbel_host.files.text_file import read_text

    if file is None or not isinstance(asked, DraftedReleased):
        return None
    import msgspec

    return from_table(msgspec.json.decode(read_text(file, PlanError)), EarlierAdapter, file)


def _can_load() -> bool:
    """Whether the packages that load a model are installed."""
    return find_spec("torch") is not None


def _look_at(folder: Path, plan: TrainingPlan) -> None:
    """Tries the model on made-up records, and says where it was too large to be tried whole."""
    from umbel_client.training.model_look import look_at

    look = look_at(folder, plan)
    if not look.whole:
        say(
            f"The model is large: its first {look.layers} of {look.all_layers} layers were tried,"
            f" on records of {look.tokens} of {look.max_tokens} tokens.",
            err=True,
        )


if __name__ == "__main__":
    enter(main)
