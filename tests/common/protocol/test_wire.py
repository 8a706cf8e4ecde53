import contextlib
import os
from collections.abc import Callable
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel_common.errors import RemoteProtocolError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import EarlyEnd
from umbel_common.protocol.wire import (
    HEADER_BYTES,
    MAGIC,
    MOST_TENSORS,
    WIRE_VERSION,
    Blob,
    Blobs,
    ConfirmRequest,
    FinishRequest,
    MaskReply,
    OfferReply,
    Reply,
    Request,
    TrainFromLastRequest,
    TrainRequest,
    _encoded,
    open_reply,
    open_request,
    request_digest,
    seal_reply,
    seal_request,
    size_limit,
)
from umbel_common.trust.identity import Identity, sign

IDENTITY = Identity(bytes(32))
REPLY = MaskReply(context=bytes(32), vector=b"\x01" * 64)
ASKED = request_digest(b"a sealed request")
REQUEST = ConfirmRequest(context=bytes(32), survivors=("a", "b"))


def refused_reply(data: bytes, site: str = "a", limit: int = 10_000) -> str:
    with pytest.raises(RemoteProtocolError) as refusal:
        open_reply(IDENTITY.public_key, site, data, ASKED, limit=limit)
    return refusal.value.check


def test_messages_come_back() -> None:
    sealed = seal_reply(IDENTITY, "a", REPLY, ASKED)
    assert open_reply(IDENTITY.public_key, "a", sealed, ASKED, limit=10_000) == REPLY
    sealed = seal_request(IDENTITY, "a", REQUEST)
    assert open_request(IDENTITY.public_key, "a", sealed, limit=10_000) == REQUEST


def test_a_reply_of_one_site_is_not_anothers() -> None:
    assert refused_reply(seal_reply(IDENTITY, "a", REPLY, ASKED), site="b") == "pinned-signature"


def test_a_reply_to_one_request_is_none_to_another() -> None:
    recorded = seal_reply(IDENTITY, "a", REPLY, request_digest(b"another request"))
    assert refused_reply(recorded) == "pinned-signature"


def test_a_request_for_one_site_is_not_anothers() -> None:
    sealed = seal_request(IDENTITY, "a", REQUEST)
    with pytest.raises(RemoteProtocolError) as refusal:
        open_request(IDENTITY.public_key, "b", sealed, limit=10_000)
    assert refusal.value.check == "pinned-signature"


def test_a_request_is_no_reply_and_a_reply_no_request() -> None:
    assert refused_reply(seal_request(IDENTITY, "a", REQUEST)) == "pinned-signature"


def test_a_reply_by_another_identity_is_refused() -> None:
    stranger = Identity.generate(os.urandom)
    assert refused_reply(seal_reply(stranger, "a", REPLY, ASKED)) == "pinned-signature"


@pytest.mark.parametrize("position", [HEADER_BYTES, HEADER_BYTES + 20, -1, len(MAGIC)])
def test_a_flipped_bit_is_noticed(position: int) -> None:
    sealed = bytearray(seal_reply(IDENTITY, "a", REPLY, ASKED))
    sealed[position] ^= 1
    assert refused_reply(bytes(sealed)) == "pinned-signature"


def test_a_message_past_the_limit_is_not_looked_at() -> None:
    assert refused_reply(bytes(10_001)) == "oversized-message"


@pytest.mark.parametrize("data", [b"", MAGIC, b"UMBx" + bytes(200), bytes(HEADER_BYTES)])
def test_what_is_no_sealed_message_is_malformed(data: bytes) -> None:
    assert refused_reply(data) == "malformed-message"


@pytest.mark.parametrize(
    ("version", "behind"), [(WIRE_VERSION - 1, "at a"), (WIRE_VERSION + 1, "on this side")]
)
def test_who_speaks_another_version_is_refused_and_who_is_behind_is_named(
    version: int, behind: str
) -> None:
    sealed = seal_reply(IDENTITY, "a", REPLY, ASKED)
    other = sealed.replace(MAGIC, f"UMB{version}".encode(), 1)
    with pytest.raises(RemoteProtocolError) as refusal:
        open_reply(IDENTITY.public_key, "a", other, ASKED, limit=10_000)
    error = refusal.value
    assert error.check == "wire-version"
    assert f"a speaks wire version {version}, this side speaks {WIRE_VERSION}" in error.message
    assert error.remedy == f"upgrade Umbel {behind}"


