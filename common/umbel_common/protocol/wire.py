"""The closed set of messages between server and site, sealed by the sender's identity.

The law: nothing of a message is parsed, and nothing allocated for it, before its seal is verified.
The set is closed: a party does what a type here says and nothing else, and no type carries code, a
file name or an open field. Any change to a type here or in `umbel_common.secagg.messages` is
another `WIRE_VERSION`. A new type needs no other version, because a party that does not know it
refuses it (`malformed-message`). Nothing here knows how sealed bytes travel.

A sealed message is `"UMB" | wire version (1) | signature (64) | body`. The signature covers a label
that names the direction and the site; the label of a reply also names the request. So a message is
good for one site and one direction only, and a reply for one request, whatever was recorded before.
The body is the strict MessagePack encoding of one of the types below. A receiver checks, in this
order:

1. the size: `oversized-message`
2. the mark: `malformed-message`
3. the version: `wire-version`
4. the signature, against the pinned key: `pinned-signature`
5. the body, by decoding it: `malformed-message`

Each side speaks one version, and names it in each message. A side that is spoken to in another
version refuses and says so, and the people of both sides read who has to upgrade.
"""

from typing import Annotated, TypeAlias

import msgspec

from umbel_common.canonical import Digest, Value, decode, digest
from umbel_common.errors import require
from umbel_common.plans.plan import COUNTS, TrainingPlan
from umbel_common.plans.statements import Cohort
from umbel_common.secagg.messages import (
    EncryptedShare,
    Preparation,
    RevealedShare,
    SurvivorSignature,
)
from umbel_common.trust.identity import SIGNATURE_BYTES, Identity, Signed, verifies

WIRE_VERSION = 2
"""Version of everything in this file and in `umbel_common.secagg.messages`."""
_MARK = b"UMB"
MAGIC = _MARK + str(WIRE_VERSION).encode()
HEADER_BYTES = len(MAGIC) + SIGNATURE_BYTES


Blob = Annotated[memoryview, msgspec.Meta(max_length=2**31 - 1)]
"""A vector; it is decoded as a view of the message, not as a copy."""
MOST_TENSORS = 2**14
Blobs = Annotated[tuple[Blob, ...], msgspec.Meta(max_length=MOST_TENSORS)]
"""The tensors of a vector that are sent, each as a `Blob`, so that a sender needs no copy of them.
"""
MAX_SITES = 100


class Message(Value, frozen=True, tag_field="type"):
    """Base of the messages; the tag is the type's name on the wire."""


class OfferRequest(Message, frozen=True, tag="offer"):
    """A plan that the operator wants to run. The site judges it by its own policy."""

    plan: Signed


class OfferUnderRoster(Message, frozen=True, tag="offer-under-roster"):
    """An offer that names the roster under which the job would run, so that a site which has not
    approved this roster refuses the plan before anybody approves it or is charged for it."""

    plan: Signed
    roster: Digest


class OfferReply(Message, frozen=True, tag="offer-accepted"):
    """The site is ready to train under this plan."""

    plan: Digest


class LastAdvert(Value, frozen=True):
    """What a site signed last, shown to it again. A site whose state was put back to an earlier
    time does not know it."""

    header: Signed
    """The signed `RoundHeader` of the attempt for which the site advertised keys."""
    advert: Signed
    """The site's signed `KeyAdvert`, with the head of its privacy ledger at that time."""


class TrainRequest(Message, frozen=True, tag="train", kw_only=True):
    """Stage 1: train from this global adapter, then advertise fresh keys."""

    header: Signed
    release: Signed
    """The signed `Release` of the adapter from which training starts."""
    last: LastAdvert | None = None
    """The site's last advert, in any job; None: the server knows none."""
    adapter: Blob
    """The adapter's flat vector, float32 little-endian."""


class TrainFromLastRequest(Message, frozen=True, tag="train-from-last", kw_only=True):
    """Stage 1, for a site that has the adapter of the release before, or this one already: as
    `TrainRequest`, with the difference in the place of the adapter."""

    header: Signed
    release: Signed
    """The signed `Release` of the adapter from which training starts."""
    last: LastAdvert | None = None
    """As in `TrainRequest`."""
    onto: Digest
    """The digest of the adapter in which `changed` replaces tensors."""
    changed: Blobs
    """The tensors that the release can have changed (`umbel_common.adapters.difference`), float32
    little-endian, in the order of the plan's. Empty: the release's adapter is `onto`."""


class TrainReply(Message, frozen=True, tag="trained"):
    """Training is done; the `KeyAdvert` for this attempt."""

    advert: Signed


class ShareRequest(Message, frozen=True, tag="share"):
    """Stage 2: the adverts of U1, in the order of their sites' names."""

    context: Digest
    adverts: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_SITES)]


