"""The ledger never stands below what was spent: not after a crash, a full disk or a forged row."""

import math
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.waiting import HANGING

from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import RoundState
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.site.policy import Budget
from umbel_common.errors import BudgetError, LedgerError, StorageError

DATA_SET = bytes(range(32))
PLAN = b"\x01" * 32
DELTA = b"\x02" * 32
EVENT = DpEvent(1.0, 0.01, 100)
UNLIMITED = Budget(math.inf, 1e-5)

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path, DATA_SET) as opened:
        yield opened


def filled(path: Path) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        for number in (1, 2):
            ledger.reserve("job", PLAN, number, EVENT, UNLIMITED)
            ledger.record_delta("job", number, DELTA)
            ledger.record_sent("job", number)


def test_a_round_goes_from_reserved_to_computed_to_sent(ledger: Ledger) -> None:
    assert ledger.state("job", 1) is None
    reserved = ledger.reserve("job", PLAN, 1, EVENT, UNLIMITED)
    assert (reserved.state, reserved.delta_digest) == (RoundState.RESERVED, None)
    ledger.record_delta("job", 1, DELTA)
    computed = ledger.state("job", 1)
    assert computed is not None
    assert (computed.state, computed.delta_digest) == (RoundState.COMPUTED, DELTA)
    ledger.record_sent("job", 1)
    sent = ledger.state("job", 1)
    assert sent is not None
    assert (sent.state, sent.delta_digest) == (RoundState.SENT, DELTA)


def test_everything_is_still_there_after_closing_and_opening(path: Path) -> None:
    filled(path)
    with Ledger.open(path, DATA_SET) as ledger:
        assert [(entry.round, entry.state) for entry in ledger.history()] == [
            (1, RoundState.SENT),
            (2, RoundState.SENT),
        ]
        assert ledger.history()[0].event == EVENT
        assert ledger.spent(1e-5) == epsilon([EVENT, EVENT], 1e-5)


