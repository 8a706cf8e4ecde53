"""Attacks on a round that is tried again in distributed mode, where each attempt has its own noise.

The first is arithmetic: what two sums over one batch would tell. The others ask a ledger for it,
once with the check that stops them and once without.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from umbel_client.ledger import contents as contents_module
from umbel_client.ledger import ledger as ledger_module
from umbel_client.ledger.contents import Contents
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import Register
from umbel_client.ledger.rows import AttemptKey, StatedAttempts, StatedWithAttempts
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_client.site.policy import Budget
from umbel_common.canonical import digest
from umbel_common.errors import BudgetError, LedgerError

DELTA = 1e-5
RATE, NOISE, HONEST = 0.05, 1.0, 3
COST = AttemptCost(
    everybody=DpEvent(NOISE / math.sqrt(HONEST), RATE, 1),
    shared=DpEvent(NOISE, RATE, 1),
    honest=HONEST,
    counts=None,
    most_attempts=2,
)
CLAIM = epsilon([COST.shared] * COST.most_attempts, DELTA)
DATA_SET, PLAN = bytes(32), b"\x01" * 32
NO_LIMIT = Budget(math.inf, DELTA, math.inf)
FIRST, AGAIN, PAST = (AttemptKey("job", 1, attempt) for attempt in (1, 2, 3))
Probabilities = npt.NDArray[np.float64]


def two_sums(rate: float, noise: float, *, kept: bool) -> tuple[Probabilities, Probabilities]:
    """Probabilities of what two attempts show of one record, without and with it, on a grid.

    Args:
        kept: whether the second attempt has the batch of the first.
    """
    points = np.linspace(-8 * noise, 8 * noise + 1, 1201)
    without = np.exp(-(points**2) / (2 * noise**2))
    inside = np.exp(-((points - 1) ** 2) / (2 * noise**2))
    without, inside = without / without.sum(), inside / inside.sum()
    nothing = np.outer(without, without)
    if kept:
        return nothing, (1 - rate) * nothing + rate * np.outer(inside, inside)
    mixed = (1 - rate) * without + rate * inside
    return nothing, np.outer(mixed, mixed)


def delta_at(spent: float, one: Probabilities, other: Probabilities) -> float:
    """The smallest delta with which `spent` holds between two outcomes."""
    return max(
        float(np.maximum(a - math.exp(spent) * b, 0).sum()) for a, b in ((one, other), (other, one))
    )


def test_two_sums_over_one_batch_tell_more_than_two_attempts_are_charged_for() -> None:
    charged = epsilon([DpEvent(NOISE, RATE, 1)] * 2, DELTA)
    # With a batch of its own, each attempt is what the ledger charges, and hardly less.
    assert 0.9 * DELTA < delta_at(charged, *two_sums(RATE, NOISE, kept=False)) <= DELTA
    # With the batch kept, who averages the two sums halves the variance of the noise.
    assert delta_at(charged, *two_sums(RATE, NOISE, kept=True)) > 30 * DELTA
    averaged = epsilon([DpEvent(NOISE / math.sqrt(2), RATE, 1)], DELTA)
    assert averaged > 2 * charged
    assert delta_at(averaged, *two_sums(RATE, NOISE, kept=True)) <= DELTA
    # The more attempts, the more it gains: a kept batch is as good as shown in the end.
    ten = epsilon([DpEvent(NOISE, RATE, 10)], DELTA)
    assert epsilon([DpEvent(NOISE / math.sqrt(10), RATE, 1)], DELTA) > 5 * ten


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


def opened(path: Path, register: Register | None = None) -> Ledger:
    path.parent.mkdir(exist_ok=True)
    found = Ledger.open(path, DATA_SET)
    if register is not None:
        register.enter(found, frozenset({"name notes"}))
    return found


def attempt(ledger: Ledger, key: AttemptKey, vector: bytes) -> bytes:
    """An attempt as a site goes through it; returns what leaves."""
    ledger.reserve_attempt(key, PLAN, COST, NO_LIMIT)
    ledger.record_vector(key, digest("vector", vector))
    ledger.record_vector_sent(key)
    return vector


def test_the_second_attempt_is_charged_as_an_event_of_its_own(path: Path) -> None:
    with opened(path) as ledger:
        attempt(ledger, FIRST, b"first")
        once = ledger.shared_spent(DELTA)
        attempt(ledger, AGAIN, b"second")
        assert once < ledger.shared_spent(DELTA) == CLAIM
        assert ledger.spent(DELTA) == epsilon([COST.everybody] * 2, DELTA) > CLAIM


@pytest.mark.parametrize("held", [True, False], ids=["with the check", "without it"])
def test_the_vector_of_one_attempt_does_not_leave_in_another(
    path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """Its noise would be the same in two sums over two sets of sites: their difference is the
    vector of the sites between them, under their own noise alone."""
    if not held:
        monkeypatch.setattr(Contents, "has_vector", lambda *_: False)
        monkeypatch.setattr(contents_module, "_require", lambda *_: None)
    with opened(path) as ledger:
        kept = attempt(ledger, FIRST, b"kept")
        if held:
            with pytest.raises(LedgerError, match="vector of another attempt"):
                attempt(ledger, AGAIN, kept)
        else:
            assert attempt(ledger, AGAIN, kept) == kept


@pytest.mark.parametrize("held", [True, False], ids=["with the check", "without it"])
def test_no_server_has_more_attempts_than_the_claim_was_computed_for(
    path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    if not held:
        monkeypatch.setattr(ledger_module, "require_attempt", lambda *_: None)
        monkeypatch.setattr(contents_module, "_require", lambda *_: None)
    with opened(path) as ledger:
        for key in (FIRST, AGAIN):
            attempt(ledger, key, str(key).encode())
        assert ledger.shared_spent(DELTA) <= CLAIM
        if held:
            with pytest.raises(BudgetError, match="past the most attempts"):
                attempt(ledger, PAST, b"past")
        else:
            attempt(ledger, PAST, b"past")
            assert ledger.shared_spent(DELTA) > CLAIM


@pytest.mark.parametrize("held", [True, False], ids=["with the check", "without it"])
def test_an_attempt_that_was_interrupted_is_not_computed_a_second_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """A process that can be ended while it computes would draw batch after batch for one charge."""
    with opened(path) as ledger:
        ledger.reserve_attempt(FIRST, PLAN, COST, NO_LIMIT)
        spent = ledger.spent(DELTA)
    if not held:
        monkeypatch.setattr(
            Ledger, "reserve_attempt", lambda self, key, *_: self._begun.add(key) or self
        )
    with opened(path) as ledger:
        if held:
            with pytest.raises(LedgerError, match="not computed again"):
                attempt(ledger, FIRST, b"again")
        else:
            attempt(ledger, FIRST, b"again")
        assert ledger.spent(DELTA) == spent


@pytest.mark.parametrize("held", [True, False], ids=["with the register", "without it"])
def test_a_ledger_that_was_rolled_back_repeats_no_attempt(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """Two vectors under one attempt: the sums tell what the ledger charges once."""
    if not held:
        monkeypatch.setattr(Register, "enter", lambda *_: None)
    register = Register(tmp_path / "ledgers")
    opened(path, register).close()
    shutil.copytree(path.parent, tmp_path / "before")
    with opened(path, register) as ledger:
        attempt(ledger, FIRST, b"first")
        published = ledger.head()
    shutil.rmtree(path.parent)
    shutil.copytree(tmp_path / "before", path.parent)
    with opened(path, register) as ledger:
        assert not ledger.knows(published, FIRST.job, FIRST.round)
        with pytest.raises(LedgerError, match="published earlier"):
            ledger.verify(published)
        if held:
            with pytest.raises(LedgerError, match="old copy"):
                attempt(ledger, FIRST, b"other")
        else:
            attempt(ledger, FIRST, b"other")
            assert ledger.shared_spent(DELTA) == epsilon([COST.shared], DELTA) < CLAIM


def test_what_a_rolled_back_ledger_lacks_is_stated_and_its_round_is_not_tried_again(
    path: Path, tmp_path: Path
) -> None:
    register = Register(tmp_path / "ledgers")
    opened(path, register).close()
    shutil.copytree(path.parent, tmp_path / "before")
    with opened(path, register) as ledger:
        attempt(ledger, FIRST, b"first")
    shutil.rmtree(path.parent)
    shutil.copytree(tmp_path / "before", path.parent)
    with opened(path, register) as ledger:
        counted = StatedAttempts("job", PLAN, 1, 1, COST)
        ledger.charge_statement(
            StatedWithAttempts((), False, "now", "weber", "put back", attempts=(counted,))
        )
        register.settle(ledger)
        with pytest.raises(LedgerError, match="closed"):
            attempt(ledger, AGAIN, b"other")
        attempt(ledger, AttemptKey("job", 2, 1), b"next")
        with pytest.raises(BudgetError, match="most attempts"):
            attempt(ledger, AttemptKey("job", 3, 1), b"past")
    assert (
        epsilon([event for event in read_ledger(path).events(shared=True) if event], DELTA) == CLAIM
    )
