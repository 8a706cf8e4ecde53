"""Texts that another party wrote, as characters and nothing else.

The law: no character that passes here moves a cursor, changes the order of the characters beside
it, or takes no place. Whatever is printed, logged or written for people passes here.
"""

import json
import re
from collections.abc import Callable

_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
"""Fillers and selectors, which show nothing and which Python counts as printable all the same."""


def printable(text: str) -> str:
    """`text` with every character written out that is not seen where it stands.

    These are control characters, separators of lines and paragraphs, marks of direction, characters
    without a width, and spaces other than the plain one. A line feed stays.
    """
    return _written(text, lambda character: ascii(character)[1:-1])


def one_line(text: str) -> str:
    """Like `printable`, also without line feeds: no part of it looks like a line of ours."""
    return printable(text).replace("\n", "\\n")


def printable_json(text: str) -> str:
    """JSON that means the same, with what is not printable in its strings written out."""
    return _written(text, lambda character: json.dumps(character)[1:-1])


def is_printable(text: str) -> bool:
    """Whether `one_line` leaves `text` as it is."""
    return one_line(text) == text


def _written(text: str, write: Callable[[str], str]) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if _is_seen(one) else write(one) for one in text)


def _is_seen(character: str) -> bool:
    return character == "\n" or (character.isprintable() and not _BLANK.match(character))
