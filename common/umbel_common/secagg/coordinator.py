"""The server's side of one attempt: five stages, each a value that takes answers and is closed.

::

    Advertising -> Sharing -> Masking -> Confirming -> Unmasking -> Aggregate
       (U1) |       (U2)    ^  (U3)        (U4)
            +--- prepared --+

`receive` returns the same stage with one more answer, or raises and leaves the stage as it was;
`close` returns the next stage, whose `requests` are what each of its sites is to be sent. Sites
that did not answer are out. U1 to U4 are the sites that answered each stage, as in Bonawitz et al.
2017, figure 4.

The law of this module:

- No stage keeps a site's vector. All stages are frozen values but for one thing: the running sum,
  which grows in place in `Masking`.
- The server releases the sum over U3 or nothing: no step takes another set, or a part of it.
- A wrong answer costs its sender its place and nobody else theirs, so a check that every site
  would make is made here first.
- No clock, no file, no network, no randomness.

Steps, by stage, in this order; "round" is the paper's. A code in backquotes refuses an answer, or
ends the attempt where `close` raises it, and stands before the steps that it guards. Each answer
begins with C0.1.

0. Every attempt and every answer

   - C0.0 Open: the cohort is in the roster and can reach the threshold (IdentityError,
     `threshold`); what was prepared was for this attempt (`slot`). Guards every stage.
   - C0.1 It comes from a site of this stage, for the first time: `unexpected-site`,
     `second-answer`. Guards every count of answers, and C3.2: no vector is added twice.

1. `Advertising` (round 0)

   - C1.1 Open the advert under the identity that the roster pins: `malformed-message`,
     `not-in-cohort`, `not-in-roster`, `pinned-signature`, `other-context`; see that it is its
     sender's: `wrong-sender`. Guards C1.3.
   - C1.2 See that both keys are new to this attempt and not of small order: `duplicate-key`,
     `weak-key`. Guards C2.1: passed on, such a key would be refused by every peer.
   - C1.3 Close with at least t sites, U1: `too-few-adverts`. Guards the next stage.
   - C1.4 Where all of U1 advertised the keys that the whole cohort prepared, their shares are here
     (`preparing`): U2 is U1, and stage 3 follows. One site with other keys, and stage 2 follows for
     all, again. Wherever a site may have prepared the attempt, masks are bound to the adverts of U1
     too.

2. `Sharing` (round 1)

   - C2.1 Send each site of U1 the adverts of U1.
   - C2.2 See that a site sends its own shares, one to each of its peers: `wrong-sender`,
     `wrong-recipient`. Guards C3.1: nobody lacks a share, or has two.
   - C2.3 Close with at least t sites, U2: `too-few-shares`. Guards the next stage.

3. `Masking` (round 2)

   - C3.1 Send each site of U2 the shares that the others of U2 made for it; in a prepared attempt
     also the adverts of U1, which it has not seen.
   - C3.2 Add the masked vector to the running sum: `vector-length`; `stale-stage` where our own
     code uses a stage twice. Guards C5.4.
   - C3.3 Close with at least t sites, U3: `too-few-vectors`. Guards the next stage. The rest of U2
     dropped out.

4. `Confirming` (round 3, the consistency check)

   - C4.1 Send each site of U3 the names of U3.
   - C4.2 See that the signature is its sender's, by a survivor, over U3: `wrong-sender`,
     `not-a-survivor`, `pinned-signature`, `malformed-message`, `other-context`,
     `other-survivors`. Guards C5.1: one wrong signature would make every site refuse.
   - C4.3 Close with at least t sites, U4: `too-few-confirmations`. Guards the next stage.

5. `Unmasking` (round 4)

   - C5.1 Send each site of U4 t of the signatures.
   - C5.2 See that a site reveals one share for each site of U2, of the kind that its fate calls
     for: `revealed-shares`, `share-range`. Guards C5.5.
   - C5.3 Close with at least t sites: `too-few-reveals`. Guards C5.5.
   - C5.4 Take the sum over U3, once: `stale-stage`. Guards C5.5.
   - C5.5 Recover every secret and check it: `seed-commitment`, `mask-key`. Guards C5.6: masks are
     removed with the right secrets or not at all.
   - C5.6 Remove the masks that are left.

C5.5 and C5.6 are in `unmasking`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from umbel_common.errors import LocalProtocolError, RoundAborted, require
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.checks import (
    check_confirmation,
    check_distinct_keys,
    check_recipients,
    open_advert,
)
from umbel_common.secagg.masking import prepared_mask_context
from umbel_common.secagg.messages import (
    EncryptedShare,
    KeyAdvert,
    RevealedShare,
    SurvivorSignature,
    preparation_of,
)
from umbel_common.secagg.preparing import Filling, Prepared
from umbel_common.secagg.primitives import ANY_KEY, agree
from umbel_common.secagg.shamir import is_element
from umbel_common.secagg.unmasking import Aggregate, RunningSum, Secrets, unmask
from umbel_common.trust.identity import Roster, Signed

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Terms:
    """What stays the same through all stages of an attempt."""

    header: RoundHeader
    context: bytes
    roster: Roster
    threshold: int
    """Fewest sites that must confirm and reveal: shares that recover a secret."""
    least: int
    """Fewest sites whose vectors may be in the sum; at least the threshold."""
    ring_bits: int
    length: int
    masks: bytes
    """From what masks are derived, 32 bytes: the context, or `masking.prepared_mask_context`."""


@dataclass(frozen=True)
class Stage(Generic[Answer]):
    """One stage: the sites that it asked, and the answers of some of them."""

    terms: Terms
    sites: tuple[str, ...]
    """The sites that were asked, sorted."""
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
        # C0.1
        require(
            site in self.sites, "unexpected-site", "a site that was not asked answers", field=site
        )
        require(site not in self.answers, "second-answer", "a site answers twice", field=site)

    def _require_answers(self, check: str, least: int) -> None:
        if len(self.answers) < least:
            raise RoundAborted(
                check,
                "too few sites answered a stage of this attempt",
                found=f"{len(self.answers)} of {len(self.sites)}",
                accepted=f"at least {least}",
                remedy="retry when more sites are online",
            )


@dataclass(frozen=True)
class Advertising(Stage[tuple[Signed, KeyAdvert]]):
    """Waits for the whole cohort's keys."""

    prepared: Prepared | Filling | None = None
    """What the cohort prepared for this attempt; `Filling`: not all of it, but some sites may have;
    None: no site was asked for shares."""

    def receive(self, site: str, payload: Signed) -> "Advertising":
        """Takes a signed `KeyAdvert`.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `malformed-message`,
                `not-in-cohort`, `not-in-roster`, `pinned-signature`, `other-context`,
                `wrong-sender`, `duplicate-key` or `weak-key`.
        """
        self._expect(site)
        # C1.1
        terms = self.terms
        advert = open_advert(payload, terms.context, terms.header.cohort, terms.roster)
        require(
            advert.site == site,
            "wrong-sender",
            "a site sent another site's keys",
            found=advert.site,
            accepted=site,
        )
        # C1.2
        check_distinct_keys([*(known for _, known in self.answers.values()), advert])
        for key in (advert.cipher_key, advert.mask_key):
            agree(ANY_KEY, key, site)
        return replace(self, answers={**self.answers, site: (payload, advert)})

    def close(self) -> "Sharing | Masking":
        """Ends stage 1, with the sites that answered.

        Raises:
            RoundAborted: `too-few-adverts`.
        """
        # C1.3
        self._require_answers("too-few-adverts", self.terms.least)
        # C1.4
        prepared, adverts = self.prepared, [advert for _, advert in self.answers.values()]
        signed = tuple(self.answers[site][0] for site in self.answered)
        terms = self.terms
        if prepared is not None:
            terms = replace(terms, masks=prepared_mask_context(terms.context, signed))
        if isinstance(prepared, Prepared) and all(map(prepared.has_keys_of, adverts)):
            return Masking(
                terms,
                self.answered,
                {},
                adverts={advert.site: advert for advert in adverts},
                shares=prepared.shares,
                total=RunningSum(self.terms.ring_bits, self.terms.length),
                unseen=signed,
            )
        return Sharing(terms, self.answered, {}, adverts=dict(self.answers))


