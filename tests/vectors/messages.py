"""Vectors of sealed messages: every type in both directions, and refusals."""

from typing import Any

import msgspec
from vectors.cases import Case, accepted, identity, refused
from vectors.messagepack import Pairs, Raw, pack
from vectors.values import CONTEXT, IDENTITIES, OPERATOR, REPLIES, REQUESTS, SITES

from umbel_common.protocol.wire import (
    HEADER_BYTES,
    MAGIC,
    Reply,
    Request,
    request_digest,
    seal_reply,
    seal_request,
)

MALFORMED = "malformed-message"
LIMIT = 10_000
ASKED = request_digest(b"a sealed request")
ANSWER = f"reply from site-a to {ASKED.hex()}"


def message_cases() -> list[Case]:
    """Every type sealed and opened, and refusals."""
    cases = []
    for request in REQUESTS:
        cases += _both_ways("request", request, seal_request(OPERATOR, "site-a", request))
    for reply in REPLIES:
        cases += _both_ways(
            "reply", reply, seal_reply(IDENTITIES["site-a"], "site-a", reply, ASKED)
        )
    return cases + _loose() + _malformed_bodies() + _malformed_envelopes() + _wrongly_sealed()


def _both_ways(direction: str, message: Request | Reply, sealed: bytes) -> list[Case]:
    tag = message.__struct_config__.tag
    seed = identity(_sender(direction)).seed()
    inputs = {"direction": direction, "site": "site-a", "seed": seed, "fields": message}
    inputs |= {"request": ASKED} if direction == "reply" else {}
    output = {"body": sealed[HEADER_BYTES:], "sealed": sealed}
    return [
        accepted(f"{tag}: seal", "seal-message", inputs, output),
        accepted(f"{tag}: open", "open-message", _opening(direction, sealed), message),
    ]


def _sender(direction: str) -> str:
    return "operator" if direction == "request" else "site-a"


def _opening(direction: str, sealed: bytes) -> dict[str, Any]:
    """The inputs of a receiver: direction, addressee, the pinned key, a limit, and the bytes."""
    return {
        "direction": direction,
        "site": "site-a",
        "public_key": identity(_sender(direction)).public_key,
        "limit": LIMIT,
        "sealed": sealed,
        **({"request": ASKED} if direction == "reply" else {}),
    }


def _sealed(direction: str, body: bytes, label: str | None = None) -> bytes:
    label = label or ("request to site-a" if direction == "request" else ANSWER)
    return MAGIC + identity(_sender(direction)).sign(label, body) + body


def _loose() -> list[Case]:
    """Messages in other encodings, which are accepted: only statements must be canonical."""
    fields = {"context": CONTEXT, "type": "confirm", "survivors": SITES}
    output = {"type": "confirm", "context": CONTEXT, "survivors": SITES}
    wide = {**output, "survivors": Raw(b"\xdc\x00\x03" + pack(SITES)[1:])}
    twice = Pairs((("type", "confirm"), ("context", bytes(32)), *tuple(output.items())[1:]))
    return [
        accepted(f"loose: {name}", "open-message", _opening("request", _sealed("request", b)), out)
        for name, b, out in (
            ("another order of the map", pack(fields), output),
            ("an array with a wider head", pack(wide), output),
            ("a duplicate key, of which the last counts", pack(twice), output),
        )
    ]