def test_every_step_can_be_repeated_and_costs_nothing_the_second_time(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.reserve("job", PLAN, 1, EVENT, UNLIMITED)
        ledger.record_delta("job", 1, DELTA)
        ledger.record_sent("job", 1)
    head = ledger.head()
    ledger.reserve("job", PLAN, 1, EVENT, Budget(0.0, 1e-5))
    assert ledger.head() == head
    assert len(ledger.history()) == 1
    assert ledger.spent(1e-5) == epsilon([EVENT], 1e-5)


@pytest.mark.parametrize(
    ("plan", "event", "field"),
    [
        (b"\x09" * 32, EVENT, "plan"),
        (PLAN, DpEvent(1.1, 0.01, 100), "event"),
        (PLAN, None, "event"),
    ],
)
def test_a_reserved_round_cannot_be_reserved_for_anything_else(
    ledger: Ledger, plan: bytes, event: DpEvent | None, field: str
) -> None:
    ledger.reserve("job", PLAN, 1, EVENT, UNLIMITED)
    with pytest.raises(LedgerError) as caught:
        ledger.reserve("job", plan, 1, event, UNLIMITED)
    assert caught.value.field == field


def test_a_second_release_with_other_noise_is_refused_also_after_a_restart(path: Path) -> None:
    filled(path)
    with Ledger.open(path, DATA_SET) as ledger:
        with pytest.raises(LedgerError, match="another delta"):
            ledger.record_delta("job", 1, b"\x03" * 32)
        state = ledger.state("job", 1)
        assert state is not None
        assert state.delta_digest == DELTA


def test_no_step_can_be_skipped(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="never reserved"):
        ledger.record_delta("job", 1, DELTA)
    with pytest.raises(LedgerError, match="never reserved"):
        ledger.record_sent("job", 1)
    ledger.reserve("job", PLAN, 1, EVENT, UNLIMITED)
    with pytest.raises(LedgerError, match="before its delta was recorded"):
        ledger.record_sent("job", 1)


def test_what_could_not_be_read_back_is_never_written(ledger: Ledger) -> None:
    head = ledger.head()
    with pytest.raises(LedgerError, match="read back"):
        ledger.reserve("job", b"short", 1, EVENT, UNLIMITED)
    assert (ledger.head(), ledger.history()) == (head, ())


def test_a_round_past_the_budget_is_refused_and_nothing_is_written(path: Path) -> None:
    one, two = epsilon([EVENT], 1e-5), epsilon([EVENT, EVENT], 1e-5)
    budget = Budget((one + two) / 2, 1e-5)
    with Ledger.open(path, DATA_SET) as ledger:
        ledger.reserve("job", PLAN, 1, EVENT, budget)
        head = ledger.head()
        with pytest.raises(BudgetError) as caught:
            ledger.reserve("other-job", PLAN, 1, EVENT, budget)
        assert caught.value.exit_code == 31
        assert f"{two:.4g} with this round" in caught.value.diagnostics()
        assert ledger.head() == head
    with Ledger.open(path, DATA_SET) as ledger:
        assert (ledger.head(), len(ledger.history())) == (head, 1)


def test_a_budget_that_is_no_number_allows_nothing(ledger: Ledger) -> None:
    with pytest.raises(BudgetError):
        ledger.reserve("job", PLAN, 1, EVENT, Budget(math.nan, 1e-5))


def test_after_a_release_without_privacy_no_budget_is_left(ledger: Ledger) -> None:
    with pytest.raises(BudgetError):
        ledger.reserve("open", PLAN, 1, None, Budget(100.0, 1e-5))
    ledger.reserve("open", PLAN, 1, None, UNLIMITED)
    assert ledger.spent(1e-5) == math.inf
    with pytest.raises(BudgetError, match="inf spent"):
        ledger.reserve("job", PLAN, 1, EVENT, Budget(100.0, 1e-5))


def test_heads_of_equal_histories_differ_so_that_they_tell_nothing(tmp_path: Path) -> None:
    heads = []
    for name in ("a", "b"):
        filled(tmp_path / name)
        with Ledger.open(tmp_path / name, DATA_SET) as ledger:
            heads.append(ledger.head())
    assert heads[0] != heads[1]
    assert [len(head) for head in heads] == [32, 32]


def edit(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute(statement, values)
        database.commit()


def rows(path: Path) -> list[tuple[bytes, bytes]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT entry, head FROM rows ORDER BY position").fetchall()


def opens(path: Path) -> bool:
    try:
        Ledger.open(path, DATA_SET).close()
    except LedgerError as error:
        return error.file != path
    return True


@pytest.mark.parametrize("column", ["entry", "head"])
def test_flipping_any_byte_of_any_row_is_noticed(path: Path, column: str) -> None:
    filled(path)
    for position, row in enumerate(rows(path)):
        value = row[0] if column == "entry" else row[1]
        for place in range(len(value)):
            forged = value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]
            statement = f"UPDATE rows SET {column} = ? WHERE position = ?"
            edit(path, statement, forged, position)
            assert not opens(path), f"byte {place} of row {position}"
            edit(path, statement, value, position)
    assert opens(path)


@pytest.mark.parametrize("position", range(7))
def test_removing_any_row_is_noticed_the_last_one_by_its_published_head(
    path: Path, position: int
) -> None:
    filled(path)
    with Ledger.open(path, DATA_SET) as ledger:
        published = ledger.head()
    edit(path, "DELETE FROM rows WHERE position = ?", position)
    if position < 6:
        assert not opens(path)
    else:
        with (
            Ledger.open(path, DATA_SET) as ledger,
            pytest.raises(LedgerError, match="published earlier"),
        ):
            ledger.verify(published)


def test_a_published_head_stays_valid_while_the_ledger_grows(ledger: Ledger) -> None:
    heads = [ledger.head()]
    ledger.reserve("job", PLAN, 1, EVENT, UNLIMITED)
    heads.append(ledger.head())
    ledger.record_delta("job", 1, DELTA)
    for head in heads:
        ledger.verify(head)
    with pytest.raises(LedgerError):
        ledger.verify(bytes(32))


def test_an_old_copy_put_back_is_noticed(path: Path) -> None:
    filled(path)
    old = path.read_bytes()
    with Ledger.open(path, DATA_SET) as ledger:
        ledger.reserve("job", PLAN, 3, EVENT, UNLIMITED)
        published = ledger.head()
    path.write_bytes(old)
    with Ledger.open(path, DATA_SET) as ledger, pytest.raises(LedgerError):
        ledger.verify(published)


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 5000])
def test_a_truncated_file_is_damage_and_never_a_fresh_ledger(path: Path, size: int) -> None:
    filled(path)
    path.write_bytes(path.read_bytes()[:size])
    assert not opens(path)


def test_the_ledger_of_another_data_set_is_refused(path: Path) -> None:
    filled(path)
    with pytest.raises(LedgerError, match="another data set"):
        Ledger.open(path, bytes(32))


def test_a_later_schema_version_is_refused(path: Path) -> None:
    filled(path)
    edit(path, "PRAGMA user_version = 5")
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, DATA_SET)
    assert (caught.value.found, caught.value.accepted) == (5, "at most 4")
    assert "upgrade Umbel" in caught.value.diagnostics()


def test_a_failed_opening_does_not_keep_the_lock(path: Path) -> None:
    filled(path)
    with pytest.raises(LedgerError):
        Ledger.open(path, bytes(32))
    assert opens(path)


def test_a_ledger_goes_on_for_a_changed_data_set_and_forgets_nothing(path: Path) -> None:
    filled(path)
    changed = bytes(32)
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, changed)
    assert f"umbel-client budget carry --data-set {changed.hex()}" in caught.value.diagnostics()
    with Ledger.open(path, DATA_SET) as ledger:
        published = ledger.head()
        for _ in range(2):
            ledger.continue_on(changed)
    with Ledger.open(path, changed) as ledger:
        ledger.verify(published)
        assert ledger.spent(1e-5) == epsilon([EVENT, EVENT], 1e-5)
        ledger.reserve("job", PLAN, 3, EVENT, UNLIMITED)
        assert len(ledger.history()) == 3
    assert len(rows(path)) == 9
    with pytest.raises(LedgerError, match="another data set"):
        Ledger.open(path, DATA_SET)


