"""The server's side of one attempt: five stages, each a value that takes answers and is closed.

::

    Advertising -> Sharing -> Masking -> Confirming -> Unmasking -> Aggregate
       (U1)         (U2)       (U3)        (U4)

`receive` returns the same stage with one more answer, or raises and leaves the stage as it was;
`close` returns the next stage, whose `requests` are what each of its sites is to be sent. Sites
that did not answer are out. All are frozen values but for one thing: the running sum of masked
vectors, which grows in place in `Masking`, so that no site's vector is kept.

U1 to U4 are the sites that answered each stage, as in Bonawitz et al. 2017, figure 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from umbel_common.errors import LocalProtocolError, RoundAborted, require
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.checks import check_distinct_keys, open_advert, open_survivors
from umbel_common.secagg.messages import (
    EncryptedShare,
    KeyAdvert,
    RevealedShare,
    SurvivorSignature,
)
from umbel_common.secagg.primitives import KEY_BYTES, agree, load
from umbel_common.secagg.shamir import is_element
from umbel_common.secagg.unmasking import Aggregate, RunningSum, Secrets, unmask
from umbel_common.trust.identity import Roster, Signed

__all__ = [
    "Advertising",
    "Aggregate",
    "Confirming",
    "Masking",
    "Sharing",
    "Unmasking",
    "open_attempt",
]

Answer = TypeVar("Answer")

_ANY_KEY = load(bytes(KEY_BYTES))
"""X25519 makes it a multiple of 8, so a point of small order gives zero with it as with any."""


@dataclass(frozen=True)
class Attempt:
    """What stays the same through all stages."""

    header: RoundHeader
    context: bytes
    roster: Roster
    threshold: int
    ring_bits: int
    length: int


@dataclass(frozen=True)
class Stage(Generic[Answer]):
    """One stage: the sites that it asked, and the answers of some of them."""

    attempt: Attempt
    sites: tuple[str, ...]
    """Sorted."""
    answers: Mapping[str, Answer]

    @property
    def waiting(self) -> frozenset[str]:
        """The sites that have not answered."""
        return frozenset(self.sites) - self.answers.keys()

    @property
    def answered(self) -> tuple[str, ...]:
        """The sites that have answered, sorted."""
        return tuple(sorted(self.answers))

    def _expect(self, site: str) -> None:
        require(
            site in self.sites, "unexpected-site", "a site answers that was not asked", field=site
        )
        require(site not in self.answers, "second-answer", "a site answers twice", field=site)

    def _require_threshold(self, check: str) -> None:
        if len(self.answers) < self.attempt.threshold:
            raise RoundAborted(
                check,
                "too few sites answered a stage of this attempt",
                found=f"{len(self.answers)} of {len(self.sites)}",
                accepted=f"at least {self.attempt.threshold}",
                remedy="retry when more sites are online; the deltas that sites hold are reused",
            )


@dataclass(frozen=True)
class Advertising(Stage[tuple[Signed, KeyAdvert]]):
    """Waits for the whole cohort's keys."""

    def receive(self, site: str, payload: Signed) -> "Advertising":
        """Takes a signed `KeyAdvert`.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `malformed-message`,
                `not-in-cohort`, `pinned-signature`, `other-context`, `wrong-sender`,
                `duplicate-key` or `weak-key`.
        """
        self._expect(site)
        attempt = self.attempt
        advert = open_advert(payload, attempt.context, attempt.header.cohort, attempt.roster)
        require(
            advert.site == site,
            "wrong-sender",
            "a site sent another site's keys",
            found=advert.site,
            accepted=site,
        )
        check_distinct_keys([*(known for _, known in self.answers.values()), advert])
        # Here it costs one site its place; passed on, every peer would refuse it and be out.
        for key in (advert.cipher_key, advert.mask_key):
            agree(_ANY_KEY, key, site)
        return replace(self, answers={**self.answers, site: (payload, advert)})

    def close(self) -> "Sharing":
        """Raises:
        RoundAborted: `too-few-adverts`.
        """
        self._require_threshold("too-few-adverts")
        return Sharing(self.attempt, self.answered, {}, adverts=dict(self.answers))