@dataclass(frozen=True)
class Sharing(Stage[tuple[EncryptedShare, ...]]):
    """Waits for U1's encrypted shares."""

    adverts: Mapping[str, tuple[Signed, KeyAdvert]]

    @property
    def again(self) -> bool:
        """Whether sites of this attempt may have prepared it."""
        return self.terms.masks != self.terms.context

    def requests(self) -> dict[str, tuple[Signed, ...]]:
        """For each site of U1: the adverts of U1, in the order of their sites' names."""
        # C2.1
        adverts = tuple(self.adverts[site][0] for site in self.sites)
        return dict.fromkeys(self.sites, adverts)

    def receive(self, site: str, payload: tuple[EncryptedShare, ...]) -> "Sharing":
        """Takes one share for each other site of U1.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `wrong-sender` or
                `wrong-recipient`.
        """
        self._expect(site)
        # C2.2
        check_recipients(payload, site, self.sites)
        return replace(self, answers={**self.answers, site: payload})

    def close(self) -> "Masking":
        """Ends stage 2, with the sites that answered.

        Raises:
            RoundAborted: `too-few-shares`.
        """
        # C2.3
        self._require_answers("too-few-shares", self.terms.least)
        return Masking(
            self.terms,
            self.answered,
            {},
            adverts={site: self.adverts[site][1] for site in self.answered},
            shares=dict(self.answers),
            total=RunningSum(self.terms.ring_bits, self.terms.length),
        )


