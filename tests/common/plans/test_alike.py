"""Names that people take for one another, and how they differ."""

import pytest

from umbel_common.errors import PlanError
from umbel_common.plans.alike import alike, check_labels, difference, folded, shown, told
from umbel_common.plans.plan import CausalLm, Classification

PAIRS = {
    "spaces": [("flu", "flu "), ("flu", "\tflu"), ("no  flu", "no flu"), ("a\u00a0b", "a b")],
    "accents": [("M\u00fcde", "Mu\u0308de")],
    "case": [("Flu", "fLU"), ("stra\u00dfe", "STRASSE"), ("di\u015f", "D\u0130\u015e")],
    "nobody sees": [
        ("flu", "fl\u200bu"),
        ("flu", "\ufeffflu"),
        ("flu", "flu\x07"),
        ("a", "a\ufe0f"),
    ],
    "hyphens": [
        ("covid-19", "covid\u201119"),
        ("a-b", "a\u2013b"),
        ("Crohn's", "Crohn\u2019s"),
        ('"no"', "\u201eno\u201c"),
    ],
    "form": [("flu", "\uff46\uff4c\uff55"), ("1", "\uff11"), ("fi", "\ufb01")],
    "number": [("1", "1.0"), ("1", "01"), ("1,50", "1.5"), ("1", "\u0661")],
}


@pytest.mark.parametrize("kind", PAIRS)
def test_names_that_look_alike_are_found_with_their_difference(kind: str) -> None:
    for one, other in PAIRS[kind]:
        assert alike([one, "another", other, one]) == [(one, other)]
        assert kind in difference(one, other)
        (words,) = told([(one, other)])
        assert words.isascii() or one not in (other, shown(one))
        with pytest.raises(PlanError, match="look alike") as caught:
            check_labels(Classification(labels=(one, "another", other)))
        assert caught.value.field == "task.labels"


def test_several_differences_at_once() -> None:
    assert alike(["Flu", " \uff46lu\u200b"]) == [("Flu", " \uff46lu\u200b")]
    assert difference("Flu", " \uff46lu\u200b") == "spaces, case, or the form of its characters"


def test_names_that_people_tell_apart_are_let_be() -> None:
    labels = ("1", "2", "1 2", "12", "1E2", "100", "a-b", "ab", "M\u00fcde", "Mude", "\u65e5")
    assert alike(labels) == []
    check_labels(Classification(labels=labels))
    check_labels(CausalLm())
    assert folded("  A \n b ") == "a b"


@pytest.mark.parametrize("label", ["", " ", "\u200b", "\n"])
def test_a_plans_label_may_not_be_empty(label: str) -> None:
    with pytest.raises(PlanError, match="empty"):
        check_labels(Classification(labels=("flu", label)))
