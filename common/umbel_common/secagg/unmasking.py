"""The running sum of masked vectors, and the removal of what masks are left in it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from umbel_common.errors import LocalProtocolError, RemoteProtocolError, RoundAborted
from umbel_common.quantise import RingVector
from umbel_common.secagg.masking import add_masks, pairwise_key, self_mask_key
from umbel_common.secagg.messages import KeyAdvert
from umbel_common.secagg.primitives import commit, public_key
from umbel_common.secagg.shamir import recover


@dataclass(frozen=True)
class Aggregate:
    """What an attempt reveals."""

    survivors: tuple[str, ...]
    """The sites whose vectors are in the sum, sorted."""
    total: RingVector
    """Their sum in the ring, uint32[n] or uint16[n]."""


class RunningSum:
    """The sum of the masked vectors so far: the one thing that a coordinator changes in place."""

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
        if len(vector) != total.nbytes:
            raise RemoteProtocolError(
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
    """What the revealed shares must recover, and what it is checked against."""

    context: bytes
    adverts: Mapping[str, KeyAdvert]
    seed_shares: Mapping[str, Mapping[int, bytes]]
    """Survivor -> x-coordinate -> share of its self-mask seed."""
    key_shares: Mapping[str, Mapping[int, bytes]]
    """Dropped-out site -> x-coordinate -> share of its mask key."""

    def recover_seeds(self) -> dict[str, bytes]:
        """Raises:
        RoundAborted: `seed-commitment`, naming the site.
        """
        seeds = {site: recover(shares) for site, shares in self.seed_shares.items()}
        for site, seed in seeds.items():
            if commit(seed, self.context, site) != self.adverts[site].seed_commitment:
                raise _wrong_shares("seed-commitment", "self-mask seed", site)
        return seeds

    def recover_keys(self) -> dict[str, bytes]:
        """Raises:
        RoundAborted: `mask-key`, naming the site.
        """
        secrets = {site: recover(shares) for site, shares in self.key_shares.items()}
        for site, secret in secrets.items():
            if public_key(secret) != self.adverts[site].mask_key:
                raise _wrong_shares("mask-key", "mask key", site)
        return secrets


def left_over_masks(secrets: Secrets) -> tuple[list[bytes], list[bytes]]:
    """Keys of the masks to add to the sum and to subtract from it (figure 4, round 4).

    Each survivor's self-mask is subtracted. Between a survivor and a site that dropped out stands
    the survivor's half of the pairwise mask; pairs of survivors cancelled.

    Raises:
        RoundAborted: `seed-commitment` or `mask-key`.
    """
    context = secrets.context
    seeds, keys = secrets.recover_seeds(), secrets.recover_keys()
    to_add: list[bytes] = []
    to_subtract = [self_mask_key(seed, site, context) for site, seed in seeds.items()]
    for dropped, secret in keys.items():
        for survivor in seeds:
            peer_key = secrets.adverts[survivor].mask_key
            mask = pairwise_key(secret, dropped, peer_key, survivor, context)
            (to_subtract if survivor < dropped else to_add).append(mask)
    return to_add, to_subtract


def unmask(total: RingVector, secrets: Secrets) -> None:
    """Removes the masks that are left in a sum, in place.

    Raises:
        RoundAborted: `seed-commitment` or `mask-key`; `total` is then still masked.
    """
    to_add, to_subtract = left_over_masks(secrets)
    add_masks(total, added=to_add, subtracted=to_subtract)


def _wrong_shares(check: str, what: str, site: str) -> RoundAborted:
    return RoundAborted(
        check,
        f"the revealed shares do not recover the {what} that a site advertised",
        field=site,
        remedy="some site revealed, or this one handed out, a wrong share: retry, and leave this "
        "site out if it happens again",
    )
