import msgspec
import pytest

from umbel_common.canonical import Value, decode, decode_canonical, digest, encode
from umbel_common.errors import RemoteProtocolError


class Pair(Value, frozen=True):
    name: str
    count: int = 1


def test_a_value_has_one_encoding_and_survives_it() -> None:
    pair = Pair(name="x", count=2)
    assert decode_canonical(encode(pair), Pair) == pair


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"name": "x", "count": 1, "more": 0}),
        msgspec.msgpack.encode({"count": 1}),
        msgspec.msgpack.encode({"name": "x", "count": "1"}),
        msgspec.msgpack.encode({"name": 1, "count": 1}),
        encode(Pair(name="x")) + b"\x00",
        b"\x91" * 100_000,
    ],
    ids=["empty", "invalid", "unknown", "missing", "mistyped", "mistyped-2", "trailing", "deep"],
)
def test_anything_else_is_refused_as_malformed(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        decode(data, Pair)
    assert refusal.value.check == "malformed-message"


@pytest.mark.parametrize(
    "data",
    [
        msgspec.msgpack.encode({"count": 1, "name": "x"}),
        msgspec.msgpack.encode({"name": "x"}),
        b"\x82\xa4name\xd9\x01x\xa5count\x01",
    ],
    ids=["reordered", "default-left-out", "long-string-header"],
)
def test_a_signed_value_has_no_second_encoding(data: bytes) -> None:
    assert decode(data, Pair) == Pair(name="x", count=1)
    with pytest.raises(RemoteProtocolError):
        decode_canonical(data, Pair)


def test_digests_of_two_purposes_never_meet() -> None:
    assert digest("ab", b"c") != digest("a", b"bc")
    assert digest("a", b"x") != digest("b", b"x")
