"""docs/protocol.md names every check of the protocol, and no check that does not exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [
    *(ROOT / "common" / "umbel_common").rglob("*.py"),
    *(ROOT / "client" / "umbel_client").rglob("*.py"),
    *(ROOT / "server" / "umbel_server").rglob("*.py"),
]
CODE = r"[a-z0-9]+(?:-[a-z0-9]+)+"
POSITION = {
    "require": 1,
    "RemoteProtocolError": 0,
    "RoundAborted": 0,
    "PolicyRefusal": 0,
    "check_enough": 0,
    "_require_sites": 0,
    "_at_most": 2,
    "_one_of": 2,
    "_refuse": 2,
}
"""Calls that name a check, and the place of its name among their arguments."""


def checks_of(tree: ast.AST) -> Iterator[str]:
    """The checks that are named in a call, or as the keys of a table of checks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            # policy._require takes a condition first, as require does.
            place = POSITION.get("require" if name == "_require" else name)
            if place is not None and len(node.args) > place:
                yield from literals(node.args[place])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "checks":
            assert isinstance(node.value, ast.Dict)
            for key in node.value.keys:
                yield from literals(key)


def literals(node: ast.AST | None) -> Iterator[str]:
    parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
    for part in parts:
        if isinstance(part, ast.Constant) and re.fullmatch(CODE, str(part.value)):
            yield str(part.value)


def test_every_check_is_documented_and_none_that_does_not_exist() -> None:
    code = {check for path in FILES for check in checks_of(ast.parse(path.read_text()))}
    text = (ROOT / "docs" / "protocol.md").read_text()
    checks = text[text.index("## What a site refuses") : text.index("## Encoding")]
    documented = set(re.findall(rf"`({CODE})`", checks))
    assert documented == code
