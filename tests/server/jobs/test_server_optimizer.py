"""Jobs whose server takes steps: kills, rounds that are held back, and releases made again."""

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from umbel_common.adapters import fedsvd
from umbel_common.adapters.vector import Vector, adapter_digest, initial_vector, unflatten
from umbel_common.errors import StorageError, VerificationError
from umbel_common.plans.figures import ClassificationFigures, Evaluation, Loss
from umbel_common.plans.plan import (
    Aggregation,
    DistributedPrivacy,
    FederatedEvaluation,
    NoOptimizer,
    ReleaseGate,
    Training,
    TrainingPlan,
)
from umbel_common.plans.server_optimizer import (
    Average,
    Schedule,
    ServerAdam,
    ServerOptimizer,
    ServerSgd,
    ServerYogi,
)
from umbel_common.protocol import recomputation
from umbel_common.protocol.verification import VerifiedJob, verify_transcript
from umbel_common.secagg import sums
from umbel_common.secagg.encoding import RingVector, sum_digest
from umbel_server.aggregation import update
from umbel_server.storage.registry import Registry

MakeSetting = Callable[..., Any]
STEP = 2.0**-10
THREE = Aggregation(threshold=3, clip_range=1.0, step=STEP)
RATES: dict[str, Any] = {
    "adapter_learning_rate": 0.02,
    "head_learning_rate": 0.3,
    "schedule": Schedule(final=0.5),
}
SERVERS: dict[str, ServerOptimizer] = {
    "average": Average(),
    "sgd": ServerSgd(**RATES),
    "adam": ServerAdam(**RATES),
    "yogi": ServerYogi(**RATES),
}
METHODS = ("both", "ffa", "alternate", "fedsvd")
KINDS = {
    ("average", "fedsvd"),
    ("sgd", "both"),
    ("sgd", "fedsvd"),
    ("adam", "alternate"),
    ("adam", "fedsvd"),
    ("yogi", "ffa"),
}
"""Each optimizer and each method, and what fedsvd does to each kind of state; the full suite has
all pairs."""


def pairs_of(*servers: str) -> list[Any]:
    """These optimizers with each method."""
    return [
        pytest.param(*pair, marks=() if pair in KINDS else pytest.mark.full)
        for pair in itertools.product(servers, METHODS)
    ]


class Killed(Exception):
    """The server's process ends here."""


def exact(setting: Any) -> Any:
    """Deltas that no rounding changes: the sums of two jobs are the same then."""
    for site in setting.sites.values():
        drawn = site.delta

        def rounded(number: int, drawn: Callable[[int], Vector] = drawn) -> Vector:
            return np.round(drawn(number) / np.float32(STEP)) * np.float32(STEP)

        site.delta = rounded
    return setting


def verified(setting: Any, **given: Any) -> VerifiedJob:
    """The job by its transcript, with the sums of the registry."""

    def sum_of(digest: bytes) -> RingVector | None:
        return setting.registry.load_sum(setting.plan, digest)

    def adapter_of(digest: bytes) -> Vector | None:
        return setting.registry.load(setting.plan, digest)

    given = {"sums": sum_of, "adapters": adapter_of, **given}
    return verify_transcript(setting.journal.transcript("job"), setting.roster, **given)


def adapters(setting: Any) -> list[bytes]:
    return [release.adapter for release in verified(setting).releases]


@pytest.mark.parametrize(("name", "method"), pairs_of(*SERVERS))
def test_each_release_follows_from_its_sum(
    make_setting: MakeSetting, name: str, method: str
) -> None:
    setting = make_setting(3, aggregation=THREE, server=SERVERS[name], method=method)
    setting.job().run()
    job = verified(setting)
    assert len({release.adapter for release in job.releases}) == 4
    assert job.not_recomputed == ()
    without = verify_transcript(setting.journal.transcript("job"), setting.roster)
    assert without.not_recomputed == (1, 2, 3)
    second = job.releases[2]
    missing = verified(
        setting,
        sums=lambda digest: (
            None if digest == second.sum else setting.registry.load_sum(setting.plan, digest)  # type: ignore[attr-defined]
        ),
    )
    assert missing.not_recomputed == (2, 3)
    if method == "fedsvd":
        assert verified(setting, adapters=None).not_recomputed == (1, 2, 3)