class ShareReply(Message, frozen=True, tag="shared"):
    """One encrypted pair of shares for each peer of U1."""

    context: Digest
    shares: Annotated[tuple[EncryptedShare, ...], msgspec.Meta(max_length=MAX_SITES)]


class MaskRequest(Message, frozen=True, tag="mask"):
    """Stage 3: the shares addressed to this site; their senders, and itself, are U2."""

    context: Digest
    shares: Annotated[tuple[EncryptedShare, ...], msgspec.Meta(max_length=MAX_SITES)]


class MaskReply(Message, frozen=True, tag="masked"):
    """The masked vector: elements of the ring, little-endian."""

    context: Digest
    vector: Blob


class ConfirmRequest(Message, frozen=True, tag="confirm"):
    """Stage 4: the survivors U3."""

    context: Digest
    survivors: Cohort


class ConfirmReply(Message, frozen=True, tag="confirmed"):
    """This site's signature over U3."""

    context: Digest
    signature: SurvivorSignature


class UnmaskRequest(Message, frozen=True, tag="unmask"):
    """Stage 5: the signatures over U3."""

    context: Digest
    signatures: Annotated[tuple[SurvivorSignature, ...], msgspec.Meta(max_length=MAX_SITES)]


class UnmaskReply(Message, frozen=True, tag="unmasked"):
    """One share for each site of U2."""

    context: Digest
    shares: Annotated[tuple[RevealedShare, ...], msgspec.Meta(max_length=MAX_SITES)]


class PrepareRequest(Message, frozen=True, tag="prepare"):
    """Prepare keys for an attempt that is to come."""

    preparation: Preparation


class PrepareReply(Message, frozen=True, tag="prepared"):
    """The signed `PreparedKeys` for it."""

    keys: Signed


class FillRequest(Message, frozen=True, tag="fill"):
    """The `PreparedKeys` of the whole cohort, in the order of its sites' names."""

    context: Digest
    """`Preparation.context`, also in the reply."""
    keys: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_SITES)]


class FillReply(Message, frozen=True, tag="filled"):
    """One encrypted pair of shares for each peer of the cohort."""

    context: Digest
    shares: Annotated[tuple[EncryptedShare, ...], msgspec.Meta(max_length=MAX_SITES)]


class MaskPreparedRequest(Message, frozen=True, tag="mask-prepared"):
    """Stages 2 and 3 of a prepared attempt; a `MaskReply` answers it."""

    context: Digest
    adverts: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_SITES)]
    """The adverts of U1, in the order of their sites' names."""
    shares: Annotated[tuple[EncryptedShare, ...], msgspec.Meta(max_length=MAX_SITES)]
    """As in `MaskRequest`, but prepared."""


class ShareAgainRequest(Message, frozen=True, tag="share-again"):
    """Stage 2 of an attempt for which a `FillRequest` went out, and that not all of U1 can use; a
    `ShareReply` answers it, and `MaskRequest` follows."""

    context: Digest
    adverts: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_SITES)]
    """The adverts of U1, in the order of their sites' names."""


class FinishRequest(Message, frozen=True, tag="finish", kw_only=True):
    """The last release of the job, for the site to keep."""

    release: Signed
    early_end: Signed | None = None
    """The signed `EarlyEnd` of a job that ends before the last round of its plan; else None."""
    adapter: Blob


class FinishReply(Message, frozen=True, tag="finished"):
    """The site verified and stored the adapter."""

    adapter: Digest


class Refusal(Message, frozen=True, tag="refused"):
    """The site refuses; the reason is a code without private detail."""

    check: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,64}\Z")]


class TogetherRequest(Message, frozen=True, tag="together"):
    """A late stage of one attempt, and a step towards the one that is to come: one message."""

    stage: ConfirmRequest | UnmaskRequest
    ahead: PrepareRequest | FillRequest


class TogetherReply(Message, frozen=True, tag="answered-together"):
    """Both answers. A refusal of the stage is a `Refusal` of the whole request."""

    stage: ConfirmReply | UnmaskReply
    ahead: PrepareReply | FillReply | Refusal


Request: TypeAlias = (
    OfferRequest
    | OfferUnderRoster
    | TrainRequest
    | TrainFromLastRequest
    | ShareRequest
    | ShareAgainRequest
    | MaskRequest
    | MaskPreparedRequest
    | ConfirmRequest
    | UnmaskRequest
    | PrepareRequest
    | FillRequest
    | TogetherRequest
    | FinishRequest
)
Reply: TypeAlias = (
    OfferReply
    | TrainReply
    | ShareReply
    | MaskReply
    | ConfirmReply
    | UnmaskReply
    | PrepareReply
    | FillReply
    | TogetherReply
    | FinishReply
    | Refusal
)


def size_limit(plan: TrainingPlan | None) -> int:
    """Size of the largest sealed message, in bytes, under `plan`; None: before any plan.

    It has room for one adapter or masked vector, and ample room for what grows with the sites or
    with the number of tensors.
    """
    vector = 0 if plan is None else 4 * (plan.lora.size + 1 + COUNTS)
    return HEADER_BYTES + vector + 4096 + MAX_SITES * 1024 + 2**20


