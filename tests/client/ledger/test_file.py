"""A ledger's file: who may use it, who may look, and what is beside it."""

import math
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.privacy.accounting import DpEvent
from umbel_client.site.policy import Budget
from umbel_common.errors import LedgerError

DATA_SET = bytes(range(32))
PLAN = b"\x01" * 32
DELTA = b"\x02" * 32
EVENT = DpEvent(1.0, 0.01, 100)
UNLIMITED = Budget(math.inf, 1e-5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def filled(path: Path) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        for number in (1, 2):
            ledger.reserve("job", PLAN, number, EVENT, UNLIMITED)
            ledger.record_delta("job", number, DELTA)


def test_a_file_that_is_no_ledger_is_refused(path: Path) -> None:
    path.write_text("site,patients\nnorth,12\n" * 500)
    with pytest.raises(LedgerError):
        Ledger.open(path, DATA_SET)


def test_the_file_is_for_its_owner_only(path: Path) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        ledger.reserve("job", PLAN, 1, EVENT, UNLIMITED)
        for file in path.parent.iterdir():
            assert file.stat().st_mode & 0o077 == 0, file


def test_a_session_journal_may_be_ahead_and_never_behind(path: Path) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        ledger.keep_pace(0)
        ledger.keep_pace(3)
    with Ledger.open(path, DATA_SET) as ledger:
        with pytest.raises(LedgerError, match="journal is older") as caught:
            ledger.keep_pace(2)
        assert "at least 3" in str(caught.value.accepted)
        ledger.keep_pace(3)
        ledger.keep_pace(7)
    assert read_ledger(path).answers == 7


@pytest.mark.parametrize("statement", ["DELETE FROM journal", "INSERT INTO journal VALUES (0)"])
def test_a_ledger_that_does_not_know_the_journal_is_damaged(path: Path, statement: str) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute(statement)
        database.commit()
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.open(path, DATA_SET)


def test_a_ledger_in_use_is_read_as_it_stands_and_not_changed_by_a_byte(path: Path) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        ledger.reserve("job", PLAN, 1, EVENT, UNLIMITED)
        log = path.with_name(f"{path.name}-wal")
        before = path.read_bytes(), log.read_bytes()
        contents = read_ledger(path)
        assert (contents.head(), contents.data_set) == (ledger.head(), DATA_SET)
        assert tuple(contents.rounds.values()) == ledger.history()
        assert (path.read_bytes(), log.read_bytes()) == before
        ledger.record_delta("job", 1, DELTA)
        assert read_ledger(path).head() == ledger.head()


def test_a_ledger_that_nobody_uses_is_read_and_nothing_is_left_beside_it(path: Path) -> None:
    filled(path)
    before = path.read_bytes()
    assert len(read_ledger(path).rounds) == 2
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_a_missing_ledger_is_not_made_by_reading(path: Path) -> None:
    with pytest.raises(LedgerError, match="no privacy ledger"):
        read_ledger(path)
    assert not path.exists()


def test_a_process_that_is_killed_leaves_the_lock_and_what_it_wrote(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from umbel_client.ledger.ledger import Ledger\n"
        f"ledger = Ledger.open(Path({str(path)!r}), bytes(range(32)))\n"
        "ledger.continue_on(bytes(32)); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(LedgerError, match="another process"):
            Ledger.open(path, bytes(32))
        other.kill()
    # First read while the dead process's log still lies there.
    assert read_ledger(path).data_set == bytes(32)
    Ledger.open(path, bytes(32)).close()