def test_what_was_charged_by_record_says_nothing_about_patients(path: Path) -> None:
    filled(path)
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, DATA_SET, "patient")
    assert (caught.value.field, caught.value.found) == ("data.unit_column", "patient")
    other = path.with_name("by-patient")
    Ledger.open(other, DATA_SET, "patient").close()
    with pytest.raises(LedgerError, match="another unit"):
        Ledger.open(other, DATA_SET)


def run_child(
    work: Callable[[], None], wait_to_kill: Callable[[], None] | None = None
) -> int | None:
    """Runs `work` in a fork, and returns its exit code.

    Args:
        wait_to_kill: returns when the fork is to be killed with SIGKILL.
    """
    child = FORK.Process(target=work)
    child.start()
    if wait_to_kill is not None:
        wait_to_kill()
        os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    return child.exitcode


def open_elsewhere(path: Path) -> None:
    try:
        Ledger.open(path, DATA_SET).close()
    except LedgerError as error:
        os._exit(error.exit_code if "another process" in error.message else 1)


def test_a_second_process_is_refused_until_the_first_is_gone(ledger: Ledger, path: Path) -> None:
    assert run_child(lambda: open_elsewhere(path)) == LedgerError.exit_code
    with pytest.raises(LedgerError, match="another process"):
        Ledger.open(path, DATA_SET)
    ledger.close()
    assert run_child(lambda: open_elsewhere(path)) == 0


def train_on(path: Path, spent: Path, first: int) -> None:
    """Rounds without end; each gradient, delta and byte that leaves is noted before it is used."""
    log = os.open(spent, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with Ledger.open(path, DATA_SET) as ledger:
        for number in range(first, first + 100_000):
            ledger.reserve("job", PLAN, number, EVENT, UNLIMITED)
            os.write(log, f"gradient {number} -\n".encode())
            digest = os.urandom(32)
            ledger.record_delta("job", number, digest)
            os.write(log, f"release {number} {digest.hex()}\n".encode())
            ledger.record_sent("job", number)


def test_a_kill_at_any_moment_leaves_the_ledger_at_or_above_what_was_spent(tmp_path: Path) -> None:
    path, spent = tmp_path / "ledger.sqlite", tmp_path / "spent"
    chance = random.Random(20)
    used: list[list[str]] = []
    found: set[RoundState] = set()
    first = 1
    for _ in range(24):
        start = first

        def work(start: int = start) -> None:
            train_on(path, spent, start)

        def wait_to_kill(size: int = spent.stat().st_size if spent.exists() else 0) -> None:
            # However slow the machine is, the child has computed a gradient when it dies.
            deadline = time.monotonic() + HANGING
            while not spent.exists() or spent.stat().st_size == size:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))

        assert run_child(work, wait_to_kill) == -signal.SIGKILL
        used = [line.split() for line in spent.read_text().splitlines()] if spent.exists() else []
        with Ledger.open(path, DATA_SET) as ledger:
            entries = {entry.round: entry for entry in ledger.history()}
            for kind, number, digest in used:
                assert int(number) in entries, f"round {number} was used and is not in the ledger"
                if kind == "release":
                    assert entries[int(number)].delta_digest == bytes.fromhex(digest)
            if entries:
                found.add(entries[max(entries)].state)
            first = max(entries, default=0) + 1
    gradients = [EVENT for kind, _, _ in used if kind == "gradient"]
    assert len(gradients) >= 24
    with Ledger.open(path, DATA_SET) as ledger:
        assert ledger.spent(1e-5) >= epsilon(gradients, 1e-5)
    assert len(found) > 1, "all kills hit one and the same state"


def fill_the_disk(path: Path) -> None:
    """Reserves rounds while files may not grow, and checks what the ledger says then."""
    with Ledger.open(path, DATA_SET) as ledger:
        ledger.reserve("job", PLAN, 1, EVENT, UNLIMITED)
        size = max(file.stat().st_size for file in path.parent.iterdir())
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 6000, hard))
        number = 1
        try:
            while number < 1000:
                ledger.reserve("job", PLAN, number + 1, EVENT, UNLIMITED)
                number += 1
        except StorageError as error:
            assert "disk" in error.diagnostics()  # noqa: PT017  # in a child, which has no pytest
        head, history = ledger.head(), ledger.history()
        assert number < 1000
        assert len(history) == number
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        ledger.reserve("job", PLAN, number + 1, EVENT, UNLIMITED)
        ledger.verify(head)
        os._exit(number)


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_state(path: Path) -> None:
    number = run_child(lambda: fill_the_disk(path))
    assert number is not None
    assert 1 <= number < 100
    with Ledger.open(path, DATA_SET) as ledger:
        assert [entry.round for entry in ledger.history()] == list(range(1, number + 2))
