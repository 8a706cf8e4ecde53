"""docs/budget.md is a session that can be replayed: each command with its output."""

import math
import os
import re
from pathlib import Path

from support import warm_python

from umbel_client.ledger.ledger import Ledger
from umbel_client.privacy.accounting import DpEvent
from umbel_client.site.policy import Budget
from umbel_client.storage.journal import Journal
from umbel_common.plans.statements import RoundHeader

PAGE = Path(__file__).parents[2] / "docs" / "budget.md"

CLIENT_TOML = """
site = "north-hospital"
state = "state"
identity = "identity.pem"
roster = "roster.json"
[data]
path = "notes.jsonl"
public_size = 5000
[model]
path = "model"
[policy]
total_epsilon = 10
"""

ROUNDS = [
    *(("icd10", number, DpEvent(0.7306, 0.1, 5)) for number in range(1, 7)),
    *(("thyroid", number, DpEvent(1.45, 0.05, 10)) for number in range(1, 4)),
]
"""Of two plans, the second in its last round: that is charged and not sent."""


def sessions(page: str) -> list[tuple[str, str]]:
    """Command and output, in the page's order."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return re.findall(r"^north\$ (.*)\n((?:(?!north\$ ).*\n)*)", "".join(blocks), re.MULTILINE)


def make_site(folder: Path) -> None:
    """A site with a ledger and a journal that has signed its latest head."""
    (folder / "client.toml").write_text(CLIENT_TOML)
    state = folder / "state"
    state.mkdir()
    zeros = bytes(32)
    with Ledger.open(state / "ledger.sqlite", zeros) as ledger:
        for job, number, event in ROUNDS:
            ledger.reserve(job, zeros, number, event, Budget(math.inf, 1e-5))
            if (job, number) != ("thyroid", 3):
                ledger.record_delta(job, number, zeros)
                ledger.record_sent(job, number)
        session = Journal(state / "session.sqlite")
        header = RoundHeader("clinics", "thyroid", 3, 1, zeros, zeros, zeros, ("a", "b", "c"))
        session.open_attempt(header, ledger.head(), b"state", b"request", b"reply")
        session.close()


def output(folder: Path, command: str) -> str:
    """What a person sees who types a command."""
    done = warm_python.run(
        *("-m", "umbel_client.cli", *command.split()[1:]),
        cwd=folder,
        env={**os.environ, "COLUMNS": "80", "TERM": "dumb"},
    )
    printed = done.stdout + done.stderr
    assert done.returncode == (33 if "--head" in command else 0), printed
    lines = printed.replace(str(folder), "/srv/umbel").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def without_digests(text: str) -> str:
    """Heads are new in each ledger, for its rows are salted; and it is another day."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "<64 digits>", text)
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", "<moment>", text)


def test_every_session_of_the_page_replays_as_it_is_printed(tmp_path: Path) -> None:
    make_site(tmp_path)
    printed = sessions(PAGE.read_text())
    assert len(printed) >= 5
    for command, text in printed:
        assert without_digests(text) == without_digests(output(tmp_path, command)), command
