"""A whole machine that is put back to an earlier time and would train a second time.

A state folder alone that is put back is noticed at the machine (test_one_ledger).
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from adversarial.federation import Federation, moved
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.register import machine_register
from umbel_client.storage.journal import read_published
from umbel_common.adapters.vector import adapter_digest
from umbel_common.protocol.wire import LastAdvert, OfferReply, OfferRequest, TrainReply
from umbel_common.secagg.messages import KeyAdvert
from umbel_common.trust.identity import Identity, fingerprint, sign

SITE = "site-00"


def state_of(federation: Federation) -> Path:
    return federation.folder / SITE / "state"


def put_back(federation: Federation, copy: Path) -> None:
    """Puts older folders back as a snapshot of the machine would, past every command."""
    federation.trainers[SITE].close()
    for folder, name in ((state_of(federation), "state"), (machine_register().folder, "ledgers")):
        shutil.rmtree(folder)
        shutil.copytree(copy / name, folder)
    federation.start(SITE)


def train(federation: Federation, last: LastAdvert | None = None, **parts: object) -> LastAdvert:
    """Trains one round at the site; returns what an honest server keeps of it."""
    header = federation.header(**parts)
    reply = federation.ask(SITE, federation.showing(header, last))
    assert isinstance(reply, TrainReply)
    return LastAdvert(header=sign(federation.operator, header), advert=reply.advert)


@pytest.fixture
def copied(open_federation: Callable[..., Federation]) -> tuple[Federation, Path]:
    """A site that has accepted a plan, and a copy of its machine's folders."""
    federation = open_federation()
    federation.offer()
    copy = federation.folder / "copy"
    federation.trainers[SITE].close()
    shutil.copytree(state_of(federation), copy / "state")
    shutil.copytree(machine_register().folder, copy / "ledgers")
    federation.start(SITE)
    return federation, copy


@pytest.mark.attack("ledger-rolled-back")
def test_an_older_folder_is_put_back_and_spends_twice(
    copied: tuple[Federation, Path],
) -> None:
    """Two deltas of one round, under different noise, and the ledger knows about one."""
    federation, copy = copied
    last = train(federation)
    first = federation.delta(SITE)
    put_back(federation, copy)
    train(federation, last, attempt=2)
    assert not np.array_equal(first, federation.delta(SITE))
    assert federation.spent_rounds(SITE) == 1


def state_spend(federation: Federation, options: str) -> None:
    federation.trainers[SITE].close()
    config = federation.folder / SITE / "client.toml"
    line = f"budget state-spend --by eve --why copied --config {config} {options}"
    result = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    federation.start(SITE)


def test_what_was_noticed_stays_noticed_until_the_spend_is_stated(
    copied: tuple[Federation, Path],
) -> None:
    federation, copy = copied
    last = train(federation)
    put_back(federation, copy)
    request = federation.showing(federation.header(attempt=2), last)
    assert federation.refusal(SITE, request) == "ledger-rolled-back"
    assert "state-spend" in federation.observers[SITE].errors[0].diagnostics()
    # A server that withholds the advert from now on, or a restart, changes nothing.
    assert federation.refusal(SITE, federation.train_request()) == "site-fault"
    federation.start(SITE)
    assert federation.refusal(SITE, federation.train_request()) == "site-not-ready"
    offer = OfferRequest(plan=sign(federation.operator, federation.plan))
    assert federation.refusal(SITE, offer) == "site-not-ready"
    state_spend(federation, "--rounds job=1")
    assert isinstance(federation.ask(SITE, offer), OfferReply)
    # The round is charged, but nothing of it leaves.
    assert federation.refusal(SITE, request) == "site-fault"
    assert "a state of this site that is gone" in federation.observers[SITE].errors[0].message
    assert federation.spent_rounds(SITE) == 1
    # The next round works; a server shows the same advert until it has another.
    vector = moved(federation.plan, 0.5)
    signed, _ = federation.release(vector, round=1)
    header = federation.header(round=2, adapter=adapter_digest(federation.plan.digest(), vector))
    federation.releases[header.adapter] = (signed, vector)
    reply = federation.ask(SITE, federation.showing(header, last))
    assert isinstance(reply, TrainReply)
    assert federation.spent_rounds(SITE) == 2


def test_a_site_that_was_not_put_back_goes_on_whatever_old_advert_it_is_shown(
    copied: tuple[Federation, Path],
) -> None:
    federation, _ = copied
    first = train(federation)
    second = train(federation, first, attempt=2)
    for number, last in enumerate((first, second, None), start=3):
        train(federation, last, attempt=number)
    federation.start(SITE)
    train(federation, first, attempt=6)
    assert federation.spent_rounds(SITE) == 1


def test_nobody_else_can_make_a_site_stop(copied: tuple[Federation, Path]) -> None:
    """An advert that this site did not sign says nothing about its ledger."""
    federation, _ = copied
    last = train(federation)
    advert = msgspec.msgpack.decode(last.advert.statement, type=KeyAdvert)
    forged = msgspec.structs.replace(advert, ledger_head=b"\x07" * 32)
    strangers = (federation.operator, federation.identities["site-01"], Identity(bytes(32)))
    for number, stranger in enumerate(strangers, start=2):
        shown = msgspec.structs.replace(last, advert=sign(stranger, forged))
        train(federation, shown, attempt=number)


def test_an_advert_is_shown_with_its_own_header(copied: tuple[Federation, Path]) -> None:
    federation, _ = copied
    last = train(federation)
    other = sign(federation.operator, federation.header(attempt=7))
    shown = msgspec.structs.replace(last, header=other)
    request = federation.showing(federation.header(attempt=2), shown)
    assert federation.refusal(SITE, request) == "other-context"


def test_a_backup_that_is_restored_spends_nothing_before_it_is_stated(
    copied: tuple[Federation, Path],
) -> None:
    federation, _ = copied
    config = str(federation.folder / SITE / "client.toml")
    backup = str(federation.folder / "b.tar")

    def command(*words: str) -> None:
        result = CliRunner().invoke(app, [*words, "--config", config], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    command("backup", "--out", backup)
    last = train(federation)
    federation.trainers[SITE].close()
    shutil.rmtree(state_of(federation))
    own = fingerprint(federation.identities[SITE].public_key)
    command("restore", backup, "--fingerprint", own)
    federation.start(SITE)
    for shown in (None, last):
        request = federation.showing(federation.header(attempt=2), shown)
        assert federation.refusal(SITE, request) == "site-not-ready"
    assert federation.observers[SITE].steps == 0
    state_spend(federation, "--rounds job=1")
    # The noise comes from the plan that the journal had accepted, since the ledger had no round.
    contents = read_ledger(state_of(federation) / "ledger.sqlite")
    (entry,) = contents.rounds.values()
    federation.offer(None, SITE)
    noise = federation.trainers[SITE].status("job").noise
    assert entry.event is not None
    assert entry.event.noise_multiplier == noise.noise_multiplier
    assert entry.event.sample_rate == noise.sampling_rate
    assert entry.event.steps == federation.plan.training.local_steps
    assert read_published(state_of(federation) / "session.sqlite").answers == 0