@pytest.mark.parametrize(("name", "method"), pairs_of("sgd", "adam"))
def test_in_distributed_mode_the_adapter_moves_against_the_sum(
    make_setting: MakeSetting, name: str, method: str
) -> None:
    privacy = DistributedPrivacy(
        epsilon=8.0,
        delta=1e-5,
        clip_norm=1.0,
        sampling_rate=0.1,
        noise_bits=4,
        honest=2,
        least_survivors=3,
        most_attempts=10,
    )
    training = Training(rounds=3, local_steps=1, expected_batch_size=8, optimizer=NoOptimizer())
    parts = {"aggregation": THREE, "privacy": privacy, "training": training, "method": method}
    setting = exact(make_setting(3, server=SERVERS[name], **parts))
    setting.job().run()
    job = verified(setting)
    assert job.not_recomputed == ()
    after = setting.registry.load(setting.plan, job.releases[1].adapter)
    way = unflatten(after - initial_vector(setting.plan), setting.plan.lora.tensors)
    sent = np.sum([site.delta(1) for site in setting.sites.values()], axis=0)
    # The first step of either is one against the gradient; the head is what comes last.
    gradient = sent[-way["head.weight"].size :] / 8
    step = 0.3 * (gradient if name == "sgd" else np.sign(gradient))
    np.testing.assert_allclose(way["head.weight"].reshape(-1), -step, rtol=1e-3, atol=1e-6)


WRITES = (
    ("registry", "publish"),
    ("registry", "keep_sum"),
    ("journal", "start_job"),
    ("journal", "record_attempt"),
    ("journal", "record_release"),
    ("journal", "finish_job"),
)


def kill_at(setting: Any, write: int) -> list[str]:
    """Makes the write of that number, and each after it, the end of the process.

    Returns:
        the writes as they happen.
    """
    done: list[str] = []

    def counted(name: str, kept: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if len(done) >= write:
            raise Killed
        done.append(name)
        return kept(*given, **named)

    for owner, name in WRITES:
        part = getattr(setting, owner)
        setattr(part, name, partial(counted, name, getattr(part, name)))
    return done


def revive(setting: Any) -> None:
    """A new process opens the files again."""
    setting.journal.close()
    setting.journal = type(setting.journal)(setting.folder / "journal.sqlite")
    setting.registry = Registry(setting.folder / "registry")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("sgd", "fedsvd"),
        pytest.param("adam", "alternate", marks=pytest.mark.full),
        pytest.param("yogi", "both", marks=pytest.mark.full),
    ],
)
def test_a_kill_before_any_write_changes_no_release(
    make_setting: MakeSetting, tmp_path: Path, name: str, method: str
) -> None:
    parts = {"aggregation": THREE, "server": SERVERS[name], "method": method}
    whole = exact(make_setting(3, folder=tmp_path / "whole", **parts))
    written = kill_at(whole, write=1000)
    whole.job().run()
    expected = adapters(whole)
    assert len(written) == 15
    for write in range(len(written)):
        setting = exact(make_setting(3, folder=tmp_path / str(write), **parts))
        kill_at(setting, write)
        with pytest.raises(Killed):
            setting.job().run()
        revive(setting)
        setting.job().run()
        assert adapters(setting) == expected
        assert verified(setting).not_recomputed == ()


class Losses:
    """Finds these losses, one after the other."""

    stop_after = None

    def __init__(self, *losses: Loss) -> None:
        self.losses = list(losses)

    def check(self, plan: TrainingPlan) -> None:
        pass

    def evaluate(self, plan: TrainingPlan, adapter: Vector, before: Vector | None) -> Evaluation:
        figures = ClassificationFigures(accuracy=0.5, macro_f1=0.5)
        return Evaluation(records=1, mean_loss=self.losses.pop(0), figures=figures)


