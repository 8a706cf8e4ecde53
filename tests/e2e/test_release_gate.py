"""Real jobs whose adapters are evaluated by a process of their own, by commands and configuration
as an operator writes them: worse adapters are held back, and none passes unevaluated."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from e2e.daemons import Clinics, Site
from support import warm_python
from support.waiting import HANGING

from umbel_client.ledger.file import read_ledger
from umbel_common.adapters.vector import initial_vector
from umbel_common.canonical import decode_canonical
from umbel_common.plans.plan import LossGate, Sgd, Training, TrainingPlan
from umbel_common.plans.plan_file import plan_to_json
from umbel_common.plans.statements import RELEASE_VERSIONS
from umbel_common.protocol.verification import VerifiedJob, verify_transcript
from umbel_common.trust.identity import Signed, open_signed
from umbel_host.files.adapter_folder import RELEASE_FILE
from umbel_server.storage.job_queue import JobState
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import read_vector

EVALUATOR = """\
#!/bin/sh
# The evaluating Python, which dies or waits at its n-th start from now where a test says so.
echo x >> "{folder}/starts"
number=$(wc -l < "{folder}/starts")
if [ -e "{folder}/crash-$number" ]; then kill -9 $$; fi
if [ -e "{folder}/wait-$number" ]; then sleep 600; fi
exec "{python}" "$@"
"""

EVALUATION = """
[evaluation]
holdout = "public.jsonl"
model = {model}
python = "evaluator"
groups = "ward"
"""


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Clinics]:
    made = Clinics(tmp_path_factory.mktemp("clinics"), tiny_model)
    folder = made.operator_folder
    rows = [
        {"text": f"w{number} w{number + 1}", "label": "ab"[number % 2], "ward": str(number % 3)}
        for number in range(30)
    ]
    (folder / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluator").write_text(EVALUATOR.format(folder=folder, python=sys.executable))
    (folder / "evaluator").chmod(0o755)
    with (folder / "server.toml").open("a") as file:
        file.write(EVALUATION.format(model=json.dumps(str(tiny_model))))
    made.start_all()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_faults(clinics: Clinics) -> Iterator[None]:
    yield
    for pattern in ("crash-*", "wait-*", "starts"):
        for path in clinics.operator_folder.glob(pattern):
            path.unlink()


def gate_of(clinics: Clinics, most: float) -> LossGate:
    holdout = (clinics.operator_folder / "public.jsonl").read_bytes()
    return LossGate(holdout=hashlib.sha256(holdout).digest(), max_loss_increase=most)


def training(rate: float, rounds: int = 1) -> Training:
    return Training(
        rounds=rounds,
        local_steps=2,
        expected_batch_size=8,
        optimizer=Sgd(adapter_learning_rate=rate, head_learning_rate=rate),
    )


def server(clinics: Clinics, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return warm_python.run(
        *("-m", "umbel_server.cli"),
        *arguments,
        cwd=clinics.operator_folder,
        env={**os.environ, "COLUMNS": "120"},
    )


def start(clinics: Clinics, plan: TrainingPlan) -> "subprocess.CompletedProcess[str]":
    """Signs and starts a plan by the operator's commands."""
    folder = clinics.operator_folder
    (folder / f"{plan.job}.json").write_text(plan_to_json(plan))
    signed = f"{plan.job}-signed.json"
    assert server(clinics, "plan", "sign", f"{plan.job}.json", "--out", signed).returncode == 0
    return server(clinics, "job", "start", signed)


def started(clinics: Clinics, job: str, **changes: object) -> TrainingPlan:
    plan = msgspec.structs.replace(clinics.plan(), job=job, **changes)
    done = start(clinics, plan)
    assert done.returncode == 0, done.stderr
    return plan


def verified(clinics: Clinics, job: str) -> VerifiedJob:
    path = clinics.operator_folder / "state" / "journal.sqlite"
    with closing(Journal(path)) as journal:
        return verify_transcript(journal.transcript(job), clinics.roster)


def losses(clinics: Clinics, job: str) -> list[float | None]:
    shown = json.loads(server(clinics, "job", "status", job, "--json").stdout)
    return [one["evaluation"]["mean_loss"] for one in shown["evaluations"]]


def charged(site: Site, job: str) -> list[int]:
    path = site.folder / "state" / "ledger.sqlite"
    if not path.exists():
        return []  # the first plan that a site accepts begins its ledger
    ledger = read_ledger(path)
    return [entry.round for entry in ledger.rounds.values() if entry.job == job]


def finished(clinics: Clinics, job: str) -> None:
    queued = clinics.wait(job, JobState.FINISHED, JobState.FAILED, JobState.STOPPED)
    assert queued.state is JobState.FINISHED, (queued.detail, clinics.logs())


