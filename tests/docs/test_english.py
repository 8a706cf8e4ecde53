"""What people read is plain English: no sentence starts with a word that refers to nothing."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "client", "server", "simulations")
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

DANGLING = re.compile(r"(?:^|[.!?]\s+|:\s+)(?:Of|Whose|In which|By so|By how)\b")
"""A sentence that starts so has its subject in another one."""
DANGLING_THAT = re.compile(r"^That (?!is |was |means )")
"""A text that starts with a clause instead of its noun."""
UNIDIOMATIC = re.compile(
    r"\b(?:[Ww]homever|[Ww]hoever|(?:is|are|was|were) none\b(?! of)|of then\b|so many\b"
    r"|(?:goes|going|went) on\b|go on (?:with|from|after|until)\b|anew\b)"
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring, message and comment of a module."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, " ".join(node.value.split())
    block: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            block.append((token.start[0], token.string.lstrip("# ")))
        elif token.type != tokenize.NL and block:
            yield block[0][0], " ".join(text for _, text in block)
            block = []


def paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every paragraph of a page, without what is between fences."""
    line = 1
    for number, part in enumerate(re.split(r"^```.*$", path.read_text(), flags=re.MULTILINE)):
        for paragraph in part.split("\n\n"):
            if number % 2 == 0 and paragraph.strip():
                yield line, " ".join(paragraph.split())
            line += paragraph.count("\n") + 2


def found(place: str, texts: Iterator[tuple[int, str]]) -> list[str]:
    rules = (DANGLING, DANGLING_THAT, UNIDIOMATIC)
    return [
        f"{place}:{line}: {match[0].strip()!r} in {text[:80]!r}"
        for line, text in texts
        for rule in rules
        if (match := rule.search(text))
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_code_reads_as_sentences(package: str) -> None:
    places = [
        line
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in found(str(path.relative_to(ROOT)), texts(path))
    ]
    assert not places, "\n".join(places)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_read_as_sentences(page: Path) -> None:
    places = found(str(page.relative_to(ROOT)), paragraphs(page))
    assert not places, "\n".join(places)


@pytest.mark.parametrize(
    "text",
    [
        "Of the ledger, 64 hexadecimal digits.",
        "That were charged.",
        "The head. Whose signature counts.",
        "whoever learns the sum",
        "a terminal that is none",
        "the job goes on",
    ],
)
def test_the_rules_find_what_they_are_for(text: str) -> None:
    assert found("here", iter([(1, text)]))
