"""Randomness of differential privacy: Gaussian noise and Poisson batches from AES-256-CTR.

The key is 32 bytes of injected entropy, fresh for each source, so that a restart never repeats a
draw.

This module is part of the core of the privacy guarantee. Never add or change here:

- A seed, a stored key, or a draw that can be repeated.
- Draws from torch's or NumPy's generators. Torch's holds 32 bits of seed on a CPU, and both are
  shared with every library of the process, which may set the seed again.
- Another distribution, or fewer bits: the accountant's theorems are about these.
"""

import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from umbel_common.canonical import Entropy

_BLOCK = 1 << 16
"""Numbers drawn at once: half a megabyte of words fits into the cache."""


class NoiseSource:
    """One key stream; not thread-safe, and of the process that made it."""

    def __init__(self, entropy: Entropy) -> None:
        """Takes 32 bytes of `entropy` as its key."""
        # A zero counter block is safe: the key is used for this one stream.
        self._stream = Cipher(AES(entropy(32)), CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    def normal(self, size: int) -> npt.NDArray[np.float64]:
        """Independent standard normal draws, float64[size], by Box and Muller's method (1958).

        Uniform values have 52 bits, so no draw is further than 8.6 from zero. A Gaussian draw is
        with probability 1e-17.
        """
        draws = np.empty(size + size % 2)
        self.fill(draws)
        return draws[:size]

    def fill(self, draws: npt.NDArray[np.float64]) -> None:
        """Writes draws as those of `normal` into an array of even length, float64[n]."""
        for start in range(0, len(draws), _BLOCK):
            block = draws[start : start + _BLOCK]
            half = len(block) // 2
            radius = np.sqrt(-2.0 * np.log(self._uniform(half)))
            # Sine and cosine of twice an angle come from its tangent: NumPy's own take three times
            # as long. The largest tangent is 1.6e16, and its square is far from overflow.
            tangent = np.tan(np.pi * self._uniform(half))
            square = tangent * tangent
            radius /= 1.0 + square
            np.multiply(radius, 1.0 - square, out=block[:half])
            np.multiply(radius, 2.0 * tangent, out=block[half:])

    def poisson_batch(self, records: int, rate: float) -> npt.NDArray[np.int64]:
        """Draws a batch that holds each record (or unit) independently with probability `rate`.

        Each decision compares 64 bits, so its bias is below 2**-64.

        Args:
            records: how many there are.
            rate: the sampling rate.

        Returns:
            The indices of the batch in rising order, int64[n].
        """
        words = self.words(records)
        if rate >= 1.0:
            return np.arange(records, dtype=np.int64)
        return np.flatnonzero(words < np.uint64(int(rate * 2.0**64))).astype(np.int64)

    def _uniform(self, size: int) -> npt.NDArray[np.float64]:
        """Uniform values in the open interval (0, 1), exact multiples of 2**-53."""
        return ((self.words(size) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def words(self, size: int) -> npt.NDArray[np.uint64]:
        """Independent uniform words, uint64[size]; read-only."""
        if os.getpid() != self._process:
            # Parent and child would draw the same numbers.
            raise RuntimeError(
                "a source of noise is used in a process that was forked from its own"
            )
        return np.frombuffer(self._stream.update(bytes(8 * size)), dtype="<u8")