@pytest.mark.parametrize(
    "body",
    [
        {"type": "masked", "context": bytes(32), "vector": b"", "more": 1},
        {"type": "masked", "context": bytes(31), "vector": b""},
        {"type": "mask", "context": bytes(32), "shares": []},
        {"type": "unknown"},
        {"context": bytes(32)},
        [],
    ],
    ids=["unknown-field", "short-context", "a-request", "unknown-type", "untyped", "no-map"],
)
def test_a_signed_body_outside_the_closed_set_is_malformed(body: object) -> None:
    encoded = msgspec.msgpack.encode(body)
    sealed = MAGIC + IDENTITY.sign(f"reply from a to {ASKED.hex()}", encoded) + encoded
    assert refused_reply(sealed) == "malformed-message"


@given(st.binary(max_size=400))
def test_any_signed_bytes_give_a_message_or_the_protocols_error(body: bytes) -> None:
    sealed = MAGIC + IDENTITY.sign(f"reply from a to {ASKED.hex()}", body) + body
    with contextlib.suppress(RemoteProtocolError):
        open_reply(IDENTITY.public_key, "a", sealed, ASKED, limit=10_000)


def test_the_limit_fits_the_largest_honest_message(make_plan: Callable[..., TrainingPlan]) -> None:
    plan = make_plan()
    reply = MaskReply(context=bytes(32), vector=bytes(4 * (plan.lora.size + 1)))
    assert len(seal_reply(IDENTITY, "a", reply, ASKED)) <= size_limit(plan)
    assert len(seal_reply(IDENTITY, "a", OfferReply(plan=bytes(32)), ASKED)) <= size_limit(None)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65535, 65536, 70000])
def test_a_vector_is_encoded_without_a_copy_as_messagepack_would_encode_it(size: int) -> None:
    reply = MaskReply(context=bytes(32), vector=memoryview(os.urandom(size)))
    sealed = seal_reply(IDENTITY, "a", reply, ASKED)
    assert sealed[HEADER_BYTES:] == msgspec.msgpack.encode(reply)
    assert open_reply(IDENTITY.public_key, "a", sealed, ASKED, limit=len(sealed)) == reply


@pytest.mark.parametrize("kind", [*get_args(Request), *get_args(Reply)])
def test_whatever_is_as_large_as_an_adapter_is_the_last_field(kind: type[msgspec.Struct]) -> None:
    """Otherwise it would be copied once more than a server has room for."""
    fields = msgspec.structs.fields(kind)
    assert not any(field.type in (Blob, Blobs) for field in fields[:-1])


def test_a_request_with_an_adapter_and_more_is_not_copied_either() -> None:
    signed = sign(IDENTITY, EarlyEnd(federation="f", job="j", plan=bytes(32), round=1))
    adapter = memoryview(bytes(1000))
    for message in (
        TrainRequest(header=signed, release=signed, adapter=adapter),
        FinishRequest(release=signed, early_end=signed, adapter=adapter),
    ):
        assert _encoded(message)[-1].obj is adapter.obj


def from_last(*pieces: memoryview) -> TrainFromLastRequest:
    signed = sign(IDENTITY, EarlyEnd(federation="f", job="j", plan=bytes(32), round=1))
    return TrainFromLastRequest(header=signed, release=signed, onto=bytes(32), changed=pieces)


@pytest.mark.parametrize("sizes", [(), (0,), (300, 70_000), (4,) * 15, (4,) * 16, (0, 8) * 200])
def test_a_difference_is_encoded_without_a_copy_as_messagepack_would_encode_it(
    sizes: tuple[int, ...],
) -> None:
    request = from_last(*(memoryview(os.urandom(size)) for size in sizes))
    sealed = seal_request(IDENTITY, "a", request)
    assert sealed[HEADER_BYTES:] == msgspec.msgpack.encode(request)
    assert open_request(IDENTITY.public_key, "a", sealed, limit=len(sealed)) == request
    views = [part for part in _encoded(request) if isinstance(part, memoryview)]
    assert [view.obj for view in views] == [piece.obj for piece in request.changed]


def test_a_difference_has_no_more_tensors_than_an_array_of_16_bits_says() -> None:
    most = from_last(*[memoryview(b"")] * MOST_TENSORS)
    sealed = seal_request(IDENTITY, "a", most)
    assert open_request(IDENTITY.public_key, "a", sealed, limit=10**6) == most
    more = from_last(*[memoryview(b"")] * (MOST_TENSORS + 1))
    with pytest.raises(RemoteProtocolError) as refusal:
        open_request(IDENTITY.public_key, "a", seal_request(IDENTITY, "a", more), limit=10**6)
    assert refusal.value.check == "malformed-message"
