"""Names that are different texts and look the same to people: labels, units, columns.

Programs keep `flu` and `flu ` apart; people do not. Two names are alike if they are equal without
the spaces around them, however many stand between words, without characters that nobody sees, in
one Unicode form and width, in one case, with one kind of hyphen and of apostrophe; or if they are
the same number.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal

from umbel_common.errors import PlanError
from umbel_common.plans.plan import Classification, Task

_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
_SELECTORS = frozenset(map(chr, range(0xFE00, 0xFE10)))
_AS_TYPED = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-")
    | dict.fromkeys("\u2018\u2019\u201b\u2032\u02bc\u00b4\u0060", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033", '"')
)
"""Hyphens, apostrophes and quotation marks that word processors put in place of those of a
keyboard."""


def seen(text: str) -> str:
    """A text in Unicode's composed form (NFC), one space between words, without characters
    that nobody sees, such as zero-width spaces."""
    if not (text.isascii() and text.isprintable()):
        text = unicodedata.normalize("NFC", text)
        text = "".join(sign for sign in text if not _is_unseen(sign))
    return " ".join(text.split())


def _is_unseen(sign: str) -> bool:
    category = unicodedata.category(sign)
    return sign in _SELECTORS or category == "Cf" or (category == "Cc" and not sign.isspace())


def folded(text: str) -> str:
    """As `seen`, and in one case and one width, with the hyphens and quotes of a keyboard."""
    text = unicodedata.normalize("NFKC", seen(text).translate(_AS_TYPED)).casefold()
    # A Turkish capital I has a dot, which its small letter keeps as a character of its own.
    return seen(text.replace("i\u0307", "i"))


def plain(name: str) -> object:
    """What two names have in common if they are alike."""
    text = folded(name)
    if _NUMBER.fullmatch(text):
        return Decimal(text.replace(",", "."))
    return text


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each name that looks like an earlier, different one: the earlier, and it."""
    first: dict[object, str] = {}
    pairs: dict[tuple[str, str], None] = {}
    for name in names:
        known = first.setdefault(plain(name), name)
        if known != name:
            pairs[known, name] = None
    return list(pairs)


_DIFFERENCES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("spaces", lambda name: " ".join(name.split())),
    (
        "how its accents are composed (Unicode NFC and NFD)",
        lambda name: unicodedata.normalize("NFC", name),
    ),
    ("characters that nobody sees", seen),
    ("hyphens, apostrophes or quotation marks", lambda name: name.translate(_AS_TYPED)),
    ("the width or form of its characters", lambda name: unicodedata.normalize("NFKC", name)),
    ("upper and lower case", str.casefold),
)


def difference(one: str, other: str) -> str:
    """In what two names that are alike differ, in words."""
    for words, as_one in _DIFFERENCES:
        if as_one(one) == as_one(other):
            return words
    if folded(one) != folded(other):
        return "how the same number is written"
    return "spaces, case, or the form of its characters"


def shown(name: str) -> str:
    """A name as it is shown: between quotes, with what nobody sees written out."""
    return repr(name) if seen(name) == name else ascii(name)


def told(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A phrase for each pair of names that are alike."""
    return [
        f"{shown(one)} and {shown(other)} differ only in {difference(one, other)}"
        for one, other in pairs
    ]


def check_labels(task: Task) -> None:
    """Refuses a new plan's labels that people would take for one another, and empty ones.

    A plan that is signed already keeps its labels: this is asked where a plan is made.

    Raises:
        PlanError: names the labels.
    """
    if not isinstance(task, Classification):
        return
    empty = next((label for label in task.labels if not seen(label)), None)
    if empty is not None:
        raise PlanError(
            "a label of a plan is empty",
            field="task.labels",
            found=shown(empty),
            accepted="labels that people can read",
            remedy='name what the label stands for, such as "none"',
        )
    pairs = alike(task.labels)
    if pairs:
        raise PlanError(
            "labels of a plan look alike",
            field="task.labels",
            found="; ".join(told(pairs)),
            accepted="labels that people can tell apart",
            remedy="keep one of them, and write it in the same way in every site's records",
        )
