"""Releases that come as differences: real sites, an operator that lies about them, real jobs."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from adversarial.federation import Federation
from server.conftest import Silent

from umbel_client.storage.journal import Journal as SiteJournal
from umbel_client.storage.kept_adapter import KeptAdapter
from umbel_client.trainer.local_job import LocalJob
from umbel_common.adapters.difference import difference, moved_tensors
from umbel_common.adapters.vector import Vector, adapter_digest, initial_vector, merge, size_of
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.verification import verify_transcript
from umbel_common.protocol.wire import (
    FinishReply,
    FinishRequest,
    OfferRequest,
    Refusal,
    Request,
    TrainFromLastRequest,
    TrainReply,
    TrainRequest,
    open_request,
    seal_request,
    size_limit,
)
from umbel_common.trust.identity import sign
from umbel_host.files.tensor_file import TensorFile
from umbel_server.jobs.job import Job
from umbel_server.messaging.link import Step
from umbel_server.operator.config import Limits
from umbel_server.storage.journal import Journal
from umbel_server.storage.registry import Registry

SITE, OTHER = "site-00", "site-01"
ROUNDS = 4


@pytest.fixture
def federation(open_federation: Callable[..., Federation]) -> Federation:
    """Three sites, and a plan whose rounds alternate; the first site has accepted it."""
    federation = open_federation()
    lora = msgspec.structs.replace(federation.plan.lora, method="alternate")
    training = msgspec.structs.replace(federation.plan.training, rounds=ROUNDS)
    federation.plan = federation.make_plan(lora=lora, training=training)
    federation.offer(None, SITE)
    return federation


def released(federation: Federation, number: int, change: float = 1e-3) -> Vector:
    """The adapter of a round's release; each round has moved what it trained."""
    plan, adapter = federation.plan, initial_vector(federation.plan)
    for earlier in range(1, number + 1):
        size = size_of(plan.trained_tensors(earlier))
        adapter = merge(adapter, np.full(size, change, dtype=np.float32), plan, earlier)
    return adapter


def digest_of(federation: Federation, adapter: Vector) -> bytes:
    return adapter_digest(federation.plan.digest(), adapter)


def header_of(federation: Federation, number: int, attempt: int = 1) -> RoundHeader:
    adapter = digest_of(federation, released(federation, number - 1))
    return federation.header(round=number, attempt=attempt, adapter=adapter)


def whole(federation: Federation, number: int, attempt: int = 1) -> TrainRequest:
    """The request of a round with the whole adapter."""
    adapter = released(federation, number - 1)
    release = federation.release(adapter, round=number - 1)
    return federation.train_request(header_of(federation, number, attempt), release)


def from_last(
    federation: Federation, number: int, attempt: int = 1, **parts: Any
) -> TrainFromLastRequest:
    """The request of a round with the difference; keyword arguments replace its parts."""
    request = whole(federation, number, attempt)
    before = released(federation, max(number - 2, 0))
    fields: dict[str, Any] = {
        "header": request.header,
        "release": request.release,
        "onto": digest_of(federation, before),
        "changed": difference(federation.plan, number - 1, released(federation, number - 1)),
    }
    fields |= parts
    return TrainFromLastRequest(**{**fields, "changed": tuple(map(memoryview, fields["changed"]))})


def path_of(federation: Federation, site: str = SITE) -> Path:
    return federation.folder / site / "state" / "releases" / f"{federation.plan.job}.safetensors"


def kept(federation: Federation, adapter: Vector, site: str = SITE) -> bool:
    """Whether the site has exactly this adapter on its disk."""
    file = KeptAdapter(path_of(federation, site))
    return np.array_equal(file.load(federation.plan, {digest_of(federation, adapter)}), adapter)


def bytes_of(federation: Federation, number: int) -> tuple[bytes, ...]:
    adapter = released(federation, number)
    return tuple(bytes(piece) for piece in difference(federation.plan, number, adapter))


def test_a_site_trains_from_what_the_difference_makes(federation: Federation) -> None:
    """Also after a restart: what it builds on is on its disk."""
    for number, request in enumerate((whole, from_last, from_last), start=1):
        assert isinstance(federation.ask(SITE, request(federation, number)), TrainReply)
        assert kept(federation, released(federation, number - 1))
        federation.start(SITE)
    assert path_of(federation).stat().st_mode & 0o777 == 0o600
    assert federation.spent_rounds(SITE) == 3


