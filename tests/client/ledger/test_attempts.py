"""Attempts of distributed mode: each is charged, has one vector, and counts in two totals."""

import math
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from support.waiting import HANGING

from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import (
    AttemptComputed,
    AttemptKey,
    AttemptReserved,
    Change,
    RoundState,
    Row,
    Stated,
    StatedAttempts,
    StatedWithAttempts,
)
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_client.site.policy import Budget
from umbel_common.canonical import encode
from umbel_common.errors import BudgetError, LedgerError

DATA_SET = bytes(range(32))
PLAN = b"\x01" * 32
VECTOR = b"\x02" * 32
OWN, SHARED, COUNTS = DpEvent(1.0, 0.01, 1), DpEvent(2.0, 0.01, 1), DpEvent(3.0, 1.0, 1)
COST = AttemptCost(OWN, SHARED, honest=4, counts=None, most_attempts=3)
ROUND = DpEvent(1.5, 0.02, 10)
"""Of a job of local mode."""
UNLIMITED = Budget(math.inf, 1e-5, math.inf)
FIRST, AGAIN, NEXT = AttemptKey("job", 1, 1), AttemptKey("job", 1, 2), AttemptKey("job", 2, 1)


FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path, DATA_SET) as opened:
        yield opened


def reserve(ledger: Ledger, key: AttemptKey, cost: AttemptCost = COST) -> None:
    ledger.reserve_attempt(key, PLAN, cost, UNLIMITED)


def states(path: Path) -> dict[AttemptKey, RoundState]:
    return {key: one.state for key, one in read_ledger(path).attempts.items()}


def test_an_attempt_goes_from_reserved_to_computed_to_sent(ledger: Ledger, path: Path) -> None:
    assert ledger.attempt(FIRST) is None
    taken = ledger.reserve_attempt(FIRST, PLAN, COST, UNLIMITED)
    assert (taken.key, taken.state, taken.vector) == (FIRST, RoundState.RESERVED, None)
    ledger.record_vector(FIRST, VECTOR)
    assert states(path) == {FIRST: RoundState.COMPUTED}
    ledger.record_vector_sent(FIRST)
    assert states(path) == {FIRST: RoundState.SENT}
    head = ledger.head()
    # What leaves again costs nothing, and is the same.
    ledger.record_vector(FIRST, VECTOR)
    ledger.record_vector_sent(FIRST)
    assert ledger.head() == head


def test_an_attempt_is_reserved_once(ledger: Ledger) -> None:
    reserve(ledger, FIRST)
    head = ledger.head()
    with pytest.raises(LedgerError, match="reserved before"):
        reserve(ledger, FIRST)
    ledger.record_vector(FIRST, VECTOR)
    with pytest.raises(LedgerError, match="reserved before") as caught:
        reserve(ledger, FIRST)
    assert caught.value.found == "computed"
    assert ledger.head() != head


def test_no_step_can_be_skipped(ledger: Ledger) -> None:
    for step in (
        lambda: ledger.record_vector(FIRST, VECTOR),
        lambda: ledger.record_vector_sent(FIRST),
    ):
        with pytest.raises(LedgerError, match="never reserved"):
            step()
    reserve(ledger, FIRST)
    with pytest.raises(LedgerError, match="no vector to send"):
        ledger.record_vector_sent(FIRST)


def test_each_attempt_is_charged_in_both_totals_and_local_rounds_are_in_both(
    ledger: Ledger, path: Path
) -> None:
    assert (ledger.honest, ledger.spent(1e-5), ledger.shared_spent(1e-5)) == (None, 0.0, 0.0)
    cost = msgspec.structs.replace(COST, counts=COUNTS)
    ledger.reserve("local", PLAN, 1, ROUND, UNLIMITED)
    assert ledger.spent(1e-5) == ledger.shared_spent(1e-5) == epsilon([ROUND], 1e-5)
    for key in (FIRST, AGAIN):
        reserve(ledger, key, cost)
    for total in (ledger, read_ledger(path)):
        found = total._contents if isinstance(total, Ledger) else total
        assert found.events() == [ROUND, OWN, COUNTS, OWN, COUNTS]
        assert found.events(shared=True) == [ROUND, SHARED, COUNTS, SHARED, COUNTS]
        assert found.honest == 4
    assert ledger.spent(1e-5) == epsilon([ROUND, OWN, COUNTS, OWN, COUNTS], 1e-5)
    assert ledger.shared_spent(1e-5) == epsilon([ROUND, SHARED, COUNTS, SHARED, COUNTS], 1e-5)


