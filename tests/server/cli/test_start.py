"""A plan's start on its way at the operator: from the draft to the registry."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from client.planning.test_draft import DRAFT
from support.enrolling import Enrolling

import umbel_server.cli.plan
from umbel_client import drafting
from umbel_client.planning.draft import read_plan
from umbel_common.adapters.start import LABEL_ROWS
from umbel_common.adapters.vector import Vector, initial_vector, unflatten
from umbel_common.errors import JobUnknown, StorageError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.plans.start import LabelNamesStart, ReleasedStart
from umbel_common.plans.statements import Release
from umbel_common.protocol.transcript import JobFinished, JobStarted
from umbel_common.trust.identity import sign
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enrolling:
    """An operator whose plans are made in this process."""
    made = Enrolling(tmp_path)

    def draft(python: str, file: str, *words: str) -> str:
        return drafting.made(Path(file), start=Path(words[1]) if words else None)

    monkeypatch.setattr(umbel_server.cli.plan, "_made", draft)
    return made


def plan_of(operator: Enrolling, file: str) -> TrainingPlan:
    return plan_from_json((operator.operator / file).read_text(), file)[0]


def write_draft(operator: Enrolling, model: Path, start: str, job: str = "triage") -> None:
    text = DRAFT.format(model=model).replace('job = "triage"', f'job = "{job}"')
    (operator.operator / "draft.toml").write_text(f"{text}\n[start]\n{start}\n")


def test_a_head_travels_beside_its_plan_into_the_registry(
    operator: Enrolling, tiny_model: Path
) -> None:
    write_draft(operator, tiny_model, 'start = "label-names"\nnames = ["w1 w2", "w30"]')
    shown = operator.server("plan", "new", "draft.toml", "--out", "plan.json")
    plan = plan_of(operator, "plan.json")
    (file,) = operator.operator.glob("start-*.safetensors")
    assert f"start: {file.name}" in shown
    operator.server("plan", "sign", "plan.json", "--out", "signed.json")
    registry = Registry(operator.operator / "state" / "registry")
    moved = file.rename(file.with_name("elsewhere"))
    with pytest.raises(StorageError, match="not at hand"):
        operator.server("job", "start", "signed.json")
    moved.rename(file)
    assert "queued: triage" in operator.server("job", "start", "signed.json")
    rows = unflatten(registry.start(plan), plan.lora.tensors)[LABEL_ROWS]
    assert np.linalg.norm(rows, axis=1) == pytest.approx([2, 2])
    # What is damaged since is not released.
    assert isinstance(plan.start, LabelNamesStart)
    path = registry.folder(plan.start.tensor) / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StorageError, match="not in the registry"):
        registry.start(plan)


def release(operator: Enrolling, plan: TrainingPlan, vectors: list[Vector]) -> list[bytes]:
    """Makes the operator's files say that a job released these adapters, and is over."""
    key, state = operator.key(), operator.operator / "state"
    registry = Registry(state / "registry")
    digests = [registry.publish(plan, vector) for vector in vectors]
    signed = [
        sign(
            key,
            Release(
                federation=plan.federation,
                job=plan.job,
                plan=plan.digest(),
                round=number,
                attempt=number,
                context=bytes(32),
                adapter=digest,
                survivors=(),
                total_weight=0,
            ),
        )
        for number, digest in enumerate(digests)
    ]
    signed_plan, job = sign(key, plan), plan.job
    with closing(Journal(state / "journal.sqlite")) as journal:
        event = JobStarted(plan=signed_plan, roster=bytes(32), release=signed[0])
        journal.start_job(key, job, signed_plan, digests[0], signed[0], event)
        end = JobFinished(release=digests[-1], delivered=())
        for number, one in list(enumerate(signed))[1:]:
            journal.record_release(key, job, number, digests[number], one, end)
        journal.finish_job(key, job, len(digests) - 1, end)
    return digests


@pytest.mark.parametrize(("asked", "round_number"), [("", 2), ("round = 1", 1)])
def test_a_plan_starts_from_what_an_earlier_job_released(
    operator: Enrolling, tiny_model: Path, asked: str, round_number: int
) -> None:
    write_draft(operator, tiny_model, 'start = "seed"', "earlier")
    earlier = read_plan(operator.operator / "draft.toml")
    start = initial_vector(earlier)
    vectors = [start, start + np.float32(0.1), start + np.float32(0.2)]
    digests = release(operator, earlier, vectors)
    write_draft(operator, tiny_model, f'start = "released"\njob = "earlier"\n{asked}')
    operator.server("plan", "new", "draft.toml", "--out", "plan.json")
    plan = plan_of(operator, "plan.json")
    assert isinstance(plan.start, ReleasedStart)
    assert (plan.start.plan, plan.start.round) == (earlier.digest(), round_number)
    assert plan.start.adapter == digests[round_number]
    assert not list(operator.operator.glob(".start-*"))
    operator.server("plan", "sign", "plan.json", "--out", "signed.json")
    operator.server("job", "start", "signed.json")
    registry = Registry(operator.operator / "state" / "registry")
    np.testing.assert_array_equal(registry.start(plan), vectors[round_number])


def test_a_draft_names_a_job_that_the_operator_ran(
    operator: Enrolling, tiny_model: Path, make_plan: Callable[..., TrainingPlan]
) -> None:
    write_draft(operator, tiny_model, 'start = "released"\njob = "never"')
    with pytest.raises(JobUnknown):
        operator.server("plan", "new", "draft.toml", "--out", "plan.json")
    release(operator, make_plan(), [initial_vector(make_plan())])
    write_draft(operator, tiny_model, 'start = "released"\njob = "job"\nround = 3')
    with pytest.raises(JobUnknown, match="not released"):
        operator.server("plan", "new", "draft.toml", "--out", "plan.json")