def refusals(federation: Federation) -> Iterator[tuple[str, TrainFromLastRequest]]:
    """Lies about round 2, and the code of each; the site has the adapter of release 0."""

    def ask(**parts: Any) -> TrainFromLastRequest:
        return from_last(federation, 2, **parts)

    pieces, current = bytes_of(federation, 1), digest_of(federation, released(federation, 1))
    other = released(federation, 1, change=2e-3)
    yield "adapter-digest", ask(changed=difference(federation.plan, 1, other))
    # A and B of this plan have as many numbers: only the digest tells the rounds apart.
    assert [len(piece) for piece in bytes_of(federation, 2)] == [len(piece) for piece in pieces]
    yield "adapter-digest", ask(changed=bytes_of(federation, 2))
    yield "adapter-digest", ask(changed=())
    yield "adapter-length", ask(changed=pieces[:-1])
    yield "adapter-length", ask(changed=(*pieces[:-1], pieces[-1] + bytes(4)))
    yield "adapter-values", ask(changed=(*pieces[:-1], b"\xff" * len(pieces[-1])))
    # It has neither of the two.
    yield "release-missing", ask(onto=current, changed=())
    yield "release-missing", ask(onto=bytes(32))
    yield (
        "other-release",
        msgspec.structs.replace(
            ask(), release=federation.release(released(federation, 1), round=3)[0]
        ),
    )
    # The difference of round 2, on top of the release of round 0.
    yield "release-missing", from_last(federation, 3)
    oldest = digest_of(federation, released(federation, 0))
    yield "adapter-digest", from_last(federation, 3, onto=oldest)


def test_no_lie_about_a_difference_is_trained_from_or_charged(federation: Federation) -> None:
    federation.ask(SITE, whole(federation, 1))
    steps = federation.observers[SITE].steps
    for check, request in refusals(federation):
        assert federation.refusal(SITE, request) == check
        assert kept(federation, released(federation, 0))
    assert federation.observers[SITE].steps == steps
    assert federation.spent_rounds(SITE) == 1
    # All of that cost the round nothing.
    assert isinstance(federation.ask(SITE, from_last(federation, 2)), TrainReply)


def test_a_second_attempt_brings_the_difference_again_or_nothing(federation: Federation) -> None:
    """A start has no predecessor, and so no difference: round 1 can only bring nothing again."""
    start = released(federation, 0)
    federation.ask(SITE, whole(federation, 1))
    again = {"onto": digest_of(federation, start), "attempt": 2}
    pieces = bytes_of(federation, 1)
    assert federation.refusal(SITE, from_last(federation, 1, changed=pieces, **again)) == (
        "adapter-length"
    )
    assert isinstance(federation.ask(SITE, from_last(federation, 1, **again)), TrainReply)
    for attempt in (1, 2):
        federation.ask(SITE, from_last(federation, 2, attempt))
    nothing = {"onto": digest_of(federation, released(federation, 1)), "changed": ()}
    assert isinstance(federation.ask(SITE, from_last(federation, 2, 3, **nothing)), TrainReply)
    assert federation.spent_rounds(SITE) == 2


def test_a_site_that_has_nothing_says_so_before_anything_is_charged(
    federation: Federation,
) -> None:
    assert federation.refusal(SITE, from_last(federation, 1)) == "release-missing"
    assert federation.spent_rounds(SITE) == 0
    assert federation.observers[SITE].errors[-1].file == path_of(federation)
    # The same attempt, with the whole adapter.
    assert isinstance(federation.ask(SITE, whole(federation, 1)), TrainReply)


def test_what_it_has_of_one_job_is_no_use_in_another(federation: Federation) -> None:
    federation.ask(SITE, whole(federation, 1))
    first = federation.plan
    federation.plan = msgspec.structs.replace(first, job="second")
    federation.ask(SITE, OfferRequest(plan=sign(federation.operator, federation.plan)))
    assert federation.refusal(SITE, from_last(federation, 1)) == "release-missing"
    mixed = from_last(federation, 1, onto=adapter_digest(first.digest(), initial_vector(first)))
    assert federation.refusal(SITE, mixed) == "release-missing"