def _malformed_bodies() -> list[Case]:
    """Bodies that are validly sealed but outside the closed set."""
    confirm = {"type": "confirm", "context": CONTEXT, "survivors": SITES}
    good = pack(confirm)
    many = [{"sender": "site-a", "recipient": "site-b", "ciphertext": bytes(92)}] * 101
    share = many[0]
    reveal = {"owner": "site-a", "kind": "self-mask", "share": bytes(32)}
    requests: dict[str, Any] = {
        "truncated": Raw(good[:-1]),
        "trailing bytes": Raw(good + b"\x00"),
        "an unknown field": {**confirm, "more": 1},
        "a missing field": {"type": "confirm", "context": CONTEXT},
        "an unknown tag": {**confirm, "type": "confess"},
        "no tag": {"context": CONTEXT, "survivors": SITES},
        "a tag of the other direction": {"type": "refused", "check": "budget"},
        "an array": [1, 2],
        "an integer": 7,
        "a short context": {**confirm, "context": bytes(31)},
        "a text as context": {**confirm, "context": "a" * 32},
        "a name with a bad character": {**confirm, "survivors": ["site-a", "site_b"]},
        "one survivor": {**confirm, "survivors": ["site-a"]},
        "101 shares": {"type": "mask", "context": CONTEXT, "shares": many},
        "a ciphertext of 91 bytes": {
            "type": "mask",
            "context": CONTEXT,
            "shares": [{**share, "ciphertext": bytes(91)}],
        },
        "a signature of 63 bytes": {
            "type": "offer",
            "plan": {"statement": b"", "signature": bytes(63)},
        },
        "an array that promises 2^32 - 1 elements": {
            **confirm,
            "survivors": Raw(b"\xdd\xff\xff\xff\xff"),
        },
        "a byte string that promises 2^32 - 1 bytes": {
            **confirm,
            "context": Raw(b"\xc6\xff\xff\xff\xff"),
        },
    }
    replies: dict[str, Any] = {
        "a tag of the other direction": confirm,
        "a reason with a space": {"type": "refused", "check": "no reason"},
        "a reason of 65 letters": {"type": "refused", "check": "a" * 65},
        "a third kind of share": {
            "type": "unmasked",
            "context": CONTEXT,
            "shares": [{**reveal, "kind": "both"}],
        },
        "a share of 33 bytes": {
            "type": "unmasked",
            "context": CONTEXT,
            "shares": [{**reveal, "share": bytes(33)}],
        },
        "101 shares": {"type": "unmasked", "context": CONTEXT, "shares": [reveal] * 101},
        "a vector as a text": {"type": "masked", "context": CONTEXT, "vector": "abcd"},
    }
    return [
        refused(
            f"malformed {direction}: {name}",
            "open-message",
            _opening(direction, _sealed(direction, pack(body))) | {"limit": 100_000},
            MALFORMED,
        )
        for direction, bodies in (("request", requests), ("reply", replies))
        for name, body in bodies.items()
    ]


def _malformed_envelopes() -> list[Case]:
    """Envelopes that are refused before the signature is checked."""
    good = seal_request(OPERATOR, "site-a", REQUESTS[4])
    wrong = {
        "nothing": (b"", MALFORMED),
        "magic alone": (MAGIC, MALFORMED),
        "no body": (good[:HEADER_BYTES], MALFORMED),
        "the version before": (b"UMB1" + good[4:], "wire-version"),
        "a later version": (b"UMB9" + good[4:], "wire-version"),
        "no version": (b"UMBx" + good[4:], MALFORMED),
        "magic in small letters": (b"umb1" + good[4:], MALFORMED),
        "one byte past the limit": (good + bytes(LIMIT + 1 - len(good)), "oversized-message"),
    }
    return [
        refused(f"envelope: {name}", "open-message", _opening("request", sealed), check)
        for name, (sealed, check) in wrong.items()
    ]


def _wrongly_sealed() -> list[Case]:
    """Messages that are well formed but refused for the signature over them."""
    body = msgspec.msgpack.encode(REQUESTS[4])
    good = _opening("request", _sealed("request", body))
    flipped = bytearray(good["sealed"])
    flipped[-1] ^= 1
    wrong: dict[str, dict[str, Any]] = {
        "addressed to another site": {"sealed": _sealed("request", body, "request to site-b")},
        "opened by another site": {"site": "site-b"},
        "a request sealed as a reply": {"sealed": _sealed("request", body, "reply from site-a")},
        "a request sealed as a statement": {"sealed": _sealed("request", body, "RoundHeader")},
        "by another identity": {"public_key": identity("site-b").public_key},
        "one bit of the body flipped": {"sealed": bytes(flipped)},
        "trailing bytes": {"sealed": good["sealed"] + b"\x00"},
        "truncated": {"sealed": good["sealed"][:-1]},
    }
    reply = _opening("reply", seal_reply(IDENTITIES["site-a"], "site-a", REPLIES[0], ASKED))
    replayed = {**reply, "request": request_digest(b"another request")}
    return [
        refused(f"signature: {name}", "open-message", {**good, **change}, "pinned-signature")
        for name, change in wrong.items()
    ] + [
        refused(
            "signature: a reply to another request", "open-message", replayed, "pinned-signature"
        )
    ]
