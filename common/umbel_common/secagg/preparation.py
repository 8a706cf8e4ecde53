"""A site's side of preparing: keys and shares for one attempt, before its adapter is known.

::

    prepare -> Slot -> FilledSlot -> participant.Prepared

An attempt whose whole cohort prepared it begins with the keys and shares that are there: no stage
is spent on them. What an attempt promises does not change. Its masks are derived from its own
context, which has the adapter; every site's signature over that context, and the head of its
ledger, comes before any mask leaves (S2.1 of `participant`).

The law of this module:

- A slot is of one attempt: federation, job, round, attempt, plan, roster and cohort. It opens no
  other (`FilledSlot.advertise`).
- A slot is used once: its holder drops it before anything is signed (`Trainer`).
- A slot is never encoded, and cannot be (`sharing.Secrets`): no journal, backup or message has one,
  and a copy of a disk brings none back. The state that it leads to, `participant.Prepared`, is that
  of an open attempt, and is journaled as one.
- No clock, no file, no network; randomness comes from `entropy` alone.

Steps, in this order. A code in backquotes refuses the request, and stands in the step that makes
the check, before the steps that it guards.

1. `prepare`

   - P1.1 Hold the cohort against the site's own rules, as S1.1.
   - P1.2 Draw the secrets: cipher key, mask key, self-mask seed.
   - P1.3 Sign both public keys, with what they are prepared for.

2. `Slot.fill`

   - P2.1 Open the keys of each site under the identity that the roster pins:
     `malformed-message`, `not-in-cohort`, `not-in-roster`, `pinned-signature`, `other-context`.
     Guards P2.5: shares only for keys that a site of the cohort prepared for this attempt.
   - P2.2 Refuse what occurs twice: `duplicate-site`, `duplicate-key`. Guards P2.5.
   - P2.3 Find this site's own keys as it signed them: `own-advert`. Guards P2.5.
   - P2.4 See that the whole cohort is there: `too-few-adverts`. Guards P2.5: a site that is
     missing would be without shares in the attempt.
   - P2.5 Split the seed and the mask key into one share of each for each site.
   - P2.6 Agree on keys with each peer, and seal its two shares for it: `weak-key`.

3. `FilledSlot.advertise`

   - P3.1 See that the attempt is the one that was prepared: `slot`, a fault of our own code.
   - P3.2 Sign the advert as in S1.3: the prepared keys, over the attempt's own context, with a
     commitment to the seed and the ledger's head.
"""

from dataclasses import dataclass

from umbel_common.canonical import Entropy
from umbel_common.errors import LocalProtocolError, require
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg.checks import check_distinct_keys, open_prepared
from umbel_common.secagg.messages import (
    EncryptedShare,
    Preparation,
    PreparedKeys,
    preparation_of,
)
from umbel_common.secagg.participant import Prepared, PreparedPeer, advertised
from umbel_common.secagg.primitives import public_key
from umbel_common.secagg.rules import Rules, check_distinct
from umbel_common.secagg.sharing import Secrets, share_secrets
from umbel_common.trust.identity import Identity, Roster, Signed, sign


def prepare(
    preparation: Preparation, site: str, rules: Rules, identity: Identity, entropy: Entropy
) -> tuple["Slot", Signed]:
    """Step 1: fresh keys for the attempt that `preparation` names, and their signed public halves.

    Raises:
        RemoteProtocolError: `not-in-cohort`, `cohort-too-small`, `threshold-too-high` or
            `threshold-too-low`.
    """
    # P1.1
    rules.check_cohort(preparation.cohort, site)
    # P1.2
    secrets = Secrets.drawn(entropy)
    # P1.3
    keys = sign(
        identity,
        PreparedKeys(
            context=preparation.context(),
            site=site,
            cipher_key=public_key(secrets.cipher_secret),
            mask_key=public_key(secrets.mask_secret),
        ),
    )
    return Slot(preparation, site, rules, keys, secrets), keys


# No generated repr: it would write secrets into whatever log a slot is printed to.
@dataclass(frozen=True, repr=False, eq=False)
class Slot:
    """Step 1 is done: the keys of one attempt are out."""

    preparation: Preparation
    site: str
    rules: Rules
    keys: Signed
    """This site's own `PreparedKeys`."""
    secrets: Secrets

    def fill(
        self, prepared: tuple[Signed, ...], roster: Roster, entropy: Entropy
    ) -> tuple["FilledSlot", tuple[EncryptedShare, ...]]:
        """Step 2: verifies the cohort's keys, and shares both secrets with its sites.

        Raises:
            RemoteProtocolError: `malformed-message`, `not-in-cohort`, `pinned-signature`,
                `other-context`, `not-in-roster`, `duplicate-site`, `duplicate-key`, `own-advert`,
                `too-few-adverts` or `weak-key`.
        """
        cohort, context = self.preparation.cohort, self.preparation.context()
        # P2.1
        opened = [open_prepared(keys, context, cohort, roster) for keys in prepared]
        # P2.2
        check_distinct([keys.site for keys in opened])
        check_distinct_keys(opened)
        # P2.3
        require(
            self.keys in prepared,
            "own-advert",
            "the prepared keys of this site are missing or altered",
            field=self.site,
        )
        # P2.4
        missing = tuple(sorted(set(cohort) - {keys.site for keys in opened}))
        require(
            not missing,
            "too-few-adverts",
            "an attempt is prepared without some of its sites",
            found=missing,
            accepted="the keys of the whole cohort",
        )
        # P2.5, P2.6
        shared = share_secrets(
            self.secrets,
            self.site,
            [(keys.site, keys.cipher_key) for keys in opened if keys.site != self.site],
            cohort,
            context,
            self.rules.threshold,
            entropy,
        )
        peers = tuple(
            PreparedPeer(
                peer=keys.site,
                cipher_key=keys.cipher_key,
                mask_key=keys.mask_key,
                opening_key=shared.opening_keys[keys.site],
            )
            for keys in opened
            if keys.site != self.site
        )
        return FilledSlot(self, peers, shared.own_share), shared.messages


@dataclass(frozen=True, repr=False, eq=False)
class FilledSlot:
    """Step 2 is done: the peers' shares of this site's secrets are out."""

    slot: Slot
    peers: tuple[PreparedPeer, ...]
    own_share: bytes

    @property
    def preparation(self) -> Preparation:
        """The attempt that this slot is for."""
        return self.slot.preparation

    def advertise(
        self, header: RoundHeader, identity: Identity, ledger_head: bytes
    ) -> tuple[Prepared, Signed]:
        """Step 3: the signed advert of the prepared keys. The caller has dropped this slot.

        Args:
            header: of the attempt that was prepared.
            ledger_head: 32 bytes, the head of the site's ledger after the round was reserved.

        Raises:
            LocalProtocolError: `slot`.
        """
        slot = self.slot
        # P3.1
        if preparation_of(header) != slot.preparation:
            raise LocalProtocolError("slot", "a slot was used for an attempt that is not its own")
        # P3.2
        plain, advert = advertised(
            slot.secrets, header, slot.site, slot.rules, identity, ledger_head
        )
        state = Prepared(
            context=plain.context,
            site=slot.site,
            rules=slot.rules,
            advertised=plain,
            preparation=slot.preparation.context(),
            peers=self.peers,
            own_share=self.own_share,
        )
        return state, advert
