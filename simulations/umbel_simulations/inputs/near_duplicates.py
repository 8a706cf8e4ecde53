"""Finds texts that nearly repeat another text, so that a test asks for more than memory.

Two texts are compared as sets of words, by their Jaccard similarity: the number of shared words
divided by the number of all their words. Two sets with a similarity of at least t share a word
among the rarest (1 - t) of either set (prefix filtering, Chaudhuri et al. 2006), so only few pairs
have to be compared.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence


def nearly_repeated(texts: Sequence[str], others: Sequence[str], share: float) -> list[bool]:
    """For each text, whether one of the others is at least this similar.

    Args:
        share: the similarity that counts as a repetition: above 0, at most 1.
    """
    ours, theirs = [_words(text) for text in texts], [_words(text) for text in others]
    counts = Counter(word for words in theirs for word in words)
    having: dict[str, list[int]] = defaultdict(list)
    for number, words in enumerate(theirs):
        for word in _rarest(words, counts, share):
            having[word].append(number)
    return [
        any(
            len(words & theirs[number]) >= share * len(words | theirs[number])
            for number in {n for word in _rarest(words, counts, share) for n in having[word]}
        )
        for words in ours
    ]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


def _rarest(words: frozenset[str], counts: Counter[str], share: float) -> list[str]:
    """The rarest words: a set without any of them has a similarity below `share`."""
    ordered = sorted(words, key=lambda word: (counts[word], word))
    # Subtracted, so that a rounding error cannot cost a word.
    return ordered[: len(ordered) - math.ceil(share * len(ordered) - 1e-9) + 1]
