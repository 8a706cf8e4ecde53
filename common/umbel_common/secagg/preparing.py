"""The server's side of preparing: a cohort's keys and shares for one attempt, before it begins.

::

    Preparing -> Filling -> Prepared, which `coordinator.open_attempt` takes

`receive` returns the same value with one more answer, or raises and leaves it as it was. What the
whole cohort did not prepare is not used: nobody is out of an attempt for it, and the attempt shares
its secrets when it comes (C2.1 of `coordinator`).

The law of this module: no clock, no file, no network, no randomness; and a check that every site
would make is made here first. Steps; a code in backquotes refuses an answer:

1. `Preparing`

   - R1.1 Open the keys under the identity that the roster pins: `malformed-message`,
     `not-in-cohort`, `not-in-roster`, `pinned-signature`, `other-context`; see that they are their
     sender's, for the first time: `wrong-sender`, `second-answer`.
   - R1.2 See that both keys are new to this attempt and not of small order: `duplicate-key`,
     `weak-key`.

2. `Filling`

   - R2.1 See that a site of the cohort sends its own shares, for the first time, one to each of its
     peers: `unexpected-site`, `second-answer`, `wrong-sender`, `wrong-recipient`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from umbel_common.errors import require
from umbel_common.secagg.checks import check_distinct_keys, check_recipients, open_prepared
from umbel_common.secagg.messages import EncryptedShare, KeyAdvert, Preparation, PreparedKeys
from umbel_common.secagg.primitives import ANY_KEY, agree
from umbel_common.trust.identity import Roster, Signed


@dataclass(frozen=True)
class Preparing:
    """Waits for the cohort's keys."""

    preparation: Preparation
    roster: Roster
    answers: Mapping[str, tuple[Signed, PreparedKeys]] = field(default_factory=dict)

    def receive(self, site: str, signed: Signed) -> "Preparing":
        """Takes a site's signed `PreparedKeys`.

        Raises:
            RemoteProtocolError: `malformed-message`, `not-in-cohort`, `not-in-roster`,
                `pinned-signature`, `other-context`, `wrong-sender`, `second-answer`,
                `duplicate-key` or `weak-key`.
        """
        # R1.1
        preparation = self.preparation
        keys = open_prepared(signed, preparation.context(), preparation.cohort, self.roster)
        require(
            keys.site == site,
            "wrong-sender",
            "a site sent another site's keys",
            found=keys.site,
            accepted=site,
        )
        require(site not in self.answers, "second-answer", "a site answers twice", field=site)
        # R1.2
        check_distinct_keys([*(known for _, known in self.answers.values()), keys])
        for key in (keys.cipher_key, keys.mask_key):
            agree(ANY_KEY, key, site)
        return replace(self, answers={**self.answers, site: (signed, keys)})

    def close(self) -> "Filling | None":
        """The next step; None where a site's keys are missing."""
        cohort = self.preparation.cohort
        if len(self.answers) < len(cohort):
            return None
        return Filling(
            self.preparation,
            tuple(self.answers[site][0] for site in cohort),
            {site: self.answers[site][1] for site in cohort},
        )


@dataclass(frozen=True)
class Filling:
    """Waits for the cohort's shares."""

    preparation: Preparation
    signed: tuple[Signed, ...]
    """The `PreparedKeys` of the cohort, in the order of its names: what each site is sent."""
    keys: Mapping[str, PreparedKeys]
    answers: Mapping[str, tuple[EncryptedShare, ...]] = field(default_factory=dict)

    def receive(self, site: str, shares: tuple[EncryptedShare, ...]) -> "Filling":
        """Takes one share for each other site of the cohort.

        Raises:
            RemoteProtocolError: `unexpected-site`, `second-answer`, `wrong-sender` or
                `wrong-recipient`.
        """
        # R2.1
        cohort = self.preparation.cohort
        require(site in cohort, "unexpected-site", "a site that was not asked answers", field=site)
        require(site not in self.answers, "second-answer", "a site answers twice", field=site)
        check_recipients(shares, site, cohort)
        return replace(self, answers={**self.answers, site: shares})

    def close(self) -> "Prepared | None":
        """What the cohort prepared; None where a site's shares are missing."""
        if len(self.answers) < len(self.preparation.cohort):
            return None
        return Prepared(self.preparation, self.keys, self.answers)


@dataclass(frozen=True)
class Prepared:
    """The keys and shares of a whole cohort for one attempt."""

    preparation: Preparation
    keys: Mapping[str, PreparedKeys]
    shares: Mapping[str, tuple[EncryptedShare, ...]]

    def has_keys_of(self, advert: KeyAdvert) -> bool:
        """Whether an advert has the keys that its site prepared."""
        keys = self.keys[advert.site]
        return (keys.cipher_key, keys.mask_key) == (advert.cipher_key, advert.mask_key)
