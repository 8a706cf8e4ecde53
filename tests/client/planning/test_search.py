"""Tuning on public records: real trainings of a tiny model, by the operator's command."""

import json
import re
import sys
import tomllib
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import msgspec
import numpy as np
import pytest
from click.testing import Result
from rich.console import Console
from support import warm_python
from typer.testing import CliRunner

import umbel_client.planning.search
import umbel_server.cli.command
import umbel_server.cli.tune
from umbel_client.planning.draft import read_plan
from umbel_client.planning.search import draft_with, search_space, with_values
from umbel_client.planning.search import tune as run
from umbel_client.planning.trial import PublicData, loss_after_training
from umbel_common.errors import ConfigError, DataError, ModelError, StorageError
from umbel_common.plans.plan import LocalPrivacy, second_version
from umbel_common.plans.requests import TuningRequest
from umbel_common.plans.server_optimizer import Average, ServerOptimizer, ServerSgd
from umbel_host.processes.supervisor import belong_to_parent

DRAFT = """\
federation = "clinics"
job = "triage"

[model]
name = "tiny"
path = "{model}"

[task]
task = "classification"
labels = ["a", "b"]

[lora]
rank = 2
alpha = 4.0
target_modules = ["query"]
layers = [1]
method = "ffa"

[training]
rounds = 2
local_steps = 3
expected_batch_size = 8
# Too low, as a first guess often is.
optimizer = {{ optimizer = "sgd", adapter_learning_rate = 1e-4, head_learning_rate = 1e-4 }}

[privacy]
mode = "local"
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0

[aggregation]
threshold = 3
clip_range = 10.0
step = 1e-6
"""


@pytest.fixture
def draft(tmp_path: Path, tiny_model: Path) -> Path:
    """Its public records are told apart by one word."""
    path = tmp_path / "draft.toml"
    path.write_text(DRAFT.format(model=tiny_model))
    random = np.random.default_rng(3)
    rows = [
        {"text": f"w{words[0] % 30} w3{number % 2}", "label": "ab"[number % 2]}
        for number, words in enumerate(random.integers(0, 30, (80, 1)))
    ]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def started_warm(command: list[str], *, input: bytes, check: bool, preexec_fn: object) -> object:
    """In the place of `subprocess.run`: the process that the command starts is started warm."""
    assert (command[0], check) == (sys.executable, False)
    assert preexec_fn is belong_to_parent
    done = warm_python.run(*command[1:], input=input.decode())
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done


