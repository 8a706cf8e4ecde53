"""Targets: all decoders of bytes that a stranger sent."""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal

import numpy as np
from fuzz.choices import Choices
from fuzz.mutate import damaged, encoded, mutated, trees_of
from fuzz.target import Place, Property, Target
from vectors.values import IDENTITIES, OPERATOR, REPLIES, REQUESTS, ROSTER, ROSTER2, STATEMENTS

from umbel_common.adapters.reach import largest_steps
from umbel_common.adapters.vector import from_bytes, initial_vector, size_of, to_bytes
from umbel_common.canonical import Value, decode_canonical, encode
from umbel_common.errors import PlanError, RemoteProtocolError
from umbel_common.plans.check import check_plan
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.protocol.wire import (
    HEADER_BYTES,
    MAGIC,
    open_reply,
    open_request,
    request_digest,
    seal_reply,
    seal_request,
    size_limit,
)
from umbel_common.secagg.encoding import Encoding, decode_sum, encoding_of
from umbel_common.trust.identity import Roster, Roster2, label_of, open_signed, sign

LIMIT = 100_000
ASKED = request_digest(b"a sealed request")
SITE = "site-a"
KEY = IDENTITIES[SITE].public_key


def _body(data: bytes, honest: tuple[Any, ...]) -> bytes:
    """Plain garbage, or one of the honest trees with a few changes."""
    choices = Choices(data)
    kind = choices.below(len(honest) + 1)
    if kind == len(honest):
        return choices.rest()
    body = encoded(mutated(honest[kind], choices, honest))
    return damaged(body, choices) if choices.below(8) == 7 else body


def _requests(_: Place) -> Property:
    honest = trees_of(REQUESTS)

    def prove(data: bytes) -> None:
        body = _body(data, honest)
        sealed = MAGIC + OPERATOR.sign(f"request to {SITE}", body) + body
        request = open_request(OPERATOR.public_key, SITE, sealed, limit=LIMIT)
        again = seal_request(OPERATOR, SITE, request)
        assert open_request(OPERATOR.public_key, SITE, again, limit=LIMIT) == request

    return prove


def _replies(_: Place) -> Property:
    honest = trees_of(REPLIES)

    def prove(data: bytes) -> None:
        body = _body(data, honest)
        sealed = MAGIC + IDENTITIES[SITE].sign(f"reply from {SITE} to {ASKED.hex()}", body) + body
        reply = open_reply(KEY, SITE, sealed, ASKED, limit=LIMIT)
        again = seal_reply(IDENTITIES[SITE], SITE, reply, ASKED)
        assert open_reply(KEY, SITE, again, ASKED, limit=LIMIT) == reply

    return prove


def _envelopes(_: Place) -> Property:
    """A message other than the sealed one is refused before its body is parsed."""
    honest = [seal_reply(IDENTITIES[SITE], SITE, reply, ASKED) for reply in REPLIES]

    def prove(data: bytes) -> None:
        choices = Choices(data)
        kind = choices.below(len(honest) + 1)
        if kind == len(honest):
            open_reply(KEY, SITE, choices.rest(), ASKED, limit=300)
            raise AssertionError("bytes that nobody signed were opened")
        sealed = damaged(honest[kind], choices)
        reply = open_reply(KEY, SITE, sealed, ASKED, limit=LIMIT)
        assert sealed == honest[kind]
        assert reply == REPLIES[kind]

    return prove


def _statements(kind: type[Value]) -> Callable[[Place], Property]:
    """No two byte strings decode to one statement, and a statement survives its encoding."""
    values = [*(value for _, value in STATEMENTS.values()), ROSTER, ROSTER2]
    honest = trees_of([value for value in values if type(value) is kind])

    def prove(data: bytes) -> None:
        body = _body(data, honest)
        statement = decode_canonical(body, kind)
        assert encode(statement) == body
        signed = sign(OPERATOR, statement)
        assert open_signed(signed, kind, OPERATOR.public_key) == statement

    return lambda _: prove


def _plans(_: Place) -> Property:
    """A plan that is accepted can be carried out: sizes, encoding, the initial adapter."""
    honest = trees_of(
        [value for _, value in STATEMENTS.values() if isinstance(value, TrainingPlan)]
    )

    def prove(data: bytes) -> None:
        plan = decode_canonical(_body(data, honest), PLAN_VERSIONS)
        check_plan(plan)
        assert size_limit(plan) > HEADER_BYTES + 4 * plan.lora.size
        for number in (1, 2):
            assert size_of(plan.trained_tensors(number)) <= plan.lora.size
        encoding_of(plan, 3).prove_headroom()
        for role in ("lora_A", "lora_B", "head"):
            # Rounds can be many, and the bound of each is a number.
            for step in islice(largest_steps(plan, role, 3), 5):
                assert 0 <= step < math.inf
        if plan.lora.size <= 2000:
            vector = initial_vector(plan)
            assert vector.size == plan.lora.size
            assert np.isfinite(vector).all()

    return prove


def _adapters(_: Place) -> Property:
    def prove(data: bytes) -> None:
        choices = Choices(data)
        fits, values = choices.below(4), choices.rest()
        length = len(values) // 4 if fits else 7
        vector = from_bytes(values, length)
        assert vector.shape == (length,)
        assert np.isfinite(vector).all()
        assert to_bytes(vector) == values

    return prove


def _sums(_: Place) -> Property:
    """A decoded sum is within the range that its weight allows."""

    def prove(data: bytes) -> None:
        choices = Choices(data)
        bits: Literal[16, 32] = 16 if choices.below(2) else 32
        encoding = Encoding(
            clip_range=1.0, step=0.01, ring_bits=bits, max_weight=3, sites=choices.below(9) + 1
        )
        total = np.zeros(4, dtype=f"<u{bits // 8}")
        total[0] = choices.below(40)
        # Values near zero on both sides, so that some are within the bound and some beyond it.
        small = np.frombuffer(choices.take(3).ljust(3, b"\0"), dtype=np.int8).astype(np.int64)
        total[1:] += (20 * small).astype(total.dtype)
        weight, mean = decode_sum(total, encoding)
        assert 1 <= weight <= 3 * encoding.sites
        assert np.abs(mean).max() <= 1.0 + 1e-6

    return prove


REMOTE = (RemoteProtocolError,)
STATEMENT_KINDS = sorted(
    {type(value) for _, value in STATEMENTS.values()} | {Roster, Roster2},
    key=lambda kind: kind.__name__,
)

DECODERS = (
    Target("wire: sealed request", _requests, REMOTE, share=400, inputs=40_000, guided=60_000),
    Target("wire: sealed reply", _replies, REMOTE, share=400, inputs=40_000, guided=60_000),
    Target("wire: envelope", _envelopes, REMOTE, share=200, inputs=25_000, guided=40_000),
    *(
        Target(
            f"statement: {label_of(kind)}",
            _statements(kind),
            REMOTE,
            share=200,
            inputs=25_000,
            guided=40_000,
        )
        for kind in STATEMENT_KINDS
    ),
    Target("plan: checks", _plans, (*REMOTE, PlanError), share=300, inputs=40_000, guided=40_000),
    Target("adapter: values", _adapters, REMOTE, share=200, inputs=25_000, guided=40_000),
    Target("aggregate: sum", _sums, REMOTE, share=200, inputs=25_000, guided=40_000),
)
