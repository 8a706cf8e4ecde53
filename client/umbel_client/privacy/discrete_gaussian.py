"""Integer noise: the discrete Gaussian distribution, decided by integers alone.

An integer z has probability proportional to exp(-z^2 / (2 s^2)), for a scale s = 2^bits.

1. An integer x of at least 0 is drawn from the discrete Gaussian of scale 16, by a table of 192
   bits for each probability.
2. With k = s / 16, an integer y below k is drawn uniformly, and z = k x + y is kept with
   probability exp(-y (y + 2 k x) / (2 s^2)) (Ducas, Durmus, Lepoint and Lyubashevsky 2013, "Lattice
   Signatures and Bimodal Gaussians", algorithms 11 and 12). The toss is that of Canonne, Kamath and
   Steinke (2020, "The Discrete Gaussian for Differential Privacy", algorithm 1). Its fractions have
   powers of two below them, so nothing is rounded.
3. z takes a sign. A negative zero is not kept: zero would have twice its probability.

The table ends at 254, and its probabilities are those of 192 bits: a draw differs from the discrete
Gaussian by less than 2^-179 in total variation.

This module is part of the core of the privacy guarantee. Never add or change here:

- A floating-point number: no probability, threshold or draw is one.
- A limit to the number of tosses, or a value in the place of a draw that takes long.
- Words from another source than `NoiseSource`, or a bit that decides two things.
"""

from bisect import bisect_right
from decimal import Decimal, localcontext
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from umbel_client.privacy.noise import NoiseSource

FEWEST_BITS = 4
MOST_BITS = 24

Words = npt.NDArray[np.uint64]
Draws = npt.NDArray[np.int64]

_AT_ONCE = 1 << 14
"""Proposals that are made at once: their words fit into the cache."""
_BASE_BITS = 4
"""The table's scale is 2^4."""
_LARGEST = 254
"""Largest number of the table: with a larger one, the fraction of a toss could be above one."""
_TABLE_WORDS = 3


def _table() -> list[int]:
    """For each number of the table, the probability of it or a smaller one, in 2^-192."""
    with localcontext() as context:
        context.prec = 90
        weights = [(Decimal(-x * x) / (2 << 2 * _BASE_BITS)).exp() for x in range(_LARGEST + 1)]
        total, scale = sum(weights), Decimal(1 << 64 * _TABLE_WORDS)
        return [int(part * scale / total) for part in accumulate(weights[:-1])]


_TABLE = _table()
_FIRST_WORDS = np.array([entry >> 64 * (_TABLE_WORDS - 1) for entry in _TABLE], dtype=np.uint64)


class DiscreteGaussian:
    """Independent draws from the discrete Gaussian of one scale."""

    def __init__(self, source: NoiseSource, bits: int) -> None:
        """Draws with the scale s = 2^bits.

        Raises:
            ValueError: `bits` is not between `FEWEST_BITS` and `MOST_BITS`.
        """
        if not FEWEST_BITS <= bits <= MOST_BITS:
            raise ValueError(f"bits must be between {FEWEST_BITS} and {MOST_BITS}")
        self._words = source.words
        self._bits = bits

    def draw(self, size: int) -> Draws:
        """Independent draws, int64[size]."""
        draws = np.empty(size, dtype=np.int64)
        self.fill(draws)
        return draws

    def fill(self, draws: Draws) -> None:
        """Writes independent draws into an array, int64[n], in the order in which they are made."""
        done = 0
        while done < len(draws):
            found = self._proposed(min(_AT_ONCE, len(draws) - done))
            draws[done : done + len(found)] = found
            done += len(found)

    def _proposed(self, count: int) -> Draws:
        """At most `count` draws: those of as many proposals that are kept."""
        # 1. The table's number.
        x = self._from_table(count)
        # 2. The low bits, and the toss.
        low = self._bits - _BASE_BITS
        words = self._words(count)
        y = words & np.uint64((1 << low) - 1)
        magnitudes = (x << np.uint64(low)) + y
        kept = self._toss_exp(y * (magnitudes + (x << np.uint64(low))), 2 * self._bits + 1)
        # 3. The sign, by a bit above those of y.
        negative = words >> np.uint64(63) == 1
        kept &= ~(negative & (magnitudes == 0))
        signed = magnitudes.astype(np.int64)
        np.negative(signed, out=signed, where=negative)
        draws: Draws = signed[kept]
        return draws

    def _from_table(self, count: int) -> Words:
        """Draws of the discrete Gaussian of scale 16 that are at least 0, uint64[count]."""
        words = self._words(count)
        found = np.searchsorted(_FIRST_WORDS, words, side="left")
        # A word that begins as an entry does leaves open which is larger: more words decide.
        equal = found < np.searchsorted(_FIRST_WORDS, words, side="right")
        for place in np.flatnonzero(equal):
            whole = int(words[place])
            for word in self._words(_TABLE_WORDS - 1).tolist():
                whole = whole << 64 | word
            found[place] = bisect_right(_TABLE, whole)
        return found.astype(np.uint64)

    def _toss_exp(self, numerators: Words, bits: int) -> npt.NDArray[np.bool_]:
        """Tosses of the probabilities exp(-numerator / 2^bits), bool[n].

        The k-th coin has the probability numerator / 2^bits / k. The first that fails is an odd
        one with probability exp(-numerator / 2^bits).

        Args:
            numerators: at most 2^bits.
        """
        succeeded = np.zeros(len(numerators), dtype=bool)
        going = np.arange(len(numerators))
        mask = np.uint64((1 << bits) - 1)
        k = 1
        while len(going):
            on = (self._words(len(going)) & mask) < numerators[going]
            if k > 1:
                first = np.flatnonzero(on)
                on[first] = self._toss_one_in(k, len(first))
            if k % 2:
                succeeded[going[~on]] = True
            going = going[on]
            k += 1
        return succeeded

    def _toss_one_in(self, k: int, count: int) -> npt.NDArray[np.bool_]:
        """Tosses of the probability 1 / k, bool[count]."""
        words = self._words(count)
        # Words above the last multiple of k would make some remainders likelier.
        past = np.uint64((1 << 64) // k * k - 1)
        again = np.flatnonzero(words > past)
        if len(again):
            words = words.copy()
            while len(again):
                words[again] = self._words(len(again))
                again = again[words[again] > past]
        hits: npt.NDArray[np.bool_] = words % np.uint64(k) == 0
        return hits
