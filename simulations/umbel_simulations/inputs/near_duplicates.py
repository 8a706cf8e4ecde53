"""Which texts nearly repeat one of others, so that a test asks for more than memory.

Two texts are compared as sets of words, by what they share of all their words (Jaccard). Whoever
shares a part t of two sets' words shares one of the rarest (1 - t) of either (prefix filtering,
Chaudhuri et al. 2006), so that few pairs need a look.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence


def nearly_repeated(texts: Sequence[str], others: Sequence[str], share: float) -> list[bool]:
    """For each text, whether one of the others has at least `share` of the words of both.

    Args:
        share: above 0, at most 1.
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
    """As many that a set with none of them shares less."""
    ordered = sorted(words, key=lambda word: (counts[word], word))
    # A product that was rounded up must not cost a word.
    return ordered[: len(ordered) - math.ceil(share * len(ordered) - 1e-9) + 1]
