"""Targets: the coordinator and the server's attempt at each stage, under any answer of a site."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fuzz.choices import Choices
from fuzz.mutate import encoded, mutated, tree_of, trees_of
from fuzz.target import Place, Property, Target
from vectors.attempts import at_stage
from vectors.operations import ANSWERS
from vectors.run import STAGES
from vectors.values import HEADER, PLAN, REPLIES, REQUESTS, ROSTER

from umbel_common.canonical import decode
from umbel_common.errors import RemoteProtocolError, RoundAborted
from umbel_common.protocol.wire import (
    ConfirmReply,
    MaskReply,
    Reply,
    ShareReply,
    TrainReply,
    TrainRequest,
    UnmaskReply,
)
from umbel_common.secagg import coordinator
from umbel_server.aggregation.attempt import open_attempt

SENDERS = ("site-a", "site-b", "site-c", "site-d")
REPLY_OF: dict[str, Callable[[Any], Reply]] = {
    "advertise": lambda advert: TrainReply(advert=advert),
    "share": lambda shares: ShareReply(context=HEADER.context(), shares=shares),
    "mask": lambda vector: MaskReply(context=HEADER.context(), vector=memoryview(vector)),
    "confirm": lambda signed: ConfirmReply(context=HEADER.context(), signature=signed),
    "reveal": lambda shares: UnmaskReply(context=HEADER.context(), shares=shares),
}


def _coordinator_at(stage: str) -> Callable[[Place], Property]:
    """A refused answer changes nothing; after an accepted one, no sum is wrong."""

    def make(_: Place) -> Property:
        frozen = _frozen(at_stage(stage).machine)
        whole = at_stage("end")
        answers = whole.output[stage]
        honest = [tree_of(answer) for answer in answers.values()]
        total = whole.machine.total.tobytes()

        def prove(data: bytes) -> None:
            choices = Choices(data)
            sender = SENDERS[choices.below(len(SENDERS))]
            tree = mutated(honest[choices.below(len(honest))], choices, honest)
            answer = decode(encoded(tree), ANSWERS[stage])
            machine = pickle.loads(frozen)
            try:
                after = machine.receive(sender, answer)
            except RemoteProtocolError:
                assert pickle.dumps(machine) == frozen
                raise
            assert set(after.answered) == {sender}
            if stage == "reveal":
                _finish(after, sender, answers, total)

        return prove

    return make


def _finish(machine: Any, liar: str, answers: Any, total: bytes) -> None:
    """With one liar among those that reveal, the sum has all survivors, or the attempt aborts."""
    for site, answer in answers.items():
        if site != liar:
            machine = machine.receive(site, answer)
    assert isinstance(machine, coordinator.Unmasking)
    assert machine.close().total.tobytes() == total


def _round_at(stage: str) -> Callable[[Place], Property]:
    """No reply of one site, of any type, raises an error or costs another site its place."""

    def make(_: Place) -> Property:
        run = at_stage(stage)
        first = next(request for request in REQUESTS if isinstance(request, TrainRequest))
        length = len(run.vector("site-a"))
        started = open_attempt(HEADER, ROSTER, PLAN, first, length, {})
        frozen = _frozen(run.machine)
        output = at_stage("end").output
        replies = [REPLY_OF[name](answer) for name in STAGES for answer in output[name].values()]
        honest = trees_of([*replies, *REPLIES])

        def prove(data: bytes) -> None:
            choices = Choices(data)
            sender = SENDERS[choices.below(len(SENDERS))]
            tree = mutated(honest[choices.below(len(honest))], choices, honest)
            reply: Reply = decode(encoded(tree), Reply)  # type: ignore[arg-type]  # a union is a decodable type
            attempt = replace(started, machine=pickle.loads(frozen))
            after = attempt.receive(sender, reply)
            # A stray reply costs nobody anything, so its sender may still be awaited.
            assert attempt.waiting - {sender} <= after.waiting <= attempt.waiting
            assert set(after.refusals) <= {sender}
            assert after.stage == attempt.stage

        return prove

    return make


def _frozen(value: Any) -> bytes:
    """A copy from which each input can start; pickling it again gives the same bytes."""
    data = pickle.dumps(pickle.loads(pickle.dumps(value)))
    assert pickle.dumps(pickle.loads(data)) == data
    return data


COORDINATORS = (
    *(
        Target(
            f"coordinator: at {stage}",
            _coordinator_at(stage),
            (RemoteProtocolError, RoundAborted) if stage == "reveal" else (RemoteProtocolError,),
            share=150,
            inputs=15_000,
            guided=10_000,
        )
        for stage in STAGES
    ),
    *(
        Target(
            f"round: at {stage}",
            _round_at(stage),
            (RemoteProtocolError,),
            share=150,
            inputs=15_000,
            guided=10_000,
        )
        for stage in STAGES
    ),
)
