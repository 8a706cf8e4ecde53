"""An attacker's arithmetic: it recovers secrets and removes masks."""

from collections.abc import Mapping

import numpy as np

from umbel_common.canonical import decode
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg import masking
from umbel_common.secagg.encoding import RingVector
from umbel_common.secagg.messages import KeyAdvert, RevealedShare
from umbel_common.secagg.primitives import load
from umbel_common.secagg.shamir import recover
from umbel_server.aggregation.attempt import Attempt


def keys_of(attempt: Attempt) -> dict[str, KeyAdvert]:
    """The advert of each site of U1."""
    adverts = [decode(signed.statement, KeyAdvert) for signed in attempt.evidence.adverts]
    return {advert.site: advert for advert in adverts}


def masks_of(attempt: Attempt, header: RoundHeader | None = None) -> bytes:
    """From what the masks of an attempt are derived, at a site that was shown `header`."""
    context = (header or attempt.header).context()
    terms = attempt.machine.terms
    if terms.masks == terms.context:
        return context
    return masking.prepared_mask_context(context, attempt.evidence.adverts)


def secret_of(
    owner: str, kind: str, header: RoundHeader, revealed: Mapping[str, tuple[RevealedShare, ...]]
) -> bytes:
    """The secret of one site, from the shares that others revealed; noise if there are too few."""
    return recover(
        {
            header.cohort.index(site) + 1: share.share
            for site, shares in revealed.items()
            for share in shares
            if (share.owner, share.kind) == (owner, kind)
        }
    )


def remove_masks(
    context: bytes,
    keys: Mapping[str, KeyAdvert],
    vectors: list[bytes],
    *,
    seeds: Mapping[str, bytes],
    secrets: Mapping[str, bytes],
) -> RingVector:
    """The sum of the masked vectors of the sites in `seeds`, without masks.

    Args:
        context: from what the masks are derived (`masks_of`), 32 bytes.
        keys: adverts of the sites between which masks were made.
        seeds: the self-mask seed of each site in the sum.
        secrets: mask keys, at least one for each two sites of which one is in the sum.
    """
    total = np.zeros(len(vectors[0]) // 4, dtype="<u4")
    for vector in vectors:
        total += np.frombuffer(vector, dtype="<u4")
    added, subtracted = (
        [],
        [masking.self_mask_key(seed, site, context) for site, seed in seeds.items()],
    )
    for site in seeds:
        for other in keys.keys() - seeds.keys():
            ours, theirs = (site, other) if site in secrets else (other, site)
            mask = masking.pairwise_key(
                load(secrets[ours]), ours, keys[theirs].mask_key, theirs, context
            )
            (subtracted if site < other else added).append(mask)
    masking.add_masks(total, added=added, subtracted=subtracted)
    return total
