"""Vectors of whole attempts of three sites, and of the refusals of each side at each stage."""

from collections.abc import Callable
from typing import Any

import msgspec
from vectors.cases import Case, Drawn, accepted, identity, refused, sample
from vectors.run import PreparedRun, Run
from vectors.values import HEADER, IDENTITIES, ROSTER, SITES

from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.messages import (
    EncryptedShare,
    KeyAdvert,
    RevealedShare,
    Survivors,
    SurvivorSignature,
)
from umbel_common.secagg.primitives import agree, derive, load, public_key, seal, share_binding
from umbel_common.secagg.shamir import PRIME
from umbel_common.trust.identity import Signed, sign

DROPOUT = "site-c drops out before it sends its vector"
PAST_PRIME = PRIME.to_bytes(32, "big")
replace = msgspec.structs.replace


def attempt_cases() -> list[Case]:
    """Whole attempts, then refusals within one of them."""
    shapes: dict[str, tuple[int, dict[str, list[str]]]] = {
        "all sites stay, 32 bits": (32, {}),
        "all sites stay, 16 bits": (16, {}),
        DROPOUT: (32, {"mask": ["site-c"]}),
        "site-a leaves after its vector, and is in the sum": (16, {"confirm": ["site-a"]}),
        "site-b never shares, and is nowhere": (32, {"share": ["site-b"]}),
        "site-c does not reveal": (32, {"reveal": ["site-c"]}),
    }
    cases = []
    for name, (bits, silent) in shapes.items():
        drawn, inputs = _inputs(name, bits, silent)
        output = Run(inputs, drawn).whole()
        draws = {site: entropy.draws for site, entropy in drawn.items()}
        cases.append(accepted(name, "attempt", {**inputs, "draws": draws}, output))
    return cases + _prepared() + _site_refusals() + _coordinator_refusals()


def _prepared() -> list[Case]:
    shapes: dict[str, tuple[int, dict[str, list[str]]]] = {
        "prepared, all sites stay, 32 bits": (32, {}),
        "prepared, site-c drops out before it sends its vector, 16 bits": (
            16,
            {"mask": ["site-c"]},
        ),
        "prepared, site-b never trains, and is nowhere": (32, {"advertise": ["site-b"]}),
    }
    cases = []
    for name, (bits, silent) in shapes.items():
        drawn, inputs = _inputs(name, bits, silent)
        output = PreparedRun(inputs, drawn).whole()
        draws = {site: entropy.draws for site, entropy in drawn.items()}
        cases.append(accepted(name, "prepared-attempt", {**inputs, "draws": draws}, output))
    return [*cases, _shared_again()]


def _shared_again() -> Case:
    name = "prepared, site-b was restarted and all share again, site-c drops out"
    drawn, inputs = _inputs(name, 32, {"mask": ["site-c"]})
    inputs["restarted"] = ["site-b"]
    output = PreparedRun(inputs, drawn).whole()
    draws = {site: entropy.draws for site, entropy in drawn.items()}
    return accepted(name, "prepared-attempt", {**inputs, "draws": draws}, output)


