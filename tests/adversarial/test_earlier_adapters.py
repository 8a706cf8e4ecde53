"""A job that starts from an adapter that an earlier job released: real sites, a real server."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import msgspec
import numpy as np
import pytest
from adversarial.federation import Federation, moved
from server.conftest import Silent

from umbel_client.ledger.ledger import Ledger
from umbel_client.privacy.accounting import total_epsilon
from umbel_common.adapters.start import norm_of
from umbel_common.adapters.vector import Vector, to_bytes
from umbel_common.errors import StorageError, VerificationError
from umbel_common.plans.plan import LocalPrivacy, TrainingPlan, second_version
from umbel_common.plans.start import ReleasedStart
from umbel_common.plans.statements import Release
from umbel_common.protocol.verification import VerifiedJob, verify_transcript
from umbel_common.protocol.wire import FinishReply, FinishRequest, OfferReply, OfferRequest
from umbel_common.trust.identity import open_signed, sign
from umbel_server.jobs.job import Job
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

SITE = "site-00"
DELTA = 1e-4


class Sites:
    """`link.Link` to the sites of a federation."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        for site, sealed in requests:
            yield site, self.federation.trainers[site].handle(sealed)


class Operator:
    """The server of a federation: its disk, and the jobs that it runs."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.registry = Registry(federation.folder / "server" / "registry")

    def run(self, plan: TrainingPlan) -> tuple[Release, Vector]:
        """Runs a job to its end; returns its last release, and the adapter."""
        federation = self.federation
        federation.plan = plan
        with closing(Journal(federation.folder / "server" / "journal.sqlite")) as journal:
            job = Job(
                plan,
                federation.roster,
                federation.operator,
                journal=journal,
                registry=self.registry,
                link=Sites(federation),
                observer=Silent(),
                limits=Limits(attempts=1),
            )
            release = job.run()
        return release, self.registry.load(plan, release.adapter)

    def verified(self, job: str, start: Vector | None) -> VerifiedJob:
        """The job's transcript, verified with the tensor that it started from."""
        with closing(Journal(self.federation.folder / "server" / "journal.sqlite")) as journal:
            return verify_transcript(journal.transcript(job), self.federation.roster, start=start)


@pytest.fixture
def operator(open_federation: Callable[..., Federation]) -> Operator:
    """A server whose sites allow a start from an adapter that they have."""
    federation = open_federation(policies={"*": 'starts = ["seed", "released"]'})
    return Operator(federation)


def one_round(federation: Federation, job: str, epsilon: float) -> TrainingPlan:
    training = msgspec.structs.replace(federation.plan.training, rounds=1)
    privacy = LocalPrivacy(epsilon=epsilon, delta=DELTA, clip_norm=1.0)
    return federation.make_plan(job=job, training=training, privacy=privacy)


def following(
    operator: Operator, earlier: TrainingPlan, release: Release, vector: Vector
) -> TrainingPlan:
    """A plan that starts from an earlier job's adapter."""
    start = ReleasedStart(
        adapter=release.adapter,
        plan=earlier.digest(),
        round=release.round,
        largest_norm=norm_of(vector),
    )
    return second_version(one_round(operator.federation, "second", 2.0), start=start)


def test_two_jobs_of_which_the_second_goes_on_cost_what_both_cost(operator: Operator) -> None:
    first = one_round(operator.federation, "first", 3.0)
    release, adapter = operator.run(first)
    second = following(operator, first, release, adapter)
    last, after = operator.run(second)
    assert last.round == 1
    assert 0 < np.abs(after - adapter).max() <= second.aggregation.largest_change * (1 + 1e-5)
    federation = operator.federation
    for site, trainer in federation.trainers.items():
        trainer.close()
        state = federation.folder / site / "state"
        with Ledger.open(state / "ledger.sqlite", federation.data_digest(site)) as ledger:
            history = ledger.history()
            assert [(row.job, row.round) for row in history] == [("first", 1), ("second", 1)]
            apart = [total_epsilon([row.event], DELTA) for row in history]
            together = total_epsilon([row.event for row in history], DELTA)
            assert ledger.spent(DELTA) == together
            assert max(apart) < together < sum(apart)
    found = operator.verified("second", adapter)
    assert found.last == last
    assert found.believed == (f"whether round 1 of plan {first.digest().hex()} released the start",)
    assert len(operator.verified("second", None).believed) == 2
    with pytest.raises(VerificationError, match="not the adapter that the plan names"):
        operator.verified("second", after)


def test_a_site_goes_on_only_from_an_adapter_that_it_has(operator: Operator) -> None:
    federation = operator.federation
    first = one_round(federation, "first", 3.0)
    release, adapter = operator.run(first)
    second = following(operator, first, release, adapter)
    assert isinstance(second.start, ReleasedStart)

    def answer(plan: TrainingPlan) -> str:
        federation.plan = plan
        request = OfferRequest(plan=sign(federation.operator, plan))
        reply = federation.send(SITE, request)
        return "accepted" if isinstance(reply, OfferReply) else reply.check

    changes = {
        "round": 2,
        "adapter": bytes(32),
        "plan": bytes(32),
    }
    for name, value in changes.items():
        start = msgspec.structs.replace(second.start, **{name: value})
        assert answer(second_version(second, start=start)) == "start-unknown", name
    tensors = second.lora.tensors
    renamed = msgspec.structs.replace(tensors[0], name=f"{tensors[0].name}.other")
    for change in ({"tensors": (renamed, *tensors[1:])}, {"alpha": 400.0}):
        lora = msgspec.structs.replace(second.lora, **change)
        changed = msgspec.structs.replace(second, lora=lora)
        assert answer(changed) == "start-unknown", change
    folder = federation.folder / SITE / "state" / "adapters" / "first"
    shutil.move(folder, folder.with_name("elsewhere"))
    assert answer(second) == "start-unknown"
    shutil.move(folder.with_name("elsewhere"), folder)
    (folder / "release.msgpack").rename(folder / "kept")
    assert answer(second) == "start-unknown"
    (folder / "kept").rename(folder / "release.msgpack")
    assert answer(second) == "accepted"


def test_a_job_that_never_ran_gives_no_start(operator: Operator) -> None:
    """Its operator chose the adapter. After a row of such jobs, each as far from the one before
    as its rounds allow, a start would lie anywhere, and no site would have been charged."""
    federation = operator.federation
    federation.plan = plan = one_round(federation, "first", 3.0)
    planted = moved(plan, 0.9)
    signed, _ = federation.release(planted, round=1)
    federation.offer(None, SITE)
    reply = federation.send(SITE, FinishRequest(release=signed, adapter=to_bytes(planted)))
    assert isinstance(reply, FinishReply)
    release = open_signed(signed, Release, federation.operator.public_key)
    federation.plan = following(operator, plan, release, planted)
    request = OfferRequest(plan=sign(federation.operator, federation.plan))
    assert federation.refusal(SITE, request) == "start-unknown"
    assert federation.spent_rounds(SITE) == 0


def test_a_server_without_the_adapter_starts_no_job(operator: Operator) -> None:
    federation = operator.federation
    first = one_round(federation, "first", 3.0)
    start = ReleasedStart(adapter=bytes(32), plan=first.digest(), round=1, largest_norm=1.0)
    with pytest.raises(StorageError, match="not in the registry"):
        operator.run(second_version(first, start=start))
