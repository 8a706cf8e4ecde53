"""One state folder under two clients or two jobs, and under old copies that are put back."""

import os
import random
import shutil
import signal
from collections.abc import Callable

import pytest
from adversarial.federation import Federation, moved
from adversarial.killable_site import SITE, KillableSite
from support import warm_python
from support.waiting import HANGING

from umbel_common.adapters.vector import adapter_digest
from umbel_common.errors import LedgerError
from umbel_common.protocol.wire import OfferReply, OfferRequest, Refusal
from umbel_common.trust.identity import sign

NEVER = 10**9


@pytest.mark.parametrize("stage", ["train", "share", "mask", "confirm", "unmask"])
def test_a_journal_of_before_an_answer_is_noticed(federation: Federation, stage: str) -> None:
    federation.offer()
    request = federation.drive(federation.attempt(), until=stage).requests()[SITE]
    journal = federation.folder / SITE / "state" / "session.sqlite"
    federation.trainers[SITE].close()
    shutil.copy(journal, federation.folder)
    federation.start(SITE)
    answer = federation.ask(SITE, request)
    federation.start(SITE)
    assert federation.ask(SITE, request) == answer
    federation.trainers[SITE].close()
    shutil.copy(federation.folder / journal.name, journal)
    federation.start(SITE)
    assert federation.refusal(SITE, request) == "site-not-ready"
    (error,) = federation.observers[SITE].errors
    assert isinstance(error, LedgerError)
    assert "journal is older" in error.diagnostics()


def test_a_journal_that_is_gone_is_noticed(federation: Federation) -> None:
    federation.offer()
    federation.drive(federation.attempt())
    federation.trainers[SITE].close()
    (federation.folder / SITE / "state" / "session.sqlite").unlink()
    federation.start(SITE)
    offer = OfferRequest(plan=sign(federation.operator, federation.plan))
    assert federation.refusal(SITE, offer) == "site-not-ready"


def test_a_second_client_is_refused_until_the_first_has_died(
    open_federation: Callable[..., Federation],
) -> None:
    federation = open_federation(3)
    federation.offer()
    offer = OfferRequest(plan=sign(federation.operator, federation.plan))
    other = KillableSite(federation, random.Random(1), most_steps=NEVER)
    try:
        assert other.ask("offer", offer) == Refusal(check="site-not-ready")
        federation.trainers[SITE].close()
        assert isinstance(other.ask("offer", offer), OfferReply)
        federation.start(SITE)
        assert federation.refusal(SITE, offer) == "site-not-ready"
        assert "another process" in federation.observers[SITE].errors[0].diagnostics()
        os.kill(other.process, signal.SIGKILL)
        # Its end of the connection closes with the process, as does the lock.
        assert other.connection.poll(HANGING)
        federation.offer()
        other.start()
    finally:
        other.stop()


def test_of_two_jobs_that_fit_alone_the_second_is_refused_before_a_gradient(
    federation: Federation,
) -> None:
    first, second = federation.plan, federation.make_plan(job="second")
    federation.offer(first)
    federation.offer(second)
    for number in (1, 2):
        vector = moved(first, number - 1)
        digest = adapter_digest(first.digest(), vector)
        federation.releases[digest] = federation.release(vector, round=number - 1)
        federation.ask(
            SITE, federation.train_request(federation.header(round=number, adapter=digest))
        )
    federation.plan = second
    assert federation.refusal(SITE, federation.train_request()) == "budget"
    assert federation.observers[SITE].steps == 2
    assert federation.spent_rounds(SITE) == 2


@pytest.mark.parametrize("command", ["show", "history", "verify"])
def test_the_budget_can_be_read_while_a_client_trains(federation: Federation, command: str) -> None:
    federation.offer()
    federation.drive(federation.attempt(), until="confirm")
    state = federation.folder / SITE / "state"
    before = {path.name: path.read_bytes() for path in state.iterdir() if path.suffix == ".sqlite"}
    log = (state / "ledger.sqlite-wal").read_bytes()
    done = warm_python.run(
        *("-m", "umbel_client.cli", "budget", command), cwd=federation.folder / SITE
    )
    assert done.returncode == 0, done.stderr
    assert "job" in done.stdout or "intact" in done.stdout
    assert {name: (state / name).read_bytes() for name in before} == before
    assert (state / "ledger.sqlite-wal").read_bytes() == log
    federation.drive(federation.attempt(federation.header(attempt=2)))