@dataclass(frozen=True)
class Masking(Stage[None]):
    """Waits for U2's masked vectors, and adds them up as they come."""

    adverts: Mapping[str, KeyAdvert]
    shares: Mapping[str, tuple[EncryptedShare, ...]]
    total: RunningSum
    unseen: tuple[Signed, ...] | None = None
    """The adverts of U1, in the order of their sites' names, which the sites of a prepared attempt
    have not seen; None in any other."""

    def requests(self) -> dict[str, tuple[EncryptedShare, ...]]:
        """For each site of U2: the shares that the others of U2 made for it."""
        # C3.1
        inbox: dict[str, list[EncryptedShare]] = {site: [] for site in self.sites}
        for sender in self.sites:
            for share in self.shares[sender]:
                if share.recipient in inbox:
                    inbox[share.recipient].append(share)
        return {site: tuple(shares) for site, shares in inbox.items()}

    def receive(self, site: str, payload: bytes | memoryview) -> "Masking":
        """Adds a masked vector, little-endian, to the running sum; this stage is then stale.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer` or `vector-length`.
            LocalProtocolError: `stale-stage`.
        """
        self._expect(site)
        # C3.2
        self.total.add(payload, count=len(self.answers))
        return replace(self, answers={**self.answers, site: None})

    def close(self) -> "Confirming":
        """Ends stage 3, with the sites that answered.

        Raises:
            RoundAborted: `too-few-vectors`.
        """
        # C3.3
        self._require_answers("too-few-vectors", self.terms.least)
        return Confirming(
            self.terms,
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
    """The sites of U2 that are not in U3, sorted."""
    total: RunningSum

    def requests(self) -> dict[str, tuple[str, ...]]:
        """For each site of U3: the sorted names of U3."""
        # C4.1
        return dict.fromkeys(self.sites, self.sites)

    def receive(self, site: str, payload: SurvivorSignature) -> "Confirming":
        """Takes a signature over the survivor set.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `wrong-sender`,
                `not-a-survivor`, `pinned-signature`, `malformed-message`, `other-context` or
                `other-survivors`.
        """
        self._expect(site)
        # C4.2
        require(
            payload.site == site,
            "wrong-sender",
            "a site sent another's signature",
            found=payload.site,
            accepted=site,
        )
        check_confirmation(payload, self.terms.context, self.sites, self.terms.roster)
        return replace(self, answers={**self.answers, site: payload})

    def close(self) -> "Unmasking":
        """Ends stage 4, with the sites that answered.

        Raises:
            RoundAborted: `too-few-confirmations`.
        """
        # C4.3
        self._require_answers("too-few-confirmations", self.terms.threshold)
        return Unmasking(
            self.terms,
            self.answered,
            {},
            survivors=self.sites,
            # No more than prove the set, since each costs every site a verification.
            signatures=tuple(self.answers[site] for site in self.answered[: self.terms.threshold]),
            adverts=self.adverts,
            dropped=self.dropped,
            total=self.total,
        )


@dataclass(frozen=True)
class Unmasking(Stage[tuple[RevealedShare, ...]]):
    """Waits for U4's shares of U2's secrets."""

    survivors: tuple[str, ...]
    """The sites of U3, sorted."""
    signatures: tuple[SurvivorSignature, ...]
    adverts: Mapping[str, KeyAdvert]
    dropped: tuple[str, ...]
    total: RunningSum

    def requests(self) -> dict[str, tuple[SurvivorSignature, ...]]:
        """For each site of U4: as many signatures over U3 as the threshold, sorted by site."""
        # C5.1
        return dict.fromkeys(self.sites, self.signatures)

    def receive(self, site: str, payload: tuple[RevealedShare, ...]) -> "Unmasking":
        """Takes one share for each site of U2, of the kind that its fate calls for.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `revealed-shares` or
                `share-range`.
        """
        self._expect(site)
        # C5.2
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
        """The sum over U3. The running sum is handed over, so this stage closes once.

        Raises:
            RoundAborted: `too-few-reveals`, `seed-commitment` or `mask-key`.
            LocalProtocolError: `stale-stage`.
        """
        # C5.3
        self._require_answers("too-few-reveals", self.terms.threshold)
        # C5.4
        total = self.total.take(count=len(self.survivors))
        # C5.5, C5.6
        wrong_shares = unmask(total, self._secrets())
        return Aggregate(survivors=self.survivors, total=total, wrong_shares=wrong_shares)

    def _secrets(self) -> Secrets:
        points = {site: self.terms.header.cohort.index(site) + 1 for site in self.answered}
        shares: dict[str, dict[int, bytes]] = {owner: {} for owner in self.adverts}
        for site, point in points.items():
            for share in self.answers[site]:
                shares[share.owner][point] = share.share
        return Secrets(
            context=self.terms.context,
            masks=self.terms.masks,
            adverts=self.adverts,
            threshold=self.terms.threshold,
            sites={point: site for site, point in points.items()},
            seed_shares={owner: shares[owner] for owner in self.survivors},
            key_shares={owner: shares[owner] for owner in self.dropped},
        )


def open_attempt(
    header: RoundHeader,
    roster: Roster,
    threshold: int,
    ring_bits: int,
    length: int,
    *,
    least: int | None = None,
    prepared: Prepared | Filling | None = None,
) -> Advertising:
    """A new attempt, waiting for the keys of the header's cohort.

    Args:
        threshold: fewest sites that must answer each stage; shares that recover a secret.
        ring_bits: 16 or 32.
        length: elements of each masked vector.
        least: fewest sites whose vectors may be in the sum; None: the threshold.
        prepared: what the cohort prepared for this attempt; `Filling` where not all of it came.

    Raises:
        IdentityError: a site of the cohort is not in the roster.
        LocalProtocolError: `threshold` where the cohort cannot reach it; `slot` where another
            attempt was prepared.
    """
    # C0.0
    for site in header.cohort:
        roster.member(site)
    least = max(threshold, least or threshold)
    if not 2 <= threshold <= least <= len(header.cohort):
        raise LocalProtocolError(
            "threshold",
            "a cohort cannot be aggregated with this threshold",
            found=threshold if least == threshold else f"{threshold}, at least {least} in the sum",
            accepted=f"2 to {len(header.cohort)}",
        )
    if prepared is not None and prepared.preparation != preparation_of(header):
        raise LocalProtocolError("slot", "an attempt is opened with what another one prepared")
    context = header.context()
    terms = Terms(header, context, roster, threshold, least, ring_bits, length, masks=context)
    return Advertising(terms, header.cohort, {}, prepared)
