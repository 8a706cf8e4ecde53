"""Targets: files that people write or receive: rosters, configurations, scenarios."""

import json
from pathlib import Path
from typing import Any

from fuzz.choices import Choices
from fuzz.mutate import CHANGES, damaged, mutated
from fuzz.target import Place, Property, Target
from vectors.cases import identity
from vectors.values import IDENTITIES, OPERATOR, ROSTER

from umbel_client.site.config import ClientConfig
from umbel_common.errors import ConfigError, IdentityError
from umbel_common.toml_values import parse_toml
from umbel_common.trust.key_statements import revoke, rotate
from umbel_common.trust.roster import RosterDocument
from umbel_common.trust.roster_file import document_from_json, document_to_json
from umbel_simulations.scenario.file import SHIPPED, check_scenario
from umbel_simulations.scenario.scenario import Scenario

FILE = Path("a-file")

CLIENT = """\
site = "north-hospital"
state = "state"
identity = "identity.pem"
roster = "roster.json"
threads = 2

[data]
path = "notes.jsonl"
public_size = 5000

[model]
path = "models/minilm"
precision = "float32"

[policy]
models = ["00ff"]
labels = ["benign", "malignant"]
max_epsilon = 8.0
"""

ODD_TOML = (
    "",
    "9" * 5000,
    "[" * 3000,
    '""',
    '"text"',
    "'''",
    '"\\u0000"',
    '"\\ud800"',
    "0",
    "-1",
    "1e400",
    "-nan",
    "inf",
    "18446744073709551616",
    "0x10",
    "1_000",
    "true",
    "[]",
    "[[[[[[[[]]]]]]]]",
    "{}",
    "{ a = 1 }",
    '["a", "a"]',
    "[1, 'a']",
    "1979-05-27",
    "07:32:00",
    "1979-05-27T07:32:00Z",
    "2023-02-30",
    "[policy]",
    "[[policy]]",
    "[a.b.c]",
    "a.b = 1",
    "# comment",
)


def changed_text(honest: str, choices: Choices) -> str:
    """Lines with one to four changes, and now and then a damaged byte."""
    lines = honest.splitlines()
    for _ in range(CHANGES[choices.below(len(CHANGES))]):
        if not choices.left or not lines:
            break
        line = choices.below(len(lines))
        match choices.below(6):
            case 0:
                del lines[line]
            case 1:
                lines.insert(line, lines[choices.below(len(lines))])
            case 2:
                lines[line] = ODD_TOML[choices.below(len(ODD_TOML))]
            case 3:
                other = choices.below(len(lines))
                lines[line], lines[other] = lines[other], lines[line]
            case 4:
                lines[line] = damaged(lines[line].encode(), choices).decode(errors="replace")
            case _:
                name = lines[line].partition("=")[0]
                lines[line] = f"{name}= {ODD_TOML[choices.below(len(ODD_TOML))]}"
    return "\n".join(lines)


def _client(_: Place) -> Property:
    def prove(data: bytes) -> None:
        choices = Choices(data)
        text = changed_text(CLIENT, choices) if choices.below(8) else _garbage(choices)
        config = parse_toml(text, ClientConfig, FILE)
        assert config.site
        assert config.threads >= 1

    return prove


def _scenario(_: Place) -> Property:
    honest = [path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.toml"))]
    # The parser skips comments, which would take most of the changes.
    honest = [
        "\n".join(line for line in text.splitlines() if line.strip() and line[0] != "#")
        for text in honest
    ]

    def prove(data: bytes) -> None:
        choices = Choices(data)
        text = changed_text(honest[choices.below(len(honest))], choices)
        scenario = parse_toml(text, Scenario, FILE)
        check_scenario(scenario, FILE)
        assert 2 <= scenario.aggregation.threshold <= scenario.sites.count

    return prove


def _roster(_: Place) -> Property:
    """What is read is a roster, and is the same after being written and read again."""
    document = RosterDocument(
        roster=ROSTER,
        rotations=(rotate("clinics", "site-a", identity("former"), IDENTITIES["site-a"]),),
        revocations=(revoke("clinics", identity("lost").public_key, OPERATOR),),
        revoked_here=(identity("stolen").public_key,),
    )
    text = document_to_json(document)
    assert document_from_json(text, FILE) == document
    honest = json.loads(text)

    def prove(data: bytes) -> None:
        choices = Choices(data)
        match choices.below(3):
            case 0:
                found = _garbage(choices)
            case 1:
                found = damaged(text.encode(), choices).decode(errors="replace")
            case _:
                found = json.dumps(mutated(honest, choices), default=_hexadecimal)
        read = document_from_json(found, FILE)
        assert document_from_json(document_to_json(read), FILE) == read
        names = [member.name for member in read.roster.members]
        assert names == sorted(set(names))

    return prove


def _hexadecimal(value: Any) -> str:
    """Bytes as hexadecimal text, because JSON has no bytes."""
    return bytes(value).hex()


def _garbage(choices: Choices) -> str:
    """Any text that a file in UTF-8 can hold."""
    return choices.rest().decode("utf-8", errors="replace")


FILES = (
    Target("file: client.toml", _client, (ConfigError,), share=150, inputs=15_000, guided=10_000),
    Target("file: scenario", _scenario, (ConfigError,), share=100, inputs=8_000),
    Target("file: roster", _roster, (IdentityError,), share=200, inputs=20_000, guided=20_000),
)
