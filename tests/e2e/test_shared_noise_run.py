"""Runs of distributed mode, from the scenario to `umbel-simulate verify`."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from umbel_client.ledger.file import read_ledger
from umbel_client.privacy.accounting import epsilon
from umbel_common.canonical import decode_canonical
from umbel_common.errors import VerificationError
from umbel_common.plans.plan import PLAN_VERSIONS, DistributedPrivacy, TrainingPlan
from umbel_common.trust.identity import Signed
from umbel_host.files.adapter_folder import read_vector
from umbel_simulations.runs.verify import verify_run

LOCAL = """\
mode = "local"
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0
"""
SHARED = """\
mode = "distributed"
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0
sampling_rate = 1.0
honest = 2
least_survivors = 3
spare_attempts = 1
"""
RATES = """\
adapter_learning_rate = 1e-2
head_learning_rate = 1e-1
"""
REST = """
[compute]
physical_batch_size = 4

[server]
optimizer = "sgd"
adapter_learning_rate = 0.5
head_learning_rate = 1.0

[evaluation]
noise_multiplier = 4.0
max_records = 100

# One site falls silent in round 1, and the others finish it. Two do in round 2: too few are left.
[[faults.dropouts]]
round = 1
site = "hospital-d"
stage = "mask"

[[faults.dropouts]]
round = 2
site = "hospital-a"
stage = "mask"

[[faults.dropouts]]
round = 2
site = "hospital-b"
stage = "mask"
"""


def share_noise(tiny: Any) -> None:
    tiny.change("count = 3", "count = 4")
    tiny.change(LOCAL, SHARED)
    tiny.change(RATES, 'optimizer = "none"\n')
    tiny.path.write_text(tiny.path.read_text() + REST)


def plan_of(run: Path) -> TrainingPlan:
    signed = decode_canonical((run / "plan.msgpack").read_bytes(), Signed)
    return decode_canonical(signed.statement, PLAN_VERSIONS)


def altered(path: Path, field: str, value: object) -> bytes:
    """A summary with another figure of its first site, and what was there before."""
    before = path.read_bytes()
    summary = msgspec.json.decode(before)
    assert field in summary["sites"][0]
    summary["sites"][0][field] = value
    path.write_bytes(msgspec.json.encode(summary))
    return before


@pytest.mark.full
def test_a_federation_shares_its_noise_survives_faults_and_is_verified(tiny: Any) -> None:
    share_noise(tiny)
    result = tiny.run()
    assert result.returncode == 0, result.stderr
    run = tiny.run_folder
    plan = plan_of(run)
    privacy = plan.privacy
    assert isinstance(privacy, DistributedPrivacy)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["privacy"], summary["rounds"], summary["aborted_attempts"]) == (
        "distributed",
        2,
        1,
    )
    assert len(summary["sites"]) == 4
    for site in summary["sites"]:
        attempts = read_ledger(run / "sites" / site["name"] / "state" / "ledger.sqlite").attempts
        # Each attempt is charged, the aborted one too, with the counts that travel in it.
        assert len(attempts) == privacy.most_attempts == 3
        cost = next(iter(attempts.values())).cost
        assert cost.counts is not None
        spent = epsilon([*[cost.everybody] * 3, *[cost.counts] * 3], privacy.delta)
        shared = epsilon([*[cost.shared] * 3, *[cost.counts] * 3], privacy.delta)
        assert site["epsilon"] == pytest.approx(spent, rel=1e-6)
        assert site["shared_epsilon"] == pytest.approx(shared, rel=1e-6)
        assert 0.99 * privacy.epsilon < shared <= privacy.epsilon < spent
    assert read_vector(run / "adapter", plan).any()
    verified = tiny.simulate("verify", run)
    assert verified.returncode == 0, verified.stderr
    path = run / "summary.json"
    for field, value in (
        ("shared_epsilon", 1.0),
        ("shared_epsilon", 8.5),
        ("epsilon", 0.5),
        ("noise_multiplier", 3.0),
        ("sampling_rate", 0.5),
    ):
        before = altered(path, field, value)
        with pytest.raises(VerificationError, match="not one that the plan"):
            verify_run(run)
        path.write_bytes(before)
    verify_run(run)


@pytest.mark.full
def test_a_federation_that_alternates_shares_its_noise(tiny: Any) -> None:
    share_noise(tiny)
    tiny.change('method = "both"', 'method = "alternate"')
    result = tiny.run()
    assert result.returncode == 0, result.stderr
    verify_run(tiny.run_folder)