def _inputs(
    name: str, bits: int, silent: dict[str, list[str]], header: RoundHeader = HEADER
) -> tuple[dict[str, Drawn], dict[str, Any]]:
    drawn = {site: Drawn(f"{name} {site}") for site in SITES}
    return drawn, {
        "header": msgspec.to_builtins(header, builtin_types=(bytes,)),
        "roster": msgspec.to_builtins(ROSTER, builtin_types=(bytes,)),
        "rules": {"threshold": 2, "colluding": 0, "minimum_cohort": 2},
        "ring_bits": bits,
        "seeds": {site: IDENTITIES[site].seed() for site in SITES},
        "ledger_head": sample("ledger head", 32),
        "vectors": {site: sample(f"vector {site}", 5 * bits // 8) for site in SITES},
        "silent": silent,
    }


def at_stage(stage: str, header: RoundHeader = HEADER) -> Run:
    """The attempt with the dropout, just before `stage`; at `end` it is over."""
    return _at(stage, header)[0]


def prepared_at(stage: str) -> PreparedRun:
    """An attempt that all of its sites prepared, just before `stage`."""
    drawn, inputs = _inputs("prepared, at a stage", 32, {})
    run = PreparedRun(inputs, drawn)
    run.to(stage)
    return run


def _at(stage: str, header: RoundHeader = HEADER) -> tuple[Run, dict[str, Drawn]]:
    drawn, inputs = _inputs(DROPOUT, 32, {"mask": ["site-c"]}, header)
    return Run(inputs, drawn).to(stage), drawn


def _site_refusals() -> list[Case]:
    makers: dict[str, Callable[[], dict[str, tuple[Any, str]]]] = {
        "share": _wrong_adverts,
        "mask": _wrong_shares,
        "confirm": _wrong_survivors,
        "reveal": _wrong_signatures,
    }
    return [
        refused(
            f"site-a at {stage}: {name}",
            "site-receives",
            {"attempt": DROPOUT, "site": "site-a", "stage": stage, "request": request},
            check,
        )
        for stage, make in makers.items()
        for name, (request, check) in make().items()
    ]


def _wrong_adverts() -> dict[str, tuple[Any, str]]:
    a, b, c = at_stage("share").requests("share")["site-a"]
    known = msgspec.msgpack.decode(b.statement, type=KeyAdvert)

    def altered(signer: str = "site-b", **fields: Any) -> Signed:
        return sign(identity(signer), replace(known, **fields))

    return {
        "its own advert is missing": ((b, c), "own-advert"),
        "an advert twice": ((a, b, b), "duplicate-site"),
        "its own advert alone": ((a,), "too-few-adverts"),
        "signed by another site": ((a, altered("site-c"), c), "pinned-signature"),
        "of another attempt": ((a, altered(context=bytes(32)), c), "other-context"),
        "of a site outside the cohort": ((a, altered(site="site-d"), c), "not-in-cohort"),
        "one key for two purposes": (
            (a, altered(cipher_key=known.mask_key), c),
            "duplicate-key",
        ),
        "a cipher key of small order": ((a, altered(cipher_key=bytes(32)), c), "weak-key"),
        "a mask key of small order": ((a, altered(mask_key=bytes(32)), c), "weak-key"),
        "an advert that does not decode": (
            (a, replace(b, statement=b.statement[:-1]), c),
            "malformed-message",
        ),
        "a survivor set instead of an advert": (
            (a, sign(identity("site-b"), Survivors(context=bytes(32), sites=SITES)), c),
            "malformed-message",
        ),
    }


def _wrong_shares() -> dict[str, tuple[Any, str]]:
    run, drawn = _at("mask")
    b, c = msgspec.convert(run.requests("mask")["site-a"], tuple[EncryptedShare, ...])

    def sealed(data: bytes, context: bytes) -> EncryptedShare:
        """A share from site-b, properly encrypted for site-a."""
        ours, theirs = drawn["site-b"].draws[0], public_key(drawn["site-a"].draws[0])
        key = derive(agree(load(ours), theirs, "site-a"), "share", context, ("site-b", "site-a"))
        bound = share_binding(context, "site-b", "site-a")
        return replace(b, ciphertext=seal(key, data, bound, Drawn("forged share")))

    context = run.header.context()
    return {
        "no share": ((), "too-few-shares"),
        "a share twice": ((b, b), "duplicate-site"),
        "a share for another site": ((b, replace(c, recipient="site-b")), "wrong-recipient"),
        "a share from a stranger": ((b, replace(c, sender="site-d")), "not-nested"),
        "two ciphertexts exchanged": (
            (replace(b, ciphertext=c.ciphertext), replace(c, ciphertext=b.ciphertext)),
            "share-decrypt",
        ),
        "encrypted in another context": ((sealed(bytes(64), bytes(32)), c), "share-decrypt"),
        "a self-mask share past the prime": (
            (sealed(PAST_PRIME + bytes(32), context), c),
            "share-range",
        ),
        "a mask-key share past the prime": (
            (sealed(bytes(32) + PAST_PRIME, context), c),
            "share-range",
        ),
    }


def _wrong_survivors() -> dict[str, tuple[Any, str]]:
    return {
        "out of order": (("site-b", "site-a"), "survivor-order"),
        "a site twice": (("site-a", "site-a", "site-b"), "duplicate-site"),
        "a stranger": (("site-a", "site-d"), "not-nested"),
        "itself missing": (("site-b", "site-c"), "own-site-missing"),
        "itself alone": (("site-a",), "too-few-survivors"),
    }


def _wrong_signatures() -> dict[str, tuple[Any, str]]:
    run = at_stage("reveal")
    a, b = run.requests("reveal")["site-a"]
    context = run.header.context()

    def signed(signer: str, sites: tuple[str, ...], context: bytes) -> SurvivorSignature:
        statement = Survivors(context=context, sites=sites)
        return SurvivorSignature(site="site-b", signed=sign(identity(signer), statement))

    pair = ("site-a", "site-b")
    return {
        "too few": ((a,), "too-few-signatures"),
        "one twice": ((a, a), "duplicate-site"),
        "by a site that did not survive": ((a, replace(b, site="site-c")), "not-a-survivor"),
        "by another identity": ((a, signed("site-c", pair, context)), "pinned-signature"),
        "over another set": ((a, signed("site-b", SITES, context)), "other-survivors"),
        "over another attempt": ((a, signed("site-b", pair, bytes(32))), "other-context"),
        "an advert's signature": (
            (a, replace(b, signed=run.output["advertise"]["site-b"])),
            "pinned-signature",
        ),
    }


def _coordinator_refusals() -> list[Case]:
    sent = at_stage("end").output
    b = sent["advertise"]["site-b"]
    shares, revealed = sent["share"]["site-a"], sent["reveal"]["site-a"]
    confirmation = sent["confirm"]["site-a"]
    vector = sent["mask"]["site-a"]
    past = [replace(share, share=PAST_PRIME) for share in revealed]
    swapped = [
        RevealedShare(owner=share.owner, kind="mask-key", share=share.share) for share in revealed
    ]
    wrong: list[tuple[str, str, str, Any, str]] = [
        ("advertise", "another site's advert", "site-a", b, "wrong-sender"),
        ("advertise", "an advert from a stranger", "site-d", b, "unexpected-site"),
        ("share", "a share too few", "site-a", shares[:1], "wrong-recipient"),
        ("share", "another's shares", "site-b", shares, "wrong-sender"),
        ("mask", "a vector one element short", "site-a", vector[:-4], "vector-length"),
        ("mask", "a vector one byte short", "site-a", vector[:-1], "vector-length"),
        ("confirm", "another's signature", "site-b", confirmation, "wrong-sender"),
        ("confirm", "a signature of a dropped-out site", "site-c", confirmation, "unexpected-site"),
        ("reveal", "a share too few", "site-a", revealed[:-1], "revealed-shares"),
        ("reveal", "a share twice", "site-a", (*revealed, revealed[0]), "revealed-shares"),
        ("reveal", "a survivor's mask key", "site-a", swapped, "revealed-shares"),
        ("reveal", "a share past the prime", "site-a", past, "share-range"),
    ]
    return [
        refused(
            f"coordinator at {stage}: {name}",
            "coordinator-receives",
            {"attempt": DROPOUT, "site": site, "stage": stage, "answer": answer},
            check,
        )
        for stage, name, site, answer, check in wrong
    ]
