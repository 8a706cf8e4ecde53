"""All texts that nearly repeat another one are found, and no others."""

import numpy as np
import pytest

from umbel_simulations.inputs.near_duplicates import nearly_repeated

KNOWN = [
    "A cone-shaped end of the bone of the second finger.",
    "An increased concentration of copper in the urine.",
]


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("A cone-shaped end of the bone of the fifth finger.", True),
        ("AN INCREASED CONCENTRATION, OF COPPER, IN THE BLOOD!", True),
        ("A rhythm of the heart that is too fast.", False),
        ("", False),
    ],
)
def test_one_word_changed_is_a_repetition(text: str, repeats: bool) -> None:
    assert nearly_repeated([text], KNOWN, 0.5) == [repeats]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.7, 1.0])
def test_no_pair_is_missed(share: float) -> None:
    random = np.random.default_rng(5)

    def made(count: int) -> list[str]:
        # Few words, so that many texts come near each other; the higher ones are rare.
        return [
            " ".join(f"w{int(number)}" for number in random.exponential(4, random.integers(1, 9)))
            for _ in range(count)
        ]

    texts, others = made(200), made(300)
    sets = [set(other.split()) for other in others]
    expected = [
        any(len(words & other) >= share * len(words | other) for other in sets)
        for words in (set(text.split()) for text in texts)
    ]
    assert 0 < sum(expected) < len(expected)
    assert nearly_repeated(texts, others, share) == expected
