"""Vectors of sharing, key derivation, digests, masks and quantisation."""

from typing import Any

import numpy as np
from vectors.cases import Case, Drawn, accepted, long_bytes, refused, sample

from umbel_common.adapters.vector import from_bytes
from umbel_common.canonical import digest
from umbel_common.secagg import masking, primitives, shamir
from umbel_common.secagg.encoding import Encoding, encode
from umbel_common.trust.identity import fingerprint

LOCAL = "LocalProtocolError"
SMALL_ORDER = (
    "00" * 32,
    "01" + "00" * 31,
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
)


def shamir_cases() -> list[Case]:
    """Split, recover, and the range of a share."""
    largest = (shamir.PRIME - 1).to_bytes(32, "big")
    secrets = {"zero": bytes(32), "largest": largest, "sample": sample("secret", 32)}
    shapes = [(1, (1,)), (2, (1, 2, 3)), (3, (5, 2, 9, 1)), (51, tuple(range(1, 101)))]
    cases = []
    for name, secret in secrets.items():
        for threshold, points in shapes:
            drawn = Drawn(f"shamir {name} {threshold}")
            shares = shamir.split(secret, points, threshold, drawn)
            title = f"{name} secret, threshold {threshold} of {len(points)}"
            inputs = {
                "secret": secret,
                "points": points,
                "threshold": threshold,
                "draws": drawn.draws,
            }
            cases.append(accepted(f"split: {title}", "shamir-split", inputs, shares))
            enough = {"points": points[-threshold:], "shares": shares[-threshold:]}
            cases.append(accepted(f"recover: {title}", "shamir-recover", enough, secret))
            if threshold > 1:
                few = points[: threshold - 1]
                wrong = shamir.recover(dict(zip(few, shares, strict=False)))
                inputs = {"points": few, "shares": shares[: threshold - 1]}
                cases.append(
                    accepted(f"one share too few: {title}", "shamir-recover", inputs, wrong)
                )
    for name, data in {
        "prime less one": largest,
        "prime": shamir.PRIME.to_bytes(32, "big"),
        "all ones": b"\xff" * 32,
        "31 bytes": bytes(31),
        "33 bytes": bytes(33),
    }.items():
        cases.append(
            accepted(
                f"share range: {name}",
                "shamir-in-range",
                {"share": data},
                name == "prime less one",
            )
        )
    return cases + _wrong_sharings(secrets["sample"])


def _wrong_sharings(secret: bytes) -> list[Case]:
    past = shamir.PRIME.to_bytes(32, "big")
    splits: dict[str, tuple[bytes, Any, int, str]] = {
        "x = 0": (secret, (0, 1, 2), 2, "points"),
        "x = the prime": (secret, (shamir.PRIME, 1), 2, "points"),
        "a repeated x": (secret, (1, 2, 1), 2, "points"),
        "no point": (secret, (), 1, "points"),
        "threshold 0": (secret, (1, 2), 0, "threshold"),
        "threshold above the points": (secret, (1, 2), 3, "threshold"),
        "a secret past the prime": (past, (1, 2), 2, "secret"),
        "a secret of 31 bytes": (secret[1:], (1, 2), 2, "secret"),
    }
    cases = [
        refused(
            f"split: {name}",
            "shamir-split",
            # A point past 2^53 does not survive every JSON reader, so points may be bytes too.
            {
                "secret": data,
                "points": [p if p < 2**53 else p.to_bytes(32, "big") for p in points],
                "threshold": threshold,
                "draws": [sample("unused", 32)] * 3,
            },
            check,
            LOCAL,
        )
        for name, (data, points, threshold, check) in splits.items()
    ]
    for name, points in {"x = 0": [0, 1], "no share": []}.items():
        inputs = {"points": points, "shares": [secret for _ in points]}
        cases.append(refused(f"recover: {name}", "shamir-recover", inputs, "points", LOCAL))
    return cases