@dataclass(frozen=True)
class Sharing(Stage[tuple[EncryptedShare, ...]]):
    """Waits for U1's encrypted shares."""

    adverts: Mapping[str, tuple[Signed, KeyAdvert]]

    def requests(self) -> dict[str, tuple[Signed, ...]]:
        """To each site of U1: the adverts of U1, in the order of their sites' names."""
        adverts = tuple(self.adverts[site][0] for site in self.sites)
        return dict.fromkeys(self.sites, adverts)

    def receive(self, site: str, payload: tuple[EncryptedShare, ...]) -> "Sharing":
        """Takes one share for each other site of U1.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `wrong-sender` or
                `wrong-recipient`.
        """
        self._expect(site)
        require(
            all(share.sender == site for share in payload),
            "wrong-sender",
            "a site sent another's shares",
            field=site,
        )
        recipients = sorted(share.recipient for share in payload)
        require(
            recipients == [peer for peer in self.sites if peer != site],
            "wrong-recipient",
            "a site must send one share to each of its peers",
            field=site,
        )
        return replace(self, answers={**self.answers, site: payload})

    def close(self) -> "Masking":
        """Raises:
        RoundAborted: `too-few-shares`.
        """
        self._require_threshold("too-few-shares")
        return Masking(
            self.attempt,
            self.answered,
            {},
            adverts={site: self.adverts[site][1] for site in self.answered},
            shares=dict(self.answers),
            total=RunningSum(self.attempt.ring_bits, self.attempt.length),
        )


@dataclass(frozen=True)
class Masking(Stage[None]):
    """Waits for U2's masked vectors and adds them up as they come."""

    adverts: Mapping[str, KeyAdvert]
    shares: Mapping[str, tuple[EncryptedShare, ...]]
    total: RunningSum

    def requests(self) -> dict[str, tuple[EncryptedShare, ...]]:
        """To each site of U2: the shares that the others of U2 made for it."""
        inbox: dict[str, list[EncryptedShare]] = {site: [] for site in self.sites}
        for sender in self.sites:
            for share in self.shares[sender]:
                if share.recipient in inbox:
                    inbox[share.recipient].append(share)
        return {site: tuple(shares) for site, shares in inbox.items()}

    def receive(self, site: str, payload: bytes | memoryview) -> "Masking":
        """Adds a masked vector, little-endian, to the running sum. Only the result may be used on.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer` or `vector-length`.
            LocalProtocolError: `stale-stage`.
        """
        self._expect(site)
        self.total.add(payload, count=len(self.answers))
        return replace(self, answers={**self.answers, site: None})

    def close(self) -> "Confirming":
        """Raises:
        RoundAborted: `too-few-vectors`.
        """
        self._require_threshold("too-few-vectors")
        return Confirming(
            self.attempt,
            self.answered,
            {},
            adverts=self.adverts,
            dropped=tuple(sorted(self.waiting)),
            total=self.total,
        )


@dataclass(frozen=True)
class Confirming(Stage[SurvivorSignature]):
    """Waits for U3's signatures over U3."""

    adverts: Mapping[str, KeyAdvert]
    dropped: tuple[str, ...]
    """U2 without U3."""
    total: RunningSum

    def requests(self) -> dict[str, tuple[str, ...]]:
        """To each site of U3: the sorted names of U3."""
        return dict.fromkeys(self.sites, self.sites)

    def receive(self, site: str, payload: SurvivorSignature) -> "Confirming":
        """Takes a signature over the survivor set.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `wrong-sender`,
                `pinned-signature`, `malformed-message`, `other-context` or `other-survivors`.
        """
        self._expect(site)
        require(
            payload.site == site,
            "wrong-sender",
            "a site sent another's signature",
            found=payload.site,
            accepted=site,
        )
        open_survivors(payload, self.attempt.context, self.sites, self.attempt.roster)
        return replace(self, answers={**self.answers, site: payload})

    def close(self) -> "Unmasking":
        """Raises:
        RoundAborted: `too-few-confirmations`.
        """
        self._require_threshold("too-few-confirmations")
        return Unmasking(
            self.attempt,
            self.answered,
            {},
            survivors=self.sites,
            # No more than prove the set: each costs every site a verification.
            signatures=tuple(
                self.answers[site] for site in self.answered[: self.attempt.threshold]
            ),
            adverts=self.adverts,
            dropped=self.dropped,
            total=self.total,
        )