def test_the_site_with_the_most_honest_peers_says_what_the_second_total_rests_on(
    ledger: Ledger,
) -> None:
    for number, honest in enumerate((2, 7, 3)):
        key = AttemptKey(f"job-{number}", 1, 1)
        reserve(ledger, key, msgspec.structs.replace(COST, honest=honest))
    assert ledger.honest == 7


@pytest.mark.parametrize(
    ("attempts", "rounds", "refused"),
    [
        (Budget(epsilon([OWN, OWN], 1e-5), 1e-5, math.inf), ("", 3), "of this data set does not"),
        (
            Budget(math.inf, 1e-5, epsilon([SHARED, SHARED], 1e-5)),
            ("", 3),
            "against readers of the sums does not",
        ),
    ],
    ids=["everybody", "readers"],
)
def test_an_attempt_past_either_budget_is_refused_and_nothing_is_written(
    path: Path, attempts: Budget, rounds: tuple[str, int], refused: str
) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        for key in (FIRST, AGAIN):
            ledger.reserve_attempt(key, PLAN, COST, attempts)
        head = ledger.head()
        with pytest.raises(BudgetError, match=refused):
            ledger.reserve_attempt(NEXT, PLAN, COST, attempts)
        # What both modes spend is one total: a round of local mode is refused as well.
        with pytest.raises(BudgetError, match=refused):
            ledger.reserve("local", PLAN, 1, ROUND, attempts)
        assert ledger.head() == head
    assert len(states(path)) == 2


def test_what_local_mode_spent_counts_for_readers_too(ledger: Ledger) -> None:
    budget = Budget(math.inf, 1e-5, epsilon([ROUND], 1e-5))
    ledger.reserve("local", PLAN, 1, ROUND, budget)
    with pytest.raises(BudgetError, match="against readers of the sums"):
        ledger.reserve_attempt(FIRST, PLAN, COST, budget)


def test_a_policy_without_the_second_total_admits_no_attempt(ledger: Ledger) -> None:
    with pytest.raises(BudgetError) as caught:
        ledger.reserve_attempt(FIRST, PLAN, COST, Budget(math.inf, 1e-5))
    assert caught.value.field == "policy.total_shared_epsilon"
    ledger.reserve("local", PLAN, 1, ROUND, Budget(math.inf, 1e-5))


def test_no_attempt_goes_past_the_plans_most_over_the_whole_job(path: Path) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        for key in (FIRST, AGAIN, NEXT):
            reserve(ledger, key)
    with Ledger.open(path, DATA_SET) as ledger:
        with pytest.raises(BudgetError, match="past the most attempts") as caught:
            reserve(ledger, AttemptKey("job", 3, 1))
        assert (caught.value.found, caught.value.accepted) == (
            "3 attempts were charged",
            "at most 3",
        )
        reserve(ledger, AttemptKey("other-job", 1, 1))


@pytest.mark.parametrize(
    ("plan", "cost", "field"),
    [
        (b"\x09" * 32, COST, "plan"),
        (PLAN, msgspec.structs.replace(COST, most_attempts=4), "cost"),
        (PLAN, msgspec.structs.replace(COST, shared=OWN), "cost"),
    ],
)
def test_all_attempts_of_a_job_have_one_plan_and_one_cost(
    ledger: Ledger, plan: bytes, cost: AttemptCost, field: str
) -> None:
    reserve(ledger, FIRST)
    with pytest.raises(LedgerError) as caught:
        ledger.reserve_attempt(AGAIN, plan, cost, UNLIMITED)
    assert caught.value.field == field


