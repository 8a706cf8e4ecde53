"""The product's answer to a case: each operation that a vector names, by the product's own code."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from vectors.cases import from_json, long_bytes, replayed, sample, to_json
from vectors.run import PreparedRun, Run

from umbel_common import canonical
from umbel_common.adapters.vector import from_bytes
from umbel_common.canonical import Value
from umbel_common.plans.plan import PLAN_VERSIONS
from umbel_common.plans.statements import HEADER_VERSIONS, RELEASE_VERSIONS, EarlyEnd
from umbel_common.protocol import transcript, wire
from umbel_common.secagg import masking, messages, primitives, shamir
from umbel_common.secagg.encoding import Encoding, encode
from umbel_common.trust import identity
from umbel_common.trust.identity import Identity, Signed

KINDS: dict[str, type[Value]] = {
    identity.label_of(kind): kind
    for kind in (
        identity.Roster,
        identity.Roster2,
        *PLAN_VERSIONS,
        *HEADER_VERSIONS,
        *RELEASE_VERSIONS,
        EarlyEnd,
        messages.KeyAdvert,
        messages.Preparation,
        messages.PreparedKeys,
        messages.Survivors,
        transcript.Entry,
    )
}
REQUESTS: dict[str, Any] = {
    "share": tuple[Signed, ...],
    "mask": tuple[messages.EncryptedShare, ...],
    "confirm": tuple[str, ...],
    "reveal": tuple[messages.SurvivorSignature, ...],
}
ANSWERS: dict[str, Any] = {
    "advertise": Signed,
    "share": tuple[messages.EncryptedShare, ...],
    "mask": bytes,
    "confirm": messages.SurvivorSignature,
    "reveal": tuple[messages.RevealedShare, ...],
}


def perform(case: Mapping[str, Any], attempts: Mapping[str, Any]) -> Any:
    """The output of a case, as it is in JSON.

    Args:
        attempts: inputs of the whole attempts, by name; some cases need a stage of one.

    Raises:
        UmbelError: the product refuses.
    """
    inputs = from_json(case["inputs"])
    if "attempt" in inputs:
        inputs["attempt"] = from_json(attempts[inputs["attempt"]])
    return to_json(OPERATIONS[case["operation"]](**inputs))


def _split(secret: bytes, points: list[Any], threshold: int, draws: list[bytes]) -> Any:
    values = [int.from_bytes(p, "big") if isinstance(p, bytes) else p for p in points]
    return shamir.split(secret, values, threshold, replayed(draws))


def _seal(key: bytes, data: bytes, bound: bytes, nonce: bytes) -> bytes:
    return primitives.seal(key, data, bound, replayed([nonce]))


def _mask(ring_bits: int, length: int, added: list[bytes], subtracted: list[bytes]) -> Any:
    vector = np.zeros(length, dtype=f"<u{ring_bits // 8}")
    masking.add_masks(vector, added=added, subtracted=subtracted)
    return long_bytes(vector.tobytes())


def _quantise(delta: Any, weight: int, encoding: Any, rounding_key: bytes) -> Any:
    vector = delta_of(delta)
    encoded = encode(vector, weight, msgspec.convert(encoding, Encoding), replayed([rounding_key]))
    return long_bytes(encoded.tobytes())


def delta_of(delta: Any) -> Any:
    """A vector's `delta`, float32[n]: its bytes, or a sample spread over [-1, 1)."""
    if isinstance(delta, bytes):
        return np.frombuffer(delta, dtype="<f4")
    words = np.frombuffer(sample(delta["sample"], 4 * delta["length"]), dtype="<u4")
    return from_bytes((words * 2.0**-31 - 1).astype("<f4").tobytes(), delta["length"])


def _digest_statement(label: str, fields: Any) -> Any:
    data = canonical.encode(msgspec.convert(fields, KINDS[label]))
    return {"statement": data, "digest": canonical.digest(label, data)}


def _sign(label: str, seed: bytes, fields: Any) -> Any:
    signed = identity.sign(Identity(seed), msgspec.convert(fields, KINDS[label]))
    return {
        "statement": signed.statement,
        "digest": canonical.digest(label, signed.statement),
        "signature": signed.signature,
    }


def _open(label: str, public_key: bytes, statement: bytes, signature: bytes) -> Value:
    signed = Signed(statement=statement, signature=signature)
    return identity.open_signed(signed, KINDS[label], public_key)


def _seal_message(direction: str, site: str, seed: bytes, fields: Any, request: bytes = b"") -> Any:
    if direction == "request":
        sealed = wire.seal_request(Identity(seed), site, msgspec.convert(fields, wire.Request))
    else:
        reply = msgspec.convert(fields, wire.Reply)
        sealed = wire.seal_reply(Identity(seed), site, reply, request)
    return {"body": sealed[wire.HEADER_BYTES :], "sealed": sealed}


def _open_message(
    direction: str, site: str, public_key: bytes, limit: int, sealed: bytes, request: bytes = b""
) -> Any:
    if direction == "request":
        return wire.open_request(public_key, site, sealed, limit=limit)
    return wire.open_reply(public_key, site, sealed, request, limit=limit)


def run_of(inputs: Mapping[str, Any]) -> Run:
    """The attempt of a vector, with its draws."""
    return Run(inputs, {site: replayed(draws) for site, draws in inputs["draws"].items()})


def _prepared_attempt(**inputs: Any) -> Any:
    draws = {site: replayed(draws) for site, draws in inputs["draws"].items()}
    return PreparedRun(inputs, draws).whole()


def _site_receives(attempt: Any, site: str, stage: str, request: Any) -> Any:
    run = run_of(attempt).to(stage)
    _, answer = run.answer(site, msgspec.convert(request, REQUESTS[stage]))
    return answer


def _coordinator_receives(attempt: Any, site: str, stage: str, answer: Any) -> Any:
    machine = run_of(attempt).to(stage).machine
    machine.receive(site, msgspec.convert(answer, ANSWERS[stage]))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "shamir-split": _split,
    "shamir-recover": lambda points, shares: shamir.recover(dict(zip(points, shares, strict=True))),
    "shamir-in-range": lambda share: shamir.is_element(share),
    "derive": primitives.derive,
    "seed-commitment": primitives.commit,
    "share-binding": primitives.share_binding,
    "x25519-public": primitives.public_key,
    "x25519-agree": lambda secret, peer_key: primitives.agree(
        primitives.load(secret), peer_key, "site-b"
    ),
    "seal": _seal,
    "unseal": primitives.unseal,
    "digest": lambda label, data: canonical.digest(label, data),
    "fingerprint": identity.fingerprint,
    "mask": _mask,
    "quantise": _quantise,
    "digest-statement": _digest_statement,
    "sign-statement": _sign,
    "open-statement": _open,
    "seal-message": _seal_message,
    "open-message": _open_message,
    "attempt": lambda **inputs: run_of(inputs).whole(),
    "prepared-attempt": _prepared_attempt,
    "site-receives": _site_receives,
    "coordinator-receives": _coordinator_receives,
}