@dataclass(frozen=True)
class Unmasking(Stage[tuple[RevealedShare, ...]]):
    """Waits for U4's shares of U2's secrets."""

    survivors: tuple[str, ...]
    """U3."""
    signatures: tuple[SurvivorSignature, ...]
    adverts: Mapping[str, KeyAdvert]
    dropped: tuple[str, ...]
    total: RunningSum

    def requests(self) -> dict[str, tuple[SurvivorSignature, ...]]:
        """To each site of U4: as many signatures over U3 as the threshold, sorted by site."""
        return dict.fromkeys(self.sites, self.signatures)

    def receive(self, site: str, payload: tuple[RevealedShare, ...]) -> "Unmasking":
        """Takes one share for each site of U2, of the kind that its fate calls for.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `revealed-shares` or
                `share-range`.
        """
        self._expect(site)
        expected = [(owner, "self-mask") for owner in self.survivors]
        expected += [(owner, "mask-key") for owner in self.dropped]
        require(
            sorted((share.owner, share.kind) for share in payload) == sorted(expected),
            "revealed-shares",
            "a site must reveal a self-mask share for each survivor and a mask-key share for each "
            "other site",
            field=site,
        )
        require(
            all(is_element(share.share) for share in payload),
            "share-range",
            "a share is not below the prime",
            field=site,
        )
        return replace(self, answers={**self.answers, site: payload})

    def close(self) -> Aggregate:
        """The sum over U3. The running sum is handed over: a stage closes once.

        Raises:
            RoundAborted: `too-few-reveals`, `seed-commitment` or `mask-key`.
            LocalProtocolError: `stale-stage`.
        """
        self._require_threshold("too-few-reveals")
        total = self.total.take(count=len(self.survivors))
        wrong_shares = unmask(total, self._secrets())
        return Aggregate(survivors=self.survivors, total=total, wrong_shares=wrong_shares)

    def _secrets(self) -> Secrets:
        points = {site: self.attempt.header.cohort.index(site) + 1 for site in self.answered}
        shares: dict[str, dict[int, bytes]] = {owner: {} for owner in self.adverts}
        for site, point in points.items():
            for share in self.answers[site]:
                shares[share.owner][point] = share.share
        return Secrets(
            context=self.attempt.context,
            adverts=self.adverts,
            threshold=self.attempt.threshold,
            sites={point: site for site, point in points.items()},
            seed_shares={owner: shares[owner] for owner in self.survivors},
            key_shares={owner: shares[owner] for owner in self.dropped},
        )


def open_attempt(
    header: RoundHeader, roster: Roster, threshold: int, ring_bits: int, length: int
) -> Advertising:
    """A new attempt, waiting for the keys of the header's cohort.

    Args:
        threshold: fewest sites that must answer each stage; shares that recover a secret.
        ring_bits: 16 or 32.
        length: elements of each masked vector.

    Raises:
        IdentityError: a site of the cohort is not in the roster.
        LocalProtocolError: `threshold` where the cohort cannot reach it.
    """
    for site in header.cohort:
        roster.member(site)
    if not 2 <= threshold <= len(header.cohort):
        raise LocalProtocolError(
            "threshold",
            "a cohort cannot be aggregated with this threshold",
            found=threshold,
            accepted=f"2 to {len(header.cohort)}",
        )
    attempt = Attempt(header, header.context(), roster, threshold, ring_bits, length)
    return Advertising(attempt, header.cohort, {})