def key_cases() -> list[Case]:
    """Every derivation of the protocol: HKDF purposes, commitments, bindings, X25519, sealing."""
    context, secret = sample("context", 32), sample("key material", 32)
    cases = []
    for purpose, sites in (
        ("self mask", ("site-a",)),
        ("pairwise mask", ("site-a", "site-b")),
        ("share", ("site-a", "site-b")),
        ("share", ("site-b", "site-a")),
        ("share", ("a", "bc")),
        ("share", ("ab", "c")),
        ("share", ("a" * 64, "b" * 64)),
    ):
        inputs = {"secret": secret, "purpose": purpose, "context": context, "sites": sites}
        output = primitives.derive(secret, purpose, context, sites)
        cases.append(
            accepted(f"{purpose} of {', '.join(s[:8] for s in sites)}", "derive", inputs, output)
        )
    for site in ("site-a", "site-b"):
        inputs = {"seed": secret, "context": context, "site": site}
        output = primitives.commit(secret, context, site)
        cases.append(accepted(f"seed commitment of {site}", "seed-commitment", inputs, output))
    for pair in (("site-a", "site-b"), ("a", "bc"), ("ab", "c")):
        inputs = {"context": context, "sender": pair[0], "recipient": pair[1]}
        output = primitives.share_binding(context, *pair)
        cases.append(accepted(f"binding of {' to '.join(pair)}", "share-binding", inputs, output))
    return cases + _agreement_cases(secret) + _sealing_cases(context)


def _agreement_cases(secret: bytes) -> list[Case]:
    peer = sample("peer secret", 32)
    inputs = {"secret": secret, "peer_key": primitives.public_key(peer)}
    output = primitives.agree(primitives.load(secret), inputs["peer_key"], "site-b")
    cases = [
        accepted("public key", "x25519-public", {"secret": peer}, inputs["peer_key"]),
        accepted("agreement", "x25519-agree", inputs, output),
    ]
    for index, point in enumerate(SMALL_ORDER):
        inputs = {"secret": secret, "peer_key": bytes.fromhex(point)}
        cases.append(refused(f"small order {index}", "x25519-agree", inputs, "weak-key"))
    return cases


def _sealing_cases(context: bytes) -> list[Case]:
    key, shares = sample("sealing key", 32), sample("two shares", 64)
    drawn = Drawn("sealing")
    bound = primitives.share_binding(context, "site-a", "site-b")
    sealed = primitives.seal(key, shares, bound, drawn)
    inputs = {"key": key, "data": shares, "bound": bound, "nonce": drawn.draws[0]}
    opening = {"key": key, "sealed": sealed, "bound": bound}
    other = primitives.share_binding(context, "site-b", "site-a")
    changes = {
        "another key": {"key": sample("another key", 32)},
        "the other direction": {"bound": other},
        "a flipped bit": {"sealed": sealed[:-1] + bytes([sealed[-1] ^ 1])},
        "a truncated tag": {"sealed": sealed[:-1]},
    }
    return [
        accepted("seal a pair of shares", "seal", inputs, sealed),
        accepted("open a pair of shares", "unseal", opening, shares),
        *(
            accepted(f"does not open: {name}", "unseal", {**opening, **change}, None)
            for name, change in changes.items()
        ),
    ]


LABELS = (
    "RoundHeader",
    "Release",
    "EarlyEnd",
    "TrainingPlan",
    "Roster",
    "KeyAdvert",
    "Survivors",
    "Entry",
    "RoundHeader2",
    "Release2",
    "TrainingPlan2",
    "Roster2",
    "adapter",
    "start",
    "sum-16",
    "sum-32",
    "fingerprint",
    "seed commitment",
    "request",
    "request to site-a",
    "reply from site-a",
)


def digest_cases() -> list[Case]:
    """The labelled SHA-256 under each label in use, and fingerprints."""
    cases = [
        accepted(
            f"label {label}, {len(data)} bytes",
            "digest",
            {"label": label, "data": data},
            digest(label, data),
        )
        for label in LABELS
        for data in (b"", sample("digested", 40))
    ]
    for index in range(2):
        key = sample(f"fingerprint {index}", 32)
        cases.append(
            accepted(f"fingerprint {index}", "fingerprint", {"public_key": key}, fingerprint(key))
        )
    return cases


