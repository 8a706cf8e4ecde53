"""The running sum of masked vectors, and the removal of the masks that are left in it.

The law: no mask is removed before every secret was checked. A revealed share carries no
authentication, but each secret has something that was signed: a seed its commitment, a mask key its
public half. So an attempt gives the right sum or no sum. `RunningSum` is steps C3.2 and C5.4 of
`coordinator`, `Secrets.recover` is C5.5, `unmask` is C5.5 and C5.6.

Wrong shares can only stop an attempt. With m sites that reveal and a threshold of t, this many may
lie without stopping it: (m - t) // 2 (Reed-Solomon decoding), or one where m = t + 1. Each secret
costs one decoding, O(m^2), and at most m recoveries, O(t) each.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from umbel_common.errors import LocalProtocolError, RoundAborted, require
from umbel_common.secagg.encoding import RingVector
from umbel_common.secagg.masking import add_masks, pairwise_key, self_mask_key
from umbel_common.secagg.messages import KeyAdvert
from umbel_common.secagg.primitives import commit, load, public_key
from umbel_common.secagg.shamir import Decoded, decode, recover


@dataclass(frozen=True)
class Aggregate:
    """What an attempt reveals."""

    survivors: tuple[str, ...]
    """The sites whose vectors are in the sum, sorted."""
    total: RingVector
    """Their sum in the ring, uint32[n] or uint16[n]."""
    wrong_shares: tuple["WrongShare", ...] = ()


@dataclass(frozen=True)
class WrongShare:
    """A share that `site` revealed of `owner`'s secret and that is not on the secret's polynomial.

    This is certain if at most (m - t) // 2 of the m shares of that secret are wrong, and it is
    known only where decoding was needed. One of the two sites lied, but not which: an owner can
    hand out a wrong share so that the honest peer that reveals it is suspected.
    """

    owner: str
    site: str


@dataclass(frozen=True)
class LostSecrets:
    """The owners of secrets that the revealed shares do not recover."""

    owners: tuple[str, ...]
    revealing: int
    threshold: int

    @property
    def tolerated(self) -> int:
        """Number of wrong shares of one secret that do not stop its recovery. If no more sites than
        that lied when they revealed, each of the owners handed out wrong shares."""
        spare = self.revealing - self.threshold
        return max(spare // 2, min(spare, 1))

    def __str__(self) -> str:
        return (
            f"{self.revealing} shares of each, more than {self.tolerated} wrong, "
            f"threshold {self.threshold}"
        )


class RunningSum:
    """The sum of the masked vectors so far: all that a coordinator changes in place."""

    def __init__(self, ring_bits: int, length: int) -> None:
        self._total: RingVector | None = np.zeros(length, dtype=f"<u{ring_bits // 8}")
        self._count = 0

    def add(self, vector: bytes | memoryview, *, count: int) -> None:
        """Adds one masked vector to a sum of `count`.

        Raises:
            RemoteProtocolError: `vector-length`.
            LocalProtocolError: `stale-stage`.
        """
        total = self._current(count)
        require(
            len(vector) == total.nbytes,
            "vector-length",
            "a masked vector has the wrong length",
            found=f"{len(vector)} bytes",
            accepted=f"{total.nbytes} bytes",
        )
        np.add(total, np.frombuffer(vector, dtype=total.dtype), out=total)
        self._count += 1

    def take(self, *, count: int) -> RingVector:
        """Hands over the sum of `count` vectors, once.

        Raises:
            LocalProtocolError: `stale-stage`.
        """
        total = self._current(count)
        self._total = None
        return total

    def _current(self, count: int) -> RingVector:
        if self._total is None or self._count != count:
            raise LocalProtocolError(
                "stale-stage", "a stage was used again after the one that followed it"
            )
        return self._total


@dataclass(frozen=True)
class Secrets:
    """What the revealed shares must recover, and what the secrets are checked against."""

    context: bytes
    masks: bytes
    """From what masks are derived, 32 bytes: the context, or `masking.prepared_mask_context`."""
    adverts: Mapping[str, KeyAdvert]
    threshold: int
    sites: Mapping[int, str]
    """x-coordinate -> the site that revealed the shares there."""
    seed_shares: Mapping[str, Mapping[int, bytes]]
    """Survivor -> x-coordinate -> share of its self-mask seed."""
    key_shares: Mapping[str, Mapping[int, bytes]]
    """Dropped-out site -> x-coordinate -> share of its mask key."""

    def recover(self) -> "Recovered":
        """The secrets, each checked.

        Raises:
            RoundAborted: `seed-commitment` or `mask-key`, with the `LostSecrets` as what was found.
        """
        seeds = self._recover(self.seed_shares, self._fits_seed)
        keys = self._recover(self.key_shares, self._fits_key)
        lost = [owner for owner, decoded in (seeds | keys).items() if decoded is None]
        if lost:
            is_seed = any(decoded is None for decoded in seeds.values())
            raise RoundAborted(
                "seed-commitment" if is_seed else "mask-key",
                "the revealed shares do not recover the secrets that sites advertised",
                field=", ".join(sorted(lost)),
                found=LostSecrets(tuple(sorted(lost)), len(self.sites), self.threshold),
                remedy="these sites handed out wrong shares, or several others revealed some: "
                "retry, and ask the sites' operators if it happens again",
            )
        known = {owner: decoded for owner, decoded in (seeds | keys).items() if decoded}
        return Recovered(
            seeds={owner: known[owner].secret for owner in seeds},
            keys={owner: known[owner].secret for owner in keys},
            wrong_shares=tuple(
                WrongShare(owner, self.sites[point])
                for owner, decoded in sorted(known.items())
                for point in decoded.wrong
            ),
        )

    def _recover(
        self,
        owners: Mapping[str, Mapping[int, bytes]],
        fits: Callable[[str, bytes], bool],
    ) -> dict[str, Decoded | None]:
        """Owner -> its secret; None where no choice of shares gives a secret that fits."""
        few = {owner: next(_choices(shares, self.threshold)) for owner, shares in owners.items()}
        secrets = {owner: recover(shares) for owner, shares in few.items()}
        if all(fits(owner, secret) for owner, secret in secrets.items()):
            return {owner: Decoded(secret, wrong=()) for owner, secret in secrets.items()}
        # Somebody lied. Every secret is decoded, so that all wrong shares become known and not only
        # those that were in the way.
        return {
            owner: _search(shares, self.threshold, partial(fits, owner))
            for owner, shares in owners.items()
        }

    def _fits_seed(self, site: str, seed: bytes) -> bool:
        return commit(seed, self.context, site) == self.adverts[site].seed_commitment

    def _fits_key(self, site: str, secret: bytes) -> bool:
        return public_key(secret) == self.adverts[site].mask_key


@dataclass(frozen=True)
class Recovered:
    """The secrets of an attempt, each checked."""

    seeds: Mapping[str, bytes]
    """Self-mask seeds of the survivors."""
    keys: Mapping[str, bytes]
    """Mask keys of the sites that dropped out."""
    wrong_shares: tuple[WrongShare, ...]


def _search(
    shares: Mapping[int, bytes], threshold: int, fits: Callable[[bytes], bool]
) -> Decoded | None:
    decoded = decode(shares, threshold)
    if decoded is not None and fits(decoded.secret):
        return decoded
    # With more wrong shares than that, the liars stay unknown, but a secret that fits is right.
    secrets = (recover(few) for few in _choices(shares, threshold))
    return next((Decoded(secret, wrong=()) for secret in secrets if fits(secret)), None)


def _choices(shares: Mapping[int, bytes], threshold: int) -> Iterator[dict[int, bytes]]:
    """Each run of `threshold` shares in a ring: with one share to spare, each is left out once."""
    ring = [*shares.items(), *shares.items()]
    for start in range(len(shares)):
        yield dict(islice(ring, start, start + threshold))


def left_over_masks(secrets: Recovered, attempt: Secrets) -> tuple[list[bytes], list[bytes]]:
    """Keys of the masks to add to the sum and to subtract from it (figure 4, round 4).

    Each survivor's self-mask is subtracted. For a survivor and a site that dropped out, the
    survivor's half of their pairwise mask is left; the masks of two survivors cancelled.
    """
    context = attempt.masks
    to_add: list[bytes] = []
    to_subtract = [self_mask_key(seed, site, context) for site, seed in secrets.seeds.items()]
    for dropped, secret in secrets.keys.items():
        key = load(secret)
        for survivor in secrets.seeds:
            peer_key = attempt.adverts[survivor].mask_key
            mask = pairwise_key(key, dropped, peer_key, survivor, context)
            (to_subtract if survivor < dropped else to_add).append(mask)
    return to_add, to_subtract


def unmask(total: RingVector, secrets: Secrets) -> tuple[WrongShare, ...]:
    """Removes the masks that are left in a sum, in place; returns the shares known to be wrong.

    Raises:
        RoundAborted: `seed-commitment` or `mask-key`; `total` is then still masked.
    """
    # C5.5
    recovered = secrets.recover()
    # C5.6
    to_add, to_subtract = left_over_masks(recovered, secrets)
    add_masks(total, added=to_add, subtracted=to_subtract)
    return recovered.wrong_shares
