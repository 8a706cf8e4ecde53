"""docs/budget.md is a session that can be replayed: each command with its output."""

import math
import os
import re
from pathlib import Path

from support import warm_python

from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import AttemptKey
from umbel_client.privacy.accounting import DpEvent
from umbel_client.privacy.attempt_cost import AttemptCost
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


SHARED = AttemptCost(
    DpEvent(0.8, 0.1, 1), DpEvent(1.385, 0.1, 1), honest=3, counts=None, most_attempts=40
)
"""Of a job of distributed mode at another site, whose second round was tried twice."""


def sessions(page: str, site: str = "north") -> list[tuple[str, str]]:
    """Command and output at a site, in the page's order."""
    blocks = re.findall(rf"^```console\n({site}.*?)^```", page, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^{site}\$ (.*)\n((?:(?!{site}\$ ).*\n)*)", "".join(blocks), re.MULTILINE)


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


def make_sharing_site(folder: Path) -> None:
    """A site with rounds of local mode, and attempts of distributed mode after them."""
    (folder / "client.toml").write_text(f"{CLIENT_TOML}total_shared_epsilon = 9\n")
    (folder / "state").mkdir()
    zeros = bytes(32)
    unlimited = Budget(math.inf, 1e-5, math.inf)
    with Ledger.open(folder / "state" / "ledger.sqlite", zeros) as ledger:
        for job, number, event in ROUNDS[6:]:
            ledger.reserve(job, zeros, number, event, unlimited)
            ledger.record_delta(job, number, zeros)
            ledger.record_sent(job, number)
        for number, attempt in ((1, 1), (2, 1), (2, 2), (3, 1)):
            key = AttemptKey("notes", number, attempt)
            ledger.reserve_attempt(key, zeros, SHARED, unlimited)
            if (number, attempt) != (2, 1):
                ledger.record_vector(key, bytes([number, *zeros[1:]]))
                ledger.record_vector_sent(key)
        Journal(folder / "state" / "session.sqlite").close()


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


def test_the_sessions_of_a_site_that_shares_noise_replay_too(tmp_path: Path) -> None:
    make_sharing_site(tmp_path)
    printed = sessions(PAGE.read_text(), "south")
    assert len(printed) == 2
    for command, text in printed:
        assert without_digests(text) == without_digests(output(tmp_path, command)), command