def test_of_two_sites_that_are_shown_two_differences_one_refuses(federation: Federation) -> None:
    federation.offer(None, OTHER)
    for site in (SITE, OTHER):
        federation.ask(site, whole(federation, 1))
    federation.ask(SITE, from_last(federation, 2))
    other = difference(federation.plan, 1, released(federation, 1, change=2e-3))
    lie = from_last(federation, 2, changed=other)
    assert federation.refusal(OTHER, lie) == "adapter-digest"


@pytest.mark.attack("adapter-digest")
def test_a_server_has_each_site_train_from_an_adapter_of_its_own(federation: Federation) -> None:
    """Under one header, so that their masks cancel: the sum then tells the sites apart."""
    federation.offer(None, OTHER)
    started = {}
    for site, change in ((SITE, 1e-3), (OTHER, 2e-3)):
        federation.ask(site, whole(federation, 1))
        pieces = difference(federation.plan, 1, released(federation, 1, change=change))
        federation.ask(site, from_last(federation, 2, changed=pieces))
        with TensorFile(path_of(federation, site)) as file:
            started[site] = file.read("adapter")
    assert not np.array_equal(started[SITE], started[OTHER])


@pytest.mark.attack("release-missing", "adapter-digest")
def test_a_server_has_a_site_build_on_the_release_of_another_round(
    federation: Federation,
) -> None:
    """The site missed round 2: what that round moved is not in the adapter that it has."""
    federation.ask(SITE, whole(federation, 1))
    federation.ask(SITE, from_last(federation, 4))
    with TensorFile(path_of(federation)) as file:
        assert not np.array_equal(file.read("adapter"), released(federation, 3))


def test_an_altered_copy_is_not_built_on(federation: Federation) -> None:
    """Somebody with access to the disk changes the adapter under the digest that is asked for."""
    federation.ask(SITE, whole(federation, 1))
    data = bytearray(path_of(federation).read_bytes())
    data[-1] ^= 0x40
    path_of(federation).write_bytes(data)
    assert federation.refusal(SITE, from_last(federation, 2)) == "release-missing"
    error = federation.observers[SITE].errors[-1]
    assert "not the one that it verified" in error.message
    assert error.file == path_of(federation)
    assert federation.spent_rounds(SITE) == 1
    assert isinstance(federation.ask(SITE, whole(federation, 2, attempt=2)), TrainReply)
    assert isinstance(federation.ask(SITE, from_last(federation, 3)), TrainReply)


class Killed(BaseException):
    """The process ended here: nothing that it would have done afterwards happens."""


