"""`umbel-client budget`: true figures from a ledger alone, and a ledger that lies is named."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_client.ledger import spending
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.rows import AttemptKey
from umbel_client.privacy.accounting import DpEvent, epsilon
from umbel_client.privacy.attempt_cost import AttemptCost
from umbel_client.site.policy import Budget
from umbel_client.storage.journal import Journal
from umbel_common.errors import BudgetError, LedgerError
from umbel_common.plans.statements import RoundHeader
from umbel_host.entry import exit_code

DATA_SET = bytes(range(32))
PLAN = b"\x01" * 32
FIRST, SECOND = DpEvent(0.73, 0.1, 5), DpEvent(1.5, 0.05, 10)
UNLIMITED = Budget(math.inf, 1e-5)

CLIENT_TOML = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"
[data]
path = "notes.jsonl"
public_size = 50000
[model]
path = "model"
[policy]
total_epsilon = 8
"""
DELTA = 1 / 500_000
"""The smaller of the policy's 1e-5 and 1 / (10 x public size): what the ledger is held to."""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a site whose administrator works beside its client.toml."""
    (tmp_path / "client.toml").write_text(CLIENT_TOML)
    (tmp_path / "state").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


def charge(ledger: Ledger, job: str, number: int, event: DpEvent | None) -> None:
    ledger.reserve(job, PLAN, number, event, UNLIMITED)
    ledger.record_delta(job, number, b"\x02" * 32)
    ledger.record_sent(job, number)


@pytest.fixture
def ledger(state: Path) -> Path:
    """Two jobs, three sent rounds, and one that was only reserved."""
    with Ledger.open(state / "ledger.sqlite", DATA_SET) as ledger:
        charge(ledger, "first", 1, FIRST)
        charge(ledger, "second", 1, SECOND)
        charge(ledger, "first", 2, FIRST)
        ledger.reserve("second", PLAN, 2, SECOND, UNLIMITED)
    return state / "ledger.sqlite"


def run(line: str) -> str:
    result = CliRunner().invoke(app, ["budget", *line.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def asked(line: str) -> Any:
    return msgspec.json.decode(run(f"{line} --json"))


def refusal(line: str) -> LedgerError:
    with pytest.raises(LedgerError) as caught:
        CliRunner().invoke(app, ["budget", *line.split()], catch_exceptions=False)
    assert caught.value.exit_code == 33
    return caught.value


def test_show_tells_what_is_spent_what_is_left_and_each_jobs_part(ledger: Path) -> None:
    spent = epsilon([FIRST, SECOND, FIRST, SECOND], DELTA)
    shown = asked("show")
    assert shown["spent"] == pytest.approx(spent)
    assert shown["left"] == pytest.approx(8 - spent)
    assert (shown["delta"], shown["total"]) == (DELTA, 8.0)
    assert [(job["job"], job["rounds"]) for job in shown["jobs"]] == [("first", 2), ("second", 2)]
    assert shown["jobs"][1]["epsilon"] == pytest.approx(epsilon([SECOND, SECOND], DELTA))
    assert f"epsilon {spent:.4g} at delta 2e-06" in run("show")


def test_history_tells_each_release_and_epsilon_after_it(ledger: Path) -> None:
    releases = asked("history")
    assert [(entry["job"], entry["round"], entry["state"]) for entry in releases] == [
        ("first", 1, "sent"),
        ("second", 1, "sent"),
        ("first", 2, "sent"),
        ("second", 2, "reserved"),
    ]
    assert [entry["epsilon"] for entry in releases] == pytest.approx(
        [
            epsilon(events, DELTA)
            for events in ([FIRST], [FIRST, SECOND], [FIRST] * 2 + [SECOND], [FIRST, SECOND] * 2)
        ]
    )
    second = releases[1]
    assert (second["noise_multiplier"], second["sample_rate"], second["steps"]) == (1.5, 0.05, 10)
    assert run("history").count("first") == 2


def test_of_a_long_history_each_jobs_last_round_has_an_epsilon(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spending, "FEW_ROUNDS", 5)
    with Ledger.open(state / "ledger.sqlite", bytes(32)) as ledger:
        for job, rounds in (("one", 4), ("two", 2)):
            for number in range(1, rounds + 1):
                charge(ledger, job, number, DpEvent(2.0, 1.0, 1))
    rows = asked("history")
    assert [(row["job"], row["round"]) for row in rows if "epsilon" in row] == [
        ("one", 4),
        ("two", 2),
    ]
    every = asked("history --every-round")
    assert all(row["epsilon"] > 0 for row in every)
    assert every[3] == rows[3]
    assert every[5] == rows[5]


def test_a_round_without_privacy_leaves_nothing(state: Path) -> None:
    with Ledger.open(state / "ledger.sqlite", DATA_SET) as ledger:
        charge(ledger, "open", 1, None)
    shown = asked("show")
    assert (shown["spent"], shown["left"]) == (None, 0.0)
    assert "epsilon infinite" in run("show")
    assert asked("history")[0]["noise_multiplier"] is None
    assert "none" in run("history")


def test_a_ledger_without_releases_has_its_whole_budget(state: Path) -> None:
    Ledger.open(state / "ledger.sqlite", DATA_SET).close()
    assert asked("show")["left"] == 8.0
    assert run("history") == "No round was charged yet.\n"


@pytest.mark.parametrize("command", ["history", "verify"])
def test_where_there_is_no_ledger_none_is_made(state: Path, command: str) -> None:
    assert "no privacy ledger" in refusal(command).message
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("command", ["show", "history", "verify"])
def test_a_damaged_ledger_is_named_whatever_is_asked(ledger: Path, command: str) -> None:
    data = bytearray(ledger.read_bytes())
    place = data.index(b"second")
    data[place] ^= 1
    ledger.write_bytes(data)
    assert "damaged" in refusal(command).message


def test_verify_finds_every_head_that_was_published(ledger: Path) -> None:
    with Ledger.open(ledger, DATA_SET) as opened:
        published = opened.head().hex()
        charge(opened, "first", 3, FIRST)
    verified = asked(f"verify --head {published.upper()}")
    assert (verified["given"], verified["rows"]) == (published, 14)
    assert verified["head"] != published
    assert "head that was published" in refusal(f"verify --head {'ab' * 32}").message


def journal_with(state: Path, head: bytes) -> None:
    """The journal of a site that answered once."""
    header = RoundHeader("f", "first", 3, 1, PLAN, PLAN, PLAN, ("a", "b", "c"))
    session = Journal(state / "session.sqlite")
    session.open_attempt(header, head, b"state", b"request", b"reply")
    session.close()


def test_an_old_ledger_is_noticed_by_what_this_site_signed_last(ledger: Path, state: Path) -> None:
    old = shutil.copy(ledger, ledger.with_name("old"))
    with Ledger.open(ledger, DATA_SET) as opened:
        charge(opened, "first", 3, FIRST)
        journal_with(state, opened.head())
        opened.keep_pace(1)
        assert asked("verify")["last_signed"] == opened.head().hex()
    shutil.copy(old, ledger)
    for command in ("show", "history", "verify"):
        assert "head that was published" in refusal(command).message


def test_an_old_journal_is_noticed(ledger: Path, state: Path) -> None:
    with Ledger.open(ledger, DATA_SET) as opened:
        journal_with(state, opened.head())
        opened.keep_pace(2)
    assert "journal is older" in refusal("verify").message


def test_carry_charges_the_changed_data_set(ledger: Path) -> None:
    before = asked("show")
    printed = run(f"carry --data-set {'cd' * 32}")
    assert "4, which stay charged" in printed
    after = asked("show")
    assert after["data_set"] == "cd" * 32
    assert (after["spent"], after["jobs"]) == (before["spent"], before["jobs"])
    run(f"verify --head {before['head']}")


def test_carry_waits_until_no_client_uses_the_ledger(ledger: Path) -> None:
    with Ledger.open(ledger, DATA_SET):
        assert "another process" in refusal(f"carry --data-set {'cd' * 32}").message
    assert asked("show")["data_set"] == DATA_SET.hex()


@pytest.mark.parametrize("line", ["verify --head 12", "verify --head xy", "carry --data-set 12"])
def test_half_a_digest_is_a_wrong_command_line(ledger: Path, line: str) -> None:
    assert CliRunner().invoke(app, ["budget", *line.split()]).exit_code == 2


def test_without_a_ledger_the_command_ends_with_its_exit_code(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(lambda: app(["budget", "verify"], standalone_mode=False)) == 33
    assert "no privacy ledger" in capsys.readouterr().err


def test_a_new_site_has_spent_nothing(state: Path) -> None:
    done = CliRunner().invoke(app, ["budget", "show"])
    assert (done.exit_code, "Nothing was spent yet" in done.stdout) == (0, True)
    found = json.loads(CliRunner().invoke(app, ["budget", "show", "--json"]).stdout)
    assert (found["spent"], found["left"], found["jobs"]) == (0.0, found["total"], [])
    assert (found["data_set"], found["head"], found["old_copy"]) == (None, None, False)
    assert list(state.iterdir()) == []


def test_a_ledger_that_a_journal_knows_is_missing_and_not_new(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state.mkdir(exist_ok=True)
    Journal(state / "session.sqlite").close()
    assert exit_code(lambda: app(["budget", "show"], standalone_mode=False)) == 33
    assert "no privacy ledger" in capsys.readouterr().err


OWN, SHARED = DpEvent(1.0, 0.05, 1), DpEvent(1.7, 0.05, 1)
COST = AttemptCost(OWN, SHARED, honest=3, counts=None, most_attempts=9)


@pytest.fixture
def two_totals(state: Path) -> Path:
    """A job of local mode, and one of distributed mode with two attempts at its first round."""
    with (state.parent / "client.toml").open("a") as file:
        file.write("total_shared_epsilon = 6\n")
    unlimited = Budget(math.inf, 1e-5, math.inf)
    with Ledger.open(state / "ledger.sqlite", DATA_SET) as ledger:
        charge(ledger, "first", 1, FIRST)
        for attempt in (1, 2):
            ledger.reserve_attempt(AttemptKey("shared", 1, attempt), PLAN, COST, unlimited)
        ledger.record_vector(AttemptKey("shared", 1, 2), b"\x03" * 32)
    return state / "ledger.sqlite"


def test_show_tells_both_totals_once_noise_was_shared(two_totals: Path) -> None:
    spent = epsilon([FIRST, OWN, OWN], DELTA)
    shared = epsilon([FIRST, SHARED, SHARED], DELTA)
    found = asked("show")
    assert found["spent"] == pytest.approx(spent)
    assert found["shared"] == {
        "total": 6.0,
        "spent": pytest.approx(shared),
        "left": pytest.approx(6 - shared),
        "honest": 3,
    }
    first, second = found["jobs"]
    assert (first["epsilon"], first["attempts"]) == (first["shared_epsilon"], None)
    assert (second["rounds"], second["attempts"]) == (1, 2)
    assert second["epsilon"] == pytest.approx(epsilon([OWN, OWN], DELTA))
    assert second["shared_epsilon"] == pytest.approx(epsilon([SHARED, SHARED], DELTA))
    shown = " ".join(run("show").split())
    assert f"epsilon {spent:.4g} at delta 2e-06, against everybody" in shown
    assert (
        f"epsilon {shared:.4g} at delta 2e-06, against readers of the sums, while 3 sites in each"
        " keep their noise secret" in shown
    )


def test_show_has_one_total_while_no_noise_was_shared(ledger: Path) -> None:
    assert asked("show")["shared"] is None
    shown = run("show")
    assert "everybody" not in shown
    assert "readers" not in shown


def test_history_tells_each_attempt_and_both_totals_after_it(two_totals: Path) -> None:
    local, first, second = asked("history")
    assert "attempt" not in local
    assert [(one["round"], one["attempt"], one["state"]) for one in (first, second)] == [
        (1, 1, "reserved"),
        (1, 2, "computed"),
    ]
    assert (first["noise_multiplier"], first["shared_noise_multiplier"]) == (1.0, 1.7)
    assert second["epsilon"] == pytest.approx(epsilon([FIRST, OWN, OWN], DELTA))
    assert second["shared_epsilon"] == pytest.approx(epsilon([FIRST, SHARED, SHARED], DELTA))
    shown = run("history")
    assert "1.1" in shown
    assert "1.2" in shown
    assert f"{second['shared_epsilon']:.4g}" in shown


def state_spend(line: str) -> str:
    command = ["budget", "state-spend", "--by", "weber", "--why", "disk", *line.split()]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_a_statement_counts_the_attempts_of_a_job_that_shares_noise(two_totals: Path) -> None:
    with pytest.raises(BudgetError, match="have to be counted") as caught:
        state_spend("--rounds shared=4")
    assert caught.value.accepted == "2 (as the ledger has) to 9"
    with pytest.raises(BudgetError, match="have to be counted"):
        state_spend("--rounds shared=4 --attempts shared=1")
    with pytest.raises(BudgetError, match="local mode"):
        state_spend("--rounds first=4 --attempts first=4")
    with pytest.raises(BudgetError, match="last round is not"):
        state_spend("--nothing --attempts shared=4")
    printed = state_spend("--rounds shared=4 --rounds first=2 --attempts shared=6")
    assert "first came to round 2, shared came to round 4, with 4 attempts more" in printed
    assert "1 rounds more, 2 in all; 4 attempts more" in printed
    found = asked("show")
    assert found["spent"] == pytest.approx(epsilon([FIRST, FIRST, *[OWN] * 6], DELTA))
    shared = epsilon([FIRST, FIRST, *[SHARED] * 6], DELTA)
    assert found["shared"]["spent"] == pytest.approx(shared)
    assert [job["attempts"] for job in found["jobs"]] == [None, 6]
    last = asked("history")[-1]
    assert (last["round"], last["attempts"], last["state"]) == (4, 4, "lost")
    assert "to 4, 4 attempts" in run("history")


def test_a_count_is_a_number(state: Path) -> None:
    line = ["budget", "state-spend", "--by", "a", "--why", "b", "--attempts", "shared=x"]
    assert CliRunner().invoke(app, line).exit_code == 2