def seal_request(operator: Identity, site: str, request: Request) -> bytes:
    """A request as it travels to `site`."""
    return _seal(operator, f"request to {site}", request)


def open_request(operator_key: bytes, site: str, data: bytes, *, limit: int) -> Request:
    """Opens a request addressed to `site`.

    Raises:
        RemoteProtocolError: `oversized-message`, `malformed-message`, `wire-version` or
            `pinned-signature`.
    """
    body = _open(operator_key, "the operator", f"request to {site}", data, limit)
    # 5
    return decode(body, Request)  # type: ignore[arg-type]  # a union is a decodable type


def request_digest(sealed: bytes | memoryview) -> bytes:
    """The digest of a request as it travelled, to which its reply is bound, 32 bytes."""
    return digest("request", sealed)


def seal_reply(identity: Identity, site: str, reply: Reply, request: bytes) -> bytes:
    """A reply as it travels from `site`.

    Args:
        request: `request_digest` of the request that the reply answers.
    """
    return _seal(identity, _reply_label(site, request), reply)


def open_reply(site_key: bytes, site: str, data: bytes, request: bytes, *, limit: int) -> Reply:
    """Opens the reply of `site` to one request.

    Args:
        request: `request_digest` of the request that the reply must answer.

    Raises:
        RemoteProtocolError: `oversized-message`, `malformed-message`, `wire-version` or
            `pinned-signature`.
    """
    body = _open(site_key, site, _reply_label(site, request), data, limit)
    # 5
    return decode(body, Reply)  # type: ignore[arg-type]  # a union is a decodable type


def _reply_label(site: str, request: bytes) -> str:
    return f"reply from {site} to {request.hex()}"


def _seal(identity: Identity, label: str, message: Request | Reply) -> bytes:
    # A vector of megabytes is copied once, into the sealed message.
    parts = _encoded(message)
    return b"".join((MAGIC, identity.sign(label, *parts), *parts))


def _encoded(message: Request | Reply) -> tuple[bytes | memoryview, ...]:
    """The body in parts. Vectors are always the last field; they are not copied."""
    name = message.__struct_fields__[-1]
    vector = getattr(message, name)
    if isinstance(message, TrainFromLastRequest):
        start = msgspec.msgpack.encode(msgspec.structs.replace(message, changed=()))
        pieces = (part for piece in message.changed for part in _blob(piece))
        return start[:-1] + _array_head(len(message.changed)), *pieces
    if not isinstance(vector, memoryview):
        return (msgspec.msgpack.encode(message),)
    start = msgspec.msgpack.encode(msgspec.structs.replace(message, **{name: memoryview(b"")}))
    head, vector = _blob(vector)
    return start[:-2] + head, vector


def _blob(vector: memoryview) -> tuple[bytes, memoryview]:
    """A vector as MessagePack has it: the head, and the bytes behind it."""
    vector = vector.cast("B")
    # MessagePack writes the length of bytes in 8, 16 or 32 bits, and a code that says in how many.
    width = next(width for width in (1, 2, 4) if len(vector) < 256**width)
    kind = {1: 0xC4, 2: 0xC5, 4: 0xC6}[width]
    return bytes([kind]) + len(vector).to_bytes(width, "big"), vector


def _array_head(length: int) -> bytes:
    """The head of an array of at most `MOST_TENSORS`: its length in 4 or 16 bits."""
    return bytes([0x90 | length]) if length < 16 else b"\xdc" + length.to_bytes(2, "big")


def _open(key: bytes, sender: str, label: str, data: bytes, limit: int) -> memoryview:
    # 1
    require(
        len(data) <= limit,
        "oversized-message",
        "a message is larger than this plan allows",
        found=f"{len(data)} bytes",
        accepted=f"at most {limit} bytes",
    )
    # 2
    require(
        len(data) > HEADER_BYTES and data[: len(_MARK)] == _MARK and data[3:4].isdigit(),
        "malformed-message",
        "this is not a sealed message",
    )
    # 3: its signature is not verified yet, so the version can cause a refusal and nothing else.
    version = int(data[len(_MARK) : len(MAGIC)])
    behind = f"at {sender}" if version < WIRE_VERSION else "on this side"
    require(
        version == WIRE_VERSION,
        "wire-version",
        f"{sender} speaks wire version {version}, this side speaks {WIRE_VERSION}",
        found=version,
        accepted=WIRE_VERSION,
        remedy=f"upgrade Umbel {behind}",
    )
    body = memoryview(data)[HEADER_BYTES:]
    # 4
    require(
        verifies(key, label, body, data[len(MAGIC) : HEADER_BYTES]),
        "pinned-signature",
        f"a {label} is not signed by the pinned identity",
    )
    return body