def mask_cases() -> list[Case]:
    """Masks added to and subtracted from zeros, with lengths around the chunk of 2^17 bytes."""
    cases = []
    for bits in (16, 32):
        chunk = primitives.CHUNK_BYTES * 8 // bits
        for length in (0, 1, 7, 8, 9, 64, chunk - 1, chunk, chunk + 1, 2 * chunk + 3):
            plus = [sample(f"added {length} {index}", 32) for index in range(2)]
            minus = [sample(f"subtracted {length}", 32)]
            for name, added, subtracted in (("one", plus[:1], []), ("three", plus, minus)):
                vector = np.zeros(length, dtype=f"<u{bits // 8}")
                masking.add_masks(vector, added=added, subtracted=subtracted)
                cases.append(
                    accepted(
                        f"{name} of {length} elements of {bits} bits",
                        "mask",
                        {
                            "ring_bits": bits,
                            "length": length,
                            "added": added,
                            "subtracted": subtracted,
                        },
                        long_bytes(vector.tobytes()),
                    )
                )
    return cases


def quantise_cases() -> list[Case]:
    """Clipping, rounding with a fixed keystream, and weights."""
    values = np.array(
        [0, -0.0, 1, -1, 2, -2, 0.004, 0.005, -0.005, 0.0149, 1e-30, -1e-30, 3.4e38, 0.3333],
        dtype="<f4",
    ).tobytes()
    long = (np.frombuffer(sample("long delta", 4 * 16385), dtype="<u4") * 2.0**-31 - 1).astype(
        "<f4"
    )
    shapes: list[tuple[str, bytes, int, dict[str, Any]]] = [
        ("32 bits", values, 1, {}),
        ("32 bits, weight 5", values, 5, {"max_weight": 5}),
        ("16 bits", values, 3, {"ring_bits": 16, "max_weight": 3}),
        ("no coordinate", b"", 1, {}),
        ("across a chunk of 16384", long.tobytes(), 2, {"max_weight": 2}),
    ]
    cases = []
    for name, delta, weight, parts in shapes:
        encoding = _encoding(**parts)
        drawn = Drawn(f"rounding {name}")
        vector = encode(from_bytes(delta, len(delta) // 4), weight, encoding, drawn)
        inputs = _quantised(delta, weight, encoding, drawn.draws[0])
        cases.append(accepted(name, "quantise", inputs, long_bytes(vector.tobytes())))
    key = sample("rounding key", 32)
    wrong: list[tuple[str, bytes, int, dict[str, Any], str | None, str]] = [
        ("weight 0", values, 0, {}, "weight", LOCAL),
        ("weight above the largest", values, 2, {}, "weight", LOCAL),
        ("not a number", bytes.fromhex("0000c07f"), 1, {}, "delta-values", LOCAL),
        ("infinite", bytes.fromhex("0000807f"), 1, {}, "delta-values", LOCAL),
        ("a sum that could wrap", values, 1, {"ring_bits": 16, "sites": 400}, None, "PlanError"),
        ("a step of nothing", values, 1, {"step": 1e-12}, None, "PlanError"),
    ]
    for name, delta, weight, parts, check, error in wrong:
        inputs = _quantised(delta, weight, _encoding(**parts), key)
        cases.append(refused(name, "quantise", inputs, check, error))
    return cases


def _encoding(**parts: Any) -> Encoding:
    fields = {"clip_range": 1.0, "step": 0.01, "ring_bits": 32, "max_weight": 1, "sites": 3}
    return Encoding(**{**fields, **parts})


def _quantised(delta: bytes, weight: int, encoding: Encoding, key: bytes) -> dict[str, Any]:
    # A long delta is given by how it is made; see README.
    shown: Any = delta if len(delta) <= 256 else {"sample": "long delta", "length": len(delta) // 4}
    return {"delta": shown, "weight": weight, "encoding": encoding, "rounding_key": key}