def test_a_job_is_of_one_mode(ledger: Ledger) -> None:
    reserve(ledger, FIRST)
    ledger.reserve("local", PLAN, 1, ROUND, UNLIMITED)
    with pytest.raises(LedgerError, match="in distributed mode"):
        ledger.reserve("job", PLAN, 2, ROUND, UNLIMITED)
    with pytest.raises(LedgerError, match="in local mode"):
        reserve(ledger, AttemptKey("local", 2, 1))


@pytest.mark.parametrize("computed", [False, True])
def test_an_attempt_of_a_process_that_ended_is_never_computed_again(
    path: Path, computed: bool
) -> None:
    """Neither is its vector drawn a second time, nor is a lost one refunded."""
    with Ledger.open(path, DATA_SET) as ledger:
        reserve(ledger, FIRST)
        if computed:
            ledger.record_vector(FIRST, VECTOR)
        spent = ledger.spent(1e-5), ledger.shared_spent(1e-5)
    with Ledger.open(path, DATA_SET) as ledger:
        with pytest.raises(LedgerError, match="not computed again"):
            reserve(ledger, FIRST)
        with pytest.raises(LedgerError, match="another vector" if computed else "that ended"):
            ledger.record_vector(FIRST, b"\x03" * 32)
        if computed:
            # The recorded one may still leave.
            ledger.record_vector(FIRST, VECTOR)
            ledger.record_vector_sent(FIRST)
        else:
            with pytest.raises(LedgerError, match="no vector to send"):
                ledger.record_vector_sent(FIRST)
        assert (ledger.spent(1e-5), ledger.shared_spent(1e-5)) == spent
        reserve(ledger, AGAIN)


def test_a_vector_of_one_attempt_never_leaves_under_another(ledger: Ledger) -> None:
    reserve(ledger, FIRST)
    ledger.record_vector(FIRST, VECTOR)
    reserve(ledger, AGAIN)
    with pytest.raises(LedgerError, match="vector of another attempt"):
        ledger.record_vector(AGAIN, VECTOR)


def appended(path: Path, *changes: Change) -> None:
    """Writes rows that a ledger would refuse, as one who may write the file can."""
    contents = read_ledger(path)
    head, number = contents.head(), len(contents.heads)
    with closing(sqlite3.connect(path)) as database:
        for change in changes:
            row = Row(head, bytes(16), change)
            head = row.head()
            database.execute("INSERT INTO rows VALUES (?, ?, ?)", (number, encode(row), head))
            number += 1
        database.commit()


ONE_MORE = [AttemptReserved("job", PLAN, number, 9, COST) for number in (3, 4)]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ([AttemptReserved(*FIRST[:1], PLAN, 1, 1, COST)], "reserved twice"),
        (ONE_MORE, "past the plan's most"),
        (
            [AttemptReserved("job", PLAN, 3, 9, msgspec.structs.replace(COST, shared=OWN))],
            "two plans or costs",
        ),
        ([AttemptComputed(*FIRST, b"\x03" * 32)], "skips a state"),
        ([AttemptComputed(*AGAIN, VECTOR)], "one vector"),
        ([AttemptComputed(*NEXT, VECTOR)], "skips a state"),
        ([AttemptReserved("local", PLAN, 3, 9, COST)], "two modes"),
    ],
)
def test_a_chain_that_breaks_an_invariant_of_attempts_is_damaged(
    path: Path, changes: list[Change], found: str
) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        ledger.reserve("local", PLAN, 1, ROUND, UNLIMITED)
        for key in (FIRST, AGAIN):
            reserve(ledger, key)
        ledger.record_vector(FIRST, VECTOR)
    appended(path, *changes)
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, DATA_SET)
    assert found in str(caught.value.found)


