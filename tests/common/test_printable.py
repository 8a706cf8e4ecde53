"""What other parties wrote, as characters and nothing else."""

import json

import pytest

from umbel_common.printable import is_printable, one_line, printable, printable_json

HIDDEN = {
    "escape": "\x1b",
    "carriage return": "\r",
    "next line": "\x85",
    "control sequence introducer": "\x9b",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "right-to-left override": "\u202e",
    "isolate": "\u2066",
    "Arabic letter mark": "\u061c",
    "zero-width space": "\u200b",
    "zero-width joiner": "\u200d",
    "word joiner": "\u2060",
    "soft hyphen": "\u00ad",
    "byte order mark": "\ufeff",
    "no-break space": "\u00a0",
    "tag": "\U000e0041",
    "variation selector": "\ufe0f",
    "grapheme joiner": "\u034f",
    "Hangul filler": "\u3164",
    "lone surrogate": "\ud800",
    "tab": "\t",
    "delete": "\x7f",
}


@pytest.mark.parametrize("character", HIDDEN.values(), ids=HIDDEN.keys())
def test_what_is_not_seen_is_written_out(character: str) -> None:
    shown = printable(f"mini{character}lm")
    assert shown.isascii()
    assert shown.startswith("mini\\")
    assert shown.endswith("lm")
    assert not is_printable(character)


def test_what_is_printable_stays_as_it_is() -> None:
    for text in ("Zürich ≤ 3\n  field: a[0]", "emilyalsentzer/Bio_ClinicalBERT", "東京 حمى 🙂"):
        assert printable(text) == text
        assert printable(printable(text)) == printable(text)


def test_one_line_has_no_second_line() -> None:
    assert one_line("a\nerror: b\r\u2028c") == "a\\nerror: b\\r\\u2028c"
    assert is_printable("a b")
    assert not is_printable("a\nb")


def test_json_means_the_same() -> None:
    value = {character: [character * 2, name] for name, character in HIDDEN.items()}
    shown = printable_json(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(shown) == value
    assert shown.replace("\n", "").isascii()
