"""A site that is killed again and again, under a server that asks something else each time."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from adversarial.federation import Federation, moved
from adversarial.killable_site import PUBLIC_SIZE, SITE, KillableSite

from umbel_common.adapters.vector import adapter_digest
from umbel_common.canonical import encode
from umbel_common.plans.plan import Sgd, Training
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import (
    ConfirmRequest,
    MaskRequest,
    OfferRequest,
    Refusal,
    Reply,
    ShareRequest,
    TrainRequest,
    UnmaskRequest,
)
from umbel_common.trust.identity import sign
from umbel_server.aggregation.attempt import AttemptOutcome

ROUNDS = 100
STAGES = {"train", "share", "mask", "confirm", "unmask"}


@pytest.fixture
def federation(open_federation: Callable[..., Federation]) -> Federation:
    """Four sites, one of them real; the server plays the others with their own keys."""
    training = Training(
        rounds=ROUNDS,
        local_steps=1,
        expected_batch_size=PUBLIC_SIZE,
        optimizer=Sgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
    )
    federation = open_federation(4, training=training)
    for trainer in federation.trainers.values():
        trainer.close()
    federation.trainers.clear()
    federation.play("site-01", "site-02", "site-03", own_keys=True)
    return federation


@pytest.fixture
def site(federation: Federation) -> Iterator[KillableSite]:
    site = KillableSite(federation, random.Random(1), most_steps=40)
    yield site
    site.stop()


def another(federation: Federation, request: Any, header: RoundHeader) -> Any:
    """Another request of the same stage, from a server that wants two answers."""
    match request:
        case TrainRequest():
            other = msgspec.structs.replace(header, cohort=header.cohort[:3])
            return msgspec.structs.replace(request, header=sign(federation.operator, other))
        case ShareRequest():
            return msgspec.structs.replace(request, adverts=request.adverts[:3])
        case MaskRequest():
            return msgspec.structs.replace(request, shares=request.shares[:2])
        case ConfirmRequest():
            return msgspec.structs.replace(request, survivors=request.survivors[:3])
        case UnmaskRequest():
            # Other signatures would get the same shares, so the server names another set instead.
            return ConfirmRequest(context=request.context, survivors=header.cohort[:3])
    raise AssertionError(request)


class Answers:
    """All answers of the site, by round and stage."""

    def __init__(self, site: KillableSite, federation: Federation) -> None:
        self.site = site
        self.federation = federation
        self.given: dict[tuple[int, str], set[bytes]] = defaultdict(set)

    def get(self, number: int, stage: str, request: Any, other: Any) -> Reply | None:
        """The answer to `request`; None if the site has bound itself to `other`.

        After each kill, the server sends one of the two, as if it had sent nothing before.
        """
        asked, wanted, done = request, [request, other], []
        while wanted:
            reply = self.site.ask(stage, asked)
            if reply is None:
                asked = self.site.chance.choice([request, other])
                continue
            if not isinstance(reply, Refusal):
                self.given[number, type(asked).__name__].add(encode(reply))
                if asked is request:
                    done.append(reply)
            wanted = [ask for ask in wanted if ask is not asked]
            asked = wanted[0] if wanted else None
        return done[-1] if done else None


@pytest.mark.parametrize(
    "kills",
    [
        40,
        pytest.param(100, marks=pytest.mark.full),  # the long search
    ],
)
def test_a_site_that_is_killed_at_any_step_never_gives_two_answers(
    federation: Federation, site: KillableSite, kills: int
) -> None:
    answers = Answers(site, federation)
    offer = OfferRequest(plan=sign(federation.operator, federation.plan))
    while site.ask("offer", offer) is None:
        pass
    sums = 0
    for number in range(1, ROUNDS + 1):
        if site.killed_at.total() >= kills:
            break
        attempt: Any = attempt_of_round(federation, number)
        while not isinstance(attempt, AttemptOutcome):
            stage, requests = attempt.stage, attempt.requests()
            request = requests.pop(SITE)
            other = another(federation, request, attempt.header)
            reply = answers.get(number, stage, request, other)
            if reply is None:
                break
            replies = {peer: federation.ask(peer, ask) for peer, ask in requests.items()}
            attempt = federation.take(attempt, {SITE: reply, **replies})
        else:
            assert federation.is_sum_of(attempt.aggregate.total, SITE, round_number=number)
            sums += 1
    assert site.killed_at.total() >= kills
    assert {stage for stage, _ in site.killed_at} >= STAGES
    assert sums > 0
    assert all(len(given) == 1 for given in answers.given.values())
    assert federation.spent_rounds(SITE) <= number


def attempt_of_round(federation: Federation, number: int) -> Any:
    """An attempt at a round; all attempts at one round start from the same adapter."""
    vector = moved(federation.plan, number - 1)
    digest = adapter_digest(federation.plan.digest(), vector)
    federation.releases[digest] = federation.release(vector, round=number - 1)
    return federation.attempt(federation.header(round=number, adapter=digest))