def tune(draft: Path, *more: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(umbel_server.cli.tune, "subprocess", SimpleNamespace(run=started_warm))
        words = ("tune", str(draft), "--data", str(draft.parent / "public.jsonl"), *more)
        return CliRunner().invoke(umbel_server.cli.command.app, words)


def rows(shown: str) -> list[tuple[str, str]]:
    """Loss and values of each trial."""
    return re.findall(r"^\d+ +(\d+\.\d+) +([-\d.e]+ +[-\d.e]+ +[-\d.e]+)", shown, re.MULTILINE)


def test_the_command_writes_the_draft_with_the_best_values(draft: Path) -> None:
    out = draft.with_name("tuned.toml")
    options = ("--out", str(out), "--public-size", "8", "--sites", "2", "--seed", "4")
    done = tune(draft, *options, "--trials", "3")
    assert done.exit_code == 0, done.output
    assert len(rows(done.stdout)) == 3
    assert "the draft as it is" in done.stdout
    tuned, given = (tomllib.loads(path.read_text()) for path in (out, draft))
    values = tuned["training"].pop("optimizer")
    del given["training"]["optimizer"]
    del tuned["privacy"]["clip_norm"], given["privacy"]["clip_norm"]
    assert tuned == given
    (line,) = re.findall(r"^.*best *$", done.stdout, re.MULTILINE)
    assert f" {values['head_learning_rate']:.3g} " in line
    (best,) = re.findall(r"^\d+ +([\d.]+) .*best *$", done.stdout, re.MULTILINE)
    assert best == min(loss for loss, _ in rows(done.stdout))
    assert "# Too low" in out.read_text()
    # Nothing is written over.
    again = tune(draft, *options, "--trials", "3")
    assert isinstance(again.exception, StorageError)
    assert again.exception.exit_code == 50
    assert tune(draft, *options, "--trials", "0").exit_code == 2


def search(draft: Path, **parts: object) -> str:
    """What a search prints; keyword arguments replace parts of its request."""
    folder = draft.parent
    request = {
        "draft": str(draft),
        "data": str(folder / "public.jsonl"),
        "out": str(folder / "out.toml"),
        "study": str(folder / "study.sqlite"),
        "trials": 3,
    }
    console = Console(file=StringIO(), width=120)
    run(msgspec.convert({**request, **parts}, TuningRequest), console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_search_goes_on_with_the_trials_that_were(draft: Path) -> None:
    first = rows(search(draft))
    more = rows(search(draft, trials=5, out=str(draft.with_name("more.toml"))))
    assert (more[:3], len(more)) == (first, 5)
    # Each is another one: the sampler does not begin anew.
    assert len({values for _, values in more}) == 5


def test_a_study_belongs_to_one_search(draft: Path) -> None:
    search(draft, trials=1)
    for parts in ({"seed": 1}, {"public_size": 70}, {"sites": 2}, {"validation_share": 0.5}):
        with pytest.raises(ConfigError, match="another draft, other records, or other options"):
            search(draft, out=str(draft.with_name("other.toml")), **parts)
    draft.write_text(draft.read_text().replace("rounds = 2", "rounds = 3"))
    with pytest.raises(ConfigError, match="another draft"):
        search(draft, out=str(draft.with_name("other.toml")))


def test_what_cannot_be_tuned_is_one_clear_error(
    draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = draft.with_name("few.jsonl")
    few.write_text('{"text": "w1", "label": "a"}\n')
    with pytest.raises(DataError, match="too small"):
        search(draft, data=str(few))
    broken = draft.with_name("broken.sqlite")
    broken.write_text("no database")
    with pytest.raises(StorageError, match=r"broken\.sqlite"):
        search(draft, study=str(broken))

    def diverge(*_: object, **__: object) -> NoReturn:
        raise ModelError("training diverged")

    monkeypatch.setattr(umbel_client.planning.search, "loss_after_training", diverge)
    with pytest.raises(ModelError, match="no trial came to an end"):
        search(draft, trials=2)
    assert not (draft.parent / "out.toml").exists()


@pytest.fixture
def data(draft: Path, tiny_model: Path) -> PublicData:
    return PublicData.load(
        read_plan(draft), tiny_model, draft.parent / "public.jsonl", {}, share=0.25, seed=0
    )


def test_a_trial_trains_under_the_noise_of_the_public_size(draft: Path, data: PublicData) -> None:
    """The same records, and a site so small that its noise drowns what they say; four of them
    average some of it away."""
    text = draft.read_text().replace("epsilon = 8.0", "epsilon = 1.0")
    draft.write_text(text.replace("local_steps = 3", "local_steps = 10"))
    plan = with_values(
        read_plan(draft), {"adapter_learning_rate": 1e-4, "head_learning_rate": 0.02}
    )
    assert (len(data.training), len(data.validation)) == (60, 20)

    def loss(size: int, sites: int = 1, seed: int = 1) -> float:
        return loss_after_training(plan, data, public_size=size, sites=sites, seed=seed)

    seeds = range(3)
    noisy = np.mean([loss(8, seed=seed) for seed in seeds])
    clear = [loss(1_000, seed=seed) for seed in seeds]
    shared = np.mean([loss(8, sites=4, seed=seed) for seed in seeds])
    assert np.mean(clear) < noisy - 0.1
    assert shared < noisy - 0.1
    assert loss(1_000, seed=1) == clear[1]
    assert clear[1] != clear[2]


def test_a_trial_takes_the_servers_steps(draft: Path, data: PublicData) -> None:
    plain = with_values(read_plan(draft), {"head_learning_rate": 0.02})

    def loss(server: ServerOptimizer) -> float:
        plan = second_version(plain, server=server)
        return loss_after_training(plan, data, public_size=1_000, sites=2, seed=1)

    same = ServerSgd(adapter_learning_rate=1.0, momentum=0.0)
    assert loss(same) == pytest.approx(loss(Average()), abs=1e-5)
    still = loss(ServerSgd(adapter_learning_rate=1e-12))
    assert still == pytest.approx(np.log(2), abs=1e-4)
    assert abs(loss(Average()) - still) > 1e-3


def test_a_clip_norm_that_only_scales_rates_is_not_looked_for(draft: Path) -> None:
    plan = read_plan(draft)
    assert set(search_space(plan)) == {"adapter_learning_rate", "head_learning_rate", "clip_norm"}
    draft.write_text(draft.read_text().replace("clip_norm = 1.0", CLIPPING))
    automatic = read_plan(draft)
    assert set(search_space(automatic)) == {"adapter_learning_rate", "head_learning_rate"}
    changed = with_values(plan, {"adapter_learning_rate": 0.5, "clip_norm": 0.25})
    assert changed.training.optimizer.adapter_learning_rate == 0.5
    assert isinstance(changed.privacy, LocalPrivacy)
    assert changed.privacy.clip_norm == 0.25


CLIPPING = 'clip_norm = 1.0\nclipping = "automatic"'


SHARED = """
[privacy]
mode = "distributed"
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0
sampling_rate = 0.1
honest = 2
least_survivors = 3

[aggregation]
threshold = 3

[server]
optimizer = "sgd"
adapter_learning_rate = 1e-3
head_learning_rate = 1e-3
"""


def shared(draft: Path, *, batch: int) -> None:
    """Makes the draft one of distributed mode, of a federation that is larger than the file."""
    text = draft.read_text().partition("[privacy]")[0].replace("local_steps = 3", "local_steps = 1")
    own = re.sub(r"optimizer = .*", 'optimizer = { optimizer = "none" }', text) + SHARED
    own = re.sub(r"expected_batch_size = \d+", f"expected_batch_size = {batch}", own)
    draft.write_text(own.replace("rounds = 2", "rounds = 12"))


def test_in_distributed_mode_the_servers_rates_are_searched(draft: Path) -> None:
    shared(draft, batch=40)
    plan = read_plan(draft)
    assert set(search_space(plan)) == {"adapter_learning_rate", "head_learning_rate"}
    changed = with_values(plan, {"adapter_learning_rate": 0.5, "head_learning_rate": 2.0})
    assert changed.server == ServerSgd(adapter_learning_rate=0.5, head_learning_rate=2.0)
    assert changed.training == plan.training
    search(draft, trials=2)
    written = tomllib.loads((draft.parent / "out.toml").read_text())
    given = tomllib.loads(draft.read_text())
    del written["server"]["adapter_learning_rate"], given["server"]["adapter_learning_rate"]
    del written["server"]["head_learning_rate"], given["server"]["head_learning_rate"]
    assert written == given


def test_a_trial_of_distributed_mode_has_the_noise_of_all_sites(
    draft: Path, tiny_model: Path
) -> None:
    """Each batch is the whole file here. The noise is that of the plan's batch and of at least the
    fewest survivors: a larger batch has less of it, and more sites have more."""
    public = draft.parent / "public.jsonl"

    def loss(batch: int, sites: int, seed: int = 1) -> float:
        shared(draft, batch=batch)
        rates = {"adapter_learning_rate": 1e-4, "head_learning_rate": 0.5}
        plan = with_values(read_plan(draft), rates)
        data = PublicData.load(plan, tiny_model, public, {}, share=0.25, seed=0)
        return loss_after_training(plan, data, public_size=1, sites=sites, seed=seed)

    noisy, clear = loss(60, 3000), loss(60, 3)
    assert clear < noisy - 0.2
    assert loss(6000, 3000) < noisy - 0.2
    assert loss(60, 1) == clear


def test_a_draft_keeps_all_but_the_values() -> None:
    text = "[training.optimizer]\n# why\nadapter_learning_rate = 1e-3 # first\n"
    changed = draft_with(text, {"adapter_learning_rate": 0.25})
    assert changed == text.replace("1e-3", "0.25")
