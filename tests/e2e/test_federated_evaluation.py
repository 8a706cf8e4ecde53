"""Real sites count held-out records under the masks, and pay for it."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from adversarial.federation import Federation
from adversarial.weaken import Protection
from safetensors.numpy import load_file

from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.rows import EVALUATION
from umbel_client.privacy.accounting import DpEvent
from umbel_common.adapters.site_counts import SiteCounts
from umbel_common.errors import JobFailed
from umbel_common.plans.plan import COUNTS, FederatedEvaluation
from umbel_common.protocol.verification import verify_transcript
from umbel_server.jobs.job import Job
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

ALLOWED = {"*": "federated_evaluation = true"}
# Hardly any noise beside counts this small; the budget below makes room for its price.
LOUD = FederatedEvaluation(noise_multiplier=2.0, max_records=100)


class Loop:
    """`job.Link` to trainers in this process; the masked vectors of some attempts of round 1 are
    lost."""

    def __init__(self, federation: Federation, lost: frozenset[int] = frozenset()) -> None:
        self._federation = federation
        self._lost = lost
        self.counts: dict[int, dict[str, list[float]]] = {}
        """Attempt of round 1 -> site -> the coordinates that it had on its disk as it masked."""

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        for site, sealed in requests:
            reply = self._federation.trainers[site].handle(sealed)
            if (step.stage, step.round) == ("mask", 1):
                (path,) = (self._federation.folder / site / "state" / "deltas").rglob("*1*")
                delta = load_file(path)["delta"]
                self.counts.setdefault(step.attempt, {})[site] = delta[-COUNTS:].tolist()
                if step.attempt in self._lost:
                    continue
            yield site, reply


class Counted:
    """An observer that keeps the counts."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, SiteCounts, int]] = []

    def on_counted(self, round_number: int, counts: SiteCounts, sites: int) -> None:
        self.counts.append((round_number, counts, sites))

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


def federation(folder: Path, model: Path, policies: dict[str, str]) -> Federation:
    return Federation(folder, model, Protection(frozenset()), 3, policies, evaluation=LOUD)


def run(setting: Federation, folder: Path, link: Loop | None = None) -> Counted:
    observer, journal = Counted(), Journal(folder / "journal.sqlite")
    job = Job(
        setting.plan,
        setting.roster,
        setting.operator,
        journal=journal,
        registry=Registry(folder / "registry"),
        link=link or Loop(setting),
        observer=observer,  # type: ignore[arg-type]  # the rest of it is not looked at
        limits=Limits(attempts=3),
    )
    try:
        job.run()
        verified = verify_transcript(journal.transcript(setting.plan.job), setting.roster)
        assert len(verified.releases) == 3
    finally:
        journal.close()
    return observer


def test_counts_are_summed_and_charged(tmp_path: Path, tiny_model: Path) -> None:
    setting = federation(tmp_path, tiny_model, ALLOWED)
    found = run(setting, tmp_path).counts
    assert [(number, sites) for number, _, sites in found] == [(1, 3), (2, 3)]
    for _, counts, _ in found:
        # Three sites hold out about 4 of 40 records each; noise of deviation 4.9 on the sum.
        assert -15 < counts.records < 40
    for site, trainer in setting.trainers.items():
        trainer.close()
        rounds = read_ledger(tmp_path / site / "state" / "ledger.sqlite").rounds
        assert {job for job, _ in rounds} == {"job", "job" + EVALUATION}
        for number in (1, 2):
            assert rounds["job" + EVALUATION, number].event == DpEvent(2.0, 1.0, 1)


def test_another_attempt_sends_the_same_noise(tmp_path: Path, tiny_model: Path) -> None:
    """Fresh noise on the same counts would average out over attempts."""
    setting = federation(tmp_path, tiny_model, ALLOWED)
    link = Loop(setting, frozenset({1}))
    run(setting, tmp_path, link)
    first, second = (link.counts[attempt] for attempt in (1, 2))
    assert sorted(first) == sorted(setting.trainers)
    assert first == second


def test_a_site_counts_nothing_unless_its_policy_says_so(tmp_path: Path, tiny_model: Path) -> None:
    setting = federation(tmp_path, tiny_model, {})
    with pytest.raises(JobFailed):
        run(setting, tmp_path)
    for site, observer in setting.observers.items():
        assert [getattr(error, "check", "") for error in observer.errors] == [
            "evaluation-not-allowed"
        ]
        assert not os.path.exists(tmp_path / site / "state" / "ledger.sqlite")