@pytest.mark.parametrize(("owner", "name"), [(LocalJob, "compute"), (SiteJournal, "open_attempt")])
def test_a_site_that_ends_between_storing_and_answering_answers_the_same_request(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    federation.ask(SITE, whole(federation, 1))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            federation.ask(SITE, from_last(federation, 2))
    federation.start(SITE)
    assert kept(federation, released(federation, 1))
    # A lie about the difference is one also where the truth would change nothing any more.
    other = difference(federation.plan, 1, released(federation, 1, change=2e-3))
    lie = from_last(federation, 2, changed=other)
    assert federation.refusal(SITE, lie) == "adapter-digest"
    assert isinstance(federation.ask(SITE, from_last(federation, 2)), TrainReply)
    assert federation.spent_rounds(SITE) == 2


def test_a_request_that_was_answered_gets_the_same_answer_and_no_other_gets_one(
    federation: Federation,
) -> None:
    federation.ask(SITE, whole(federation, 1))
    sealed = seal_request(federation.operator, SITE, from_last(federation, 2))
    first = federation.trainers[SITE].handle(sealed)
    federation.start(SITE)
    assert federation.trainers[SITE].handle(sealed) == first
    assert federation.refusal(SITE, whole(federation, 2)) == "second-answer"
    federation.ask(SITE, from_last(federation, 3))
    # Replayed when its round is over.
    assert isinstance(federation._handled(SITE, sealed), Refusal)
    assert kept(federation, released(federation, 2))


def test_a_site_lets_the_message_go_before_it_trains(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference can be nearly as large as the adapter that the site then holds."""

    class Sealed(bytes):
        """Bytes that can be watched."""

        mark: Any

    class Mark:
        """What dies with its message."""

    held: list[bool] = []
    marks: list[weakref.ref[Mark]] = []
    compute = LocalJob.compute

    def watched(self: LocalJob, *arguments: Any) -> None:
        held.append(marks[-1]() is not None)
        compute(self, *arguments)

    monkeypatch.setattr(LocalJob, "compute", watched)
    for request in (whole(federation, 1), from_last(federation, 2)):
        sealed = [Sealed(seal_request(federation.operator, SITE, request))]
        sealed[0].mark = Mark()
        marks.append(weakref.ref(sealed[0].mark))
        federation.trainers[SITE].handle(sealed.pop())
    # The whole adapter is a view of its message.
    assert held == [True, False]


def test_the_adapter_is_deleted_at_the_end_of_the_job(federation: Federation) -> None:
    federation.ask(SITE, whole(federation, 1))
    assert path_of(federation).exists()
    last = released(federation, ROUNDS)
    release, vector = federation.release(last, round=ROUNDS)
    request = FinishRequest(release=release, adapter=memoryview(vector.tobytes()))
    assert isinstance(federation.ask(SITE, request), FinishReply)
    assert not path_of(federation).exists()


class Sites:
    """`link.Link` to the sites of a federation, which notes what they are asked."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.brought: dict[str, list[int | None]] = {name: [] for name in federation.trainers}
        self.before: Callable[[Step, str], None] = lambda step, site: None

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        for site, sealed in requests:
            if step.stage == "train":
                self.brought[site].append(self._brought(site, sealed))
                self.before(step, site)
            yield site, self.federation.trainers[site].handle(sealed)

    def _brought(self, site: str, sealed: bytes) -> int | None:
        key, limit = self.federation.operator.public_key, size_limit(self.federation.plan)
        request: Request = open_request(key, site, sealed, limit=limit)
        if isinstance(request, TrainFromLastRequest):
            return sum(len(piece) for piece in request.changed)
        return None


@pytest.mark.parametrize(
    "lost",
    [
        "its process",
        pytest.param("its copy", marks=pytest.mark.full),
        pytest.param("its copy's content", marks=pytest.mark.full),
    ],
)
def test_a_job_of_a_real_server_and_real_sites(federation: Federation, lost: str) -> None:
    """Before round 3 one site is started again, or its copy is gone or altered."""
    plan = federation.plan
    link, observer = Sites(federation), Silent()

    def lose(step: Step, site: str) -> None:
        if (step, site) != (Step("train", 3, 1), SITE):
            return
        if lost == "its process":
            federation.start(SITE)
        elif lost == "its copy":
            path_of(federation).unlink()
        elif lost == "its copy's content":
            path_of(federation).write_bytes(path_of(federation).read_bytes()[:-1] + b"?")

    link.before = lose
    registry = Registry(federation.folder / "registry")
    with closing(Journal(federation.folder / "journal.sqlite")) as journal:
        job = Job(
            plan,
            federation.roster,
            federation.operator,
            journal=journal,
            registry=registry,
            link=link,
            observer=observer,
            limits=Limits(attempts=2),
        )
        release = job.run()
        verified = verify_transcript(journal.transcript(plan.job), federation.roster)
    assert verified.last == release
    assert verified.delivered == tuple(sorted(federation.trainers))
    sizes = [4 * size_of(moved_tensors(plan, number)) for number in range(ROUNDS)]
    expected: list[int | None] = [None, *sizes[1:]]
    if lost.startswith("its copy"):
        assert observer.aborts == [(3, 1, "too-few-adverts")]
        assert link.brought[OTHER] == [*expected[:3], 0, expected[3]]
        assert link.brought[SITE] == [*expected[:3], None, expected[3]]
    else:
        assert observer.aborts == []
        assert link.brought == dict.fromkeys(federation.trainers, expected)
    assert len({*(one.adapter for one in verified.releases)}) == ROUNDS + 1
    for site in federation.trainers:
        assert federation.spent_rounds(site) == ROUNDS
        assert not path_of(federation, site).exists()
