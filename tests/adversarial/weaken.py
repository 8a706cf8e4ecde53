"""The protocol without some of its checks at the sites; the attacker's own code makes no check."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from umbel_client.ledger import admission, contents
from umbel_client.ledger.ledger import Ledger
from umbel_client.privacy import attempt_cost
from umbel_client.site import policy
from umbel_client.storage import journal as session
from umbel_client.trainer import slots
from umbel_common import errors
from umbel_common.plans import statements
from umbel_common.secagg import masking, preparation, primitives

Replace = Callable[[object, object], None]


class Stopped(Exception):
    """A site refused what an attack needs, or the attacker's gain is useless."""

    def __init__(self, check: str) -> None:
        super().__init__(check)
        self.check = check


class Protection:
    """The checks that hold, at the sites only, never in the attacker's own code."""

    def __init__(self, removed: frozenset[str]) -> None:
        self.removed = removed
        self._inside = False

    @contextmanager
    def at_a_site(self) -> Iterator[None]:
        """Marks the code in which a site handles a request."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def holds(self, check: str) -> bool:
        """Whether a check is made where the code is now."""
        return self._inside and check not in self.removed


def weaken(protection: Protection, patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Makes every check ask the protection whether it holds, and takes barriers away."""
    require, judge = errors.require, policy._require

    def checked(holds: bool, check: str, message: str, **details: object) -> None:
        if protection.holds(check):
            require(holds, check, message, **details)

    def judged(condition: bool, check: str, **details: object) -> None:
        if protection.holds(check):
            judge(condition, check, **details)

    replace(require, checked)
    replace(judge, judged)
    for name in sorted(protection.removed & BARRIERS.keys()):
        BARRIERS[name](patch, replace)


def _without_context_binding(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Makes keys, commitments and associated data as if all attempts had one context."""
    derive, commit, bind = primitives.derive, primitives.commit, primitives.share_binding
    replace(derive, lambda secret, purpose, _, sites: derive(secret, purpose, bytes(32), sites))
    replace(commit, lambda seed, _, site: commit(seed, bytes(32), site))
    replace(bind, lambda _, sender, recipient: bind(bytes(32), sender, recipient))


def _without_share_authentication(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Decrypts with ChaCha20 without Poly1305, so anything decrypts (RFC 8439, section 2.8)."""

    def unseal(key: bytes, sealed: bytes, bound: bytes) -> bytes:
        cipher = Cipher(ChaCha20(key, (1).to_bytes(4, "little") + sealed[:12]), mode=None)
        return cipher.decryptor().update(sealed[12:-16])

    replace(primitives.unseal, unseal)


def _without_self_mask(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Leaves single masking: everybody knows the key of the self-mask."""
    replace(masking.self_mask_key, lambda seed, site, context: bytes(32))


def _without_unique_attempts(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Makes a journal that takes one attempt, and one stage, any number of times."""
    schema = session._SCHEMA
    for rule in ("context BLOB PRIMARY KEY", ",\n    UNIQUE (job, round, attempt)"):
        assert rule in schema
        schema = schema.replace(rule, rule.removesuffix(" PRIMARY KEY") if "KEY" in rule else "")
    schema = schema.replace(",\n    PRIMARY KEY (context, stage)", "")
    patch.setattr(session, "_SCHEMA", schema)


def _without_recorded_answers(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Makes a site forget what it has answered."""
    patch.setattr(session.Journal, "answer", lambda *_: None)


def _without_counted_answers(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Makes a ledger that does not know how much the journal has recorded."""
    patch.setattr(Ledger, "keep_pace", lambda *_: None)


def _without_canonical_sets(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Allows signed sets in any order."""
    replace(statements.check_sorted, lambda names: None)


def _without_a_true_claim(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Makes a site believe what a plan of distributed mode says of itself."""
    replace(attempt_cost.judge_cost, lambda *_: None)


def _without_most_attempts(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Makes a ledger that takes any number of attempts of a job."""
    replace(admission.require_attempt, lambda *_: None)
    patch.setattr(contents, "_require", lambda *_: None)


def _without_advert_binding(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Derives the masks of a prepared attempt as those of any other."""
    replace(masking.prepared_mask_context, lambda context, adverts: context)


def _without_one_attempt_slots(patch: pytest.MonkeyPatch, replace: Replace) -> None:
    """Makes a site keep its slot, and use it for any attempt of its job."""

    class Fitting:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    patch.setattr(slots.Slots, "take", lambda held, header: held._of_jobs.get(header.job))
    patch.setattr(preparation, "preparation_of", lambda header: Fitting())


BARRIERS: dict[str, Callable[[pytest.MonkeyPatch, Replace], None]] = {
    "advert-binding": _without_advert_binding,
    "canonical-set": _without_canonical_sets,
    "claim-exceeded": _without_a_true_claim,
    "context-binding": _without_context_binding,
    "counted-answers": _without_counted_answers,
    "most-attempts": _without_most_attempts,
    "one-attempt-slots": _without_one_attempt_slots,
    "share-authentication": _without_share_authentication,
    "self-mask": _without_self_mask,
    "unique-attempt": _without_unique_attempts,
    "recorded-answer": _without_recorded_answers,
}
"""Protections that are more than one check, each with the function that removes it."""

STOPPED_AS = {
    "canonical-set": "site-fault",
    "context-binding": "share-decrypt",
    "counted-answers": "site-not-ready",
    "most-attempts": "budget",
    "share-authentication": "share-decrypt",
    "pinned-roster": "roster-digest",
    "durable-journal": "second-answer",
    "unique-attempt": "site-fault",
}
"""Codes by which a site refuses behind a barrier, where they differ from the barrier's name."""