@pytest.mark.soak
def test_an_update_that_was_made_worse_is_held_back_and_charged_all_the_same(
    clinics: Clinics,
) -> None:
    plan = started(
        clinics, "worse", training=training(100.0, 2), release_gate=gate_of(clinics, 0.05)
    )
    finished(clinics, "worse")
    before, *after = losses(clinics, "worse")
    assert before == pytest.approx(np.log(2), rel=1e-3)
    assert all(loss is None or loss > before + 0.05 for loss in after)

    job = verified(clinics, "worse")
    assert job.held_back == (1, 2)
    assert len({release.adapter for release in job.releases}) == 1
    assert all(len(release.survivors) >= 2 for release in job.releases[1:])
    for site in clinics.sites.values():
        assert charged(site, "worse") == [1, 2]
        folder = site.folder / "state" / "adapters" / "worse"
        np.testing.assert_array_equal(read_vector(folder, plan), initial_vector(plan))
        signed = decode_canonical((folder / RELEASE_FILE).read_bytes(), Signed)
        assert (
            open_signed(signed, RELEASE_VERSIONS, clinics.operator.public_key) == job.releases[-1]
        )

    shown = server(clinics, "job", "status", "worse").stdout
    assert "held back: mean-loss" in shown
    assert "after 0.6931, at most 0.05 more" in shown
    assert server(clinics, "adapters", "list").stdout.count("held back") == 2


@pytest.mark.soak
def test_without_the_gate_the_same_update_is_released(clinics: Clinics) -> None:
    """What the gate prevents."""
    started(clinics, "open", training=training(100.0))
    finished(clinics, "open")
    before, after = losses(clinics, "open")
    assert before is not None
    assert after is None or after > before + 0.05
    job = verified(clinics, "open")
    assert job.held_back == ()
    assert len({release.adapter for release in job.releases}) == 2
    figures = server(clinics, "job", "status", "open").stdout
    assert "accuracy" in figures
    assert "drift" in figures


@pytest.mark.soak
def test_an_evaluator_that_crashes_stops_the_job_which_resumes_there(clinics: Clinics) -> None:
    (clinics.operator_folder / "crash-2").touch()
    started(clinics, "crash", training=training(0.01), release_gate=gate_of(clinics, 5.0))
    queued = clinics.wait("crash", JobState.FINISHED, JobState.FAILED)
    assert queued.state is JobState.FAILED, clinics.logs()
    assert "signal 9" in queued.detail
    assert "resume" in server(clinics, "job", "status", "crash").stdout
    # The sum of round 1 was there, and nobody has it.
    assert [release.round for release in verified(clinics, "crash").releases] == [0]

    assert server(clinics, "job", "resume", "crash").returncode == 0
    finished(clinics, "crash")
    job = verified(clinics, "crash")
    assert (len(job.releases), job.held_back) == (2, ())
    for site in clinics.sites.values():
        assert charged(site, "crash") == [1]


def test_a_job_can_be_stopped_while_an_adapter_is_evaluated(clinics: Clinics) -> None:
    (clinics.operator_folder / "wait-1").touch()
    started(clinics, "slow", training=training(0.01), release_gate=gate_of(clinics, 5.0))
    deadline = time.monotonic() + HANGING
    while not (clinics.operator_folder / "starts").exists():
        assert time.monotonic() < deadline, clinics.logs()
        time.sleep(0.1)
    assert server(clinics, "job", "stop", "slow").returncode == 0
    clinics.wait("slow", JobState.STOPPED)


def test_a_job_whose_gate_cannot_be_kept_does_not_start(clinics: Clinics) -> None:
    folder = clinics.operator_folder
    other = LossGate(holdout=bytes(32), max_loss_increase=0.05)
    plan = msgspec.structs.replace(clinics.plan(), job="other", release_gate=other)
    done = start(clinics, plan)
    assert done.returncode == 11
    assert "not the one that the plan's release gate names" in done.stderr

    plan = msgspec.structs.replace(plan, job="gone", release_gate=gate_of(clinics, 0.05))
    (folder / "public.jsonl").rename(folder / "elsewhere")
    try:
        done = start(clinics, plan)
        assert done.returncode == 11
        assert "evaluation.holdout" in done.stderr
        # One that was queued already, too.
        clinics.add(job="queued", release_gate=plan.release_gate)
        queued = clinics.wait("queued", JobState.FAILED)
        assert "the holdout cannot be read" in queued.detail
    finally:
        (folder / "elsewhere").rename(folder / "public.jsonl")

    text = (folder / "server.toml").read_text()
    (folder / "server.toml").write_text(text[: text.index("[evaluation]")])
    try:
        done = start(clinics, msgspec.structs.replace(plan, job="nobody"))
        assert done.returncode == 10
        assert "does not evaluate adapters" in done.stderr
    finally:
        (folder / "server.toml").write_text(text)
    for site in clinics.sites.values():
        assert [charged(site, job) for job in ("other", "gone", "queued", "nobody")] == [[]] * 4