@pytest.mark.parametrize("method", ["both", "fedsvd"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_round_that_was_held_back_leaves_the_state_as_it_was(
    make_setting: MakeSetting, tmp_path: Path, name: str, method: str, restarted: bool
) -> None:
    """The next round's adapter is that of a job in which the round never was."""
    gate = ReleaseGate(holdout=bytes(32), max_loss_increase=0.1)
    parts = {"aggregation": THREE, "server": SERVERS[name], "method": method, "release_gate": gate}
    setting = exact(make_setting(3, folder=tmp_path / "held", **parts))
    if restarted:
        kept = setting.journal.record_attempt

        def record(job: str, number: int, *given: Any) -> None:
            if number == 3:
                raise Killed
            kept(job, number, *given)

        setting.journal.record_attempt = record
        with pytest.raises(Killed):
            setting.job(evaluator=Losses(1.0, 0.9, 5.0)).run()
        revive(setting)
        setting.job(evaluator=Losses(0.8)).run()
    else:
        setting.job(evaluator=Losses(1.0, 0.9, 5.0, 0.8)).run()
    job = verified(setting)
    assert job.held_back == (2,)
    assert job.not_recomputed == ()
    assert job.releases[1].adapter == job.releases[2].adapter != job.releases[3].adapter
    plan = setting.plan
    vector, state = initial_vector(plan), sums.ServerState()
    for number in (1, 3):
        total = setting.registry.load_sum(plan, job.releases[number].sum)  # type: ignore[attr-defined]
        sums.release_of(plan, number, total, vector, state)
    assert adapter_digest(plan.digest(), vector) == job.releases[3].adapter


@pytest.mark.parametrize(("name", "method"), pairs_of(*SERVERS))
def test_an_operator_who_releases_another_adapter_is_found(
    make_setting: MakeSetting, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted into round 2, near enough to pass every site's bound of an adapter's way."""
    setting = make_setting(3, aggregation=THREE, server=SERVERS[name], method=method)
    honest = update.apply_sum

    def planted(aggregate: Any, plan: Any, roster: Any, number: int, *given: Any) -> Any:
        found = honest(aggregate, plan, roster, number, *given)
        if number == 2:
            values = unflatten(given[1], plan.lora.tensors)
            values["head.weight"][0, 0] += np.float32(1e-3)
        return found

    monkeypatch.setattr(update, "apply_sum", planted)
    setting.job().run()
    # What every check did before the sums were kept.
    verify_transcript(setting.journal.transcript("job"), setting.roster)
    with pytest.raises(VerificationError, match=r"entry 2 .*does not follow from its"):
        verified(setting)
    # The attack is found by this check alone.
    monkeypatch.setattr(recomputation.Recomputation, "verify", lambda *given, **named: None)
    assert verified(setting).last.round == 3


def test_an_operator_who_lets_a_product_drift_is_found(
    make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round alone is within the tolerance of fedsvd, and two of them in one direction are not
    what both sums give."""
    setting = make_setting(3, aggregation=THREE, server=SERVERS["average"], method="fedsvd")
    honest = fedsvd.refactorise

    def drifting(plan: Any, adapter: Vector, state: Any) -> None:
        honest(plan, adapter, state)
        for _, tensor in fedsvd.pairs(plan.lora):
            unflatten(adapter, plan.lora.tensors)[tensor.name][...] *= 1 + 0.98 * fedsvd.TOLERANCE

    with monkeypatch.context() as patch:
        patch.setattr(fedsvd, "refactorise", drifting)
        setting.job().run()
    with pytest.raises(VerificationError, match=r"entry [23] .*drifts from what the sums"):
        verified(setting)
    monkeypatch.setattr(fedsvd.SummedProducts, "require_near", lambda *_: None)
    assert verified(setting).not_recomputed == ()


def test_a_sum_that_was_exchanged_is_found(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE, server=SERVERS["adam"])
    setting.job().run()

    def other(digest: bytes) -> RingVector:
        total = setting.registry.load_sum(setting.plan, digest).copy()
        total[-1] += 1
        return total  # type: ignore[no-any-return]

    with pytest.raises(VerificationError, match="not the one it names"):
        verified(setting, sums=other)


def test_the_counts_of_an_evaluation_follow_from_the_sum(
    make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = FederatedEvaluation(noise_multiplier=1.0, max_records=1000)
    parts = {"aggregation": THREE, "server": SERVERS["sgd"], "evaluation": evaluation}
    setting = make_setting(3, **parts)
    honest = update.apply_sum

    def better(*given: Any) -> Any:
        weight, counts = honest(*given)
        assert counts is not None
        return weight, msgspec.structs.replace(counts, score=counts.score + 1)

    setting.job().run()
    verified(setting)
    other = make_setting(3, folder=setting.folder / "other", **parts)
    monkeypatch.setattr(update, "apply_sum", better)
    other.job().run()
    with pytest.raises(VerificationError, match="counts are not those in its sum"):
        verified(other)


def test_a_sum_is_kept_whole_and_checked(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE, server=Average())
    setting.job().run()
    (first, *_) = verified(setting).releases[1:]
    digest = first.sum  # type: ignore[attr-defined]
    total = setting.registry.load_sum(setting.plan, digest)
    assert sum_digest(total) == digest
    path = setting.registry.sum_file(digest)
    assert path.stat().st_size == 4 * (1 + setting.plan.lora.size)
    before = path.read_bytes()
    assert setting.registry.keep_sum(total) == digest
    assert [p.name for p in path.parent.iterdir() if "partial" in p.name] == []
    path.write_bytes(before[:-4] + os.urandom(4))
    with pytest.raises(StorageError, match="does not match its digest"):
        setting.registry.load_sum(setting.plan, digest)
    path.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        setting.registry.load_sum(setting.plan, digest)


def test_a_job_without_one_of_its_sums_says_which_is_missing(make_setting: MakeSetting) -> None:
    setting = make_setting(3, aggregation=THREE, server=SERVERS["adam"])
    setting.link.lost = lambda step, site: step.round == 3
    with pytest.raises(Exception, match="round 3 failed"):
        setting.job(attempts=1).run()
    job = verified(setting)
    path = setting.registry.sum_file(job.releases[2].sum)  # type: ignore[attr-defined]
    kept = path.read_bytes()
    path.unlink()
    setting.link.lost = lambda step, site: False
    with pytest.raises(StorageError, match=path.name):
        setting.job().run()
    path.write_bytes(kept)
    setting.job().run()
    assert verified(setting).not_recomputed == ()