def stated(*attempts: StatedAttempts) -> StatedWithAttempts:
    fields = {"rounds": (), "everything": False, "at": "now", "by": "weber", "why": "a broken disk"}
    return StatedWithAttempts(**fields, attempts=attempts)  # type: ignore[arg-type]  # by name


def test_a_statement_closes_rounds_counts_attempts_and_lets_later_rounds_go_on(path: Path) -> None:
    with Ledger.open(path, DATA_SET) as ledger:
        reserve(ledger, FIRST)
        ledger.record_vector(FIRST, VECTOR)
        ledger.mark_as_old_copy(bytes(32))
        with pytest.raises(LedgerError, match="old copy"):
            reserve(ledger, AGAIN)
        with pytest.raises(LedgerError, match="more attempts are stated"):
            ledger.charge_statement(stated(StatedAttempts("job", PLAN, 2, 3, COST)))
        assert not ledger.knows(bytes(32), "job", 2)
        ledger.charge_statement(stated(StatedAttempts("job", PLAN, 2, 1, COST)))
        assert ledger.knows(bytes(32), "job", 2)
        assert not ledger.knows(bytes(32), "job", 3)
    with Ledger.open(path, DATA_SET) as ledger:
        assert states(path) == {FIRST: RoundState.LOST}
        assert ledger._contents.events() == [OWN, OWN]
        with pytest.raises(LedgerError, match="no vector to send"):
            ledger.record_vector_sent(FIRST)
        for key in (AGAIN, NEXT):
            with pytest.raises(LedgerError, match="closed"):
                reserve(ledger, key)
        reserve(ledger, AttemptKey("job", 3, 1))
        with pytest.raises(BudgetError, match="most attempts"):
            reserve(ledger, AttemptKey("job", 4, 1))


def test_a_statement_without_attempts_closes_the_rounds_at_hand(ledger: Ledger) -> None:
    reserve(ledger, FIRST)
    ledger.charge_statement(Stated((), False, "now", "weber", "a broken disk"))
    with pytest.raises(LedgerError, match="closed"):
        reserve(ledger, AGAIN)
    reserve(ledger, NEXT)


MANY = msgspec.structs.replace(COST, most_attempts=1_000_000)


def compute_on(path: Path, used: Path, first: int) -> None:
    """Attempts without end; each gradient and each vector that leaves is noted before its use."""
    log = os.open(used, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with Ledger.open(path, DATA_SET) as ledger:
        for number in range(first, first + 100_000):
            key = AttemptKey("job", number, 1)
            reserve(ledger, key, MANY)
            os.write(log, f"gradient {number} -\n".encode())
            vector = os.urandom(32)
            ledger.record_vector(key, vector)
            os.write(log, f"release {number} {vector.hex()}\n".encode())
            ledger.record_vector_sent(key)


def test_a_kill_at_any_moment_leaves_every_attempt_charged_and_one_vector_each(
    tmp_path: Path,
) -> None:
    path, used = tmp_path / "ledger.sqlite", tmp_path / "used"
    chance, first, found = random.Random(21), 1, set[RoundState]()
    for _ in range(8):
        size = used.stat().st_size if used.exists() else 0
        child = FORK.Process(target=compute_on, args=(path, used, first))
        child.start()
        deadline = time.monotonic() + HANGING
        while not used.exists() or used.stat().st_size == size:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        lines = [line.split() for line in used.read_text().splitlines()]
        with Ledger.open(path, DATA_SET) as ledger:
            for kind, number, vector in lines:
                known = ledger.attempt(AttemptKey("job", int(number), 1))
                assert known is not None, f"attempt {number} was used and is not in the ledger"
                if kind == "release":
                    assert known.vector == bytes.fromhex(vector)
            last = ledger._contents.jobs["job"].count
            found.add(ledger._contents.attempts[AttemptKey("job", last, 1)].state)
            first = last + 1
    assert len(found) > 1, "all kills hit one and the same state"
