import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from umbel_client.storage.journal import Journal, read_published
from umbel_common.errors import RemoteProtocolError, StorageError
from umbel_common.plans.statements import RoundHeader
from umbel_common.trust.identity import Signed

ONE, TWO = (
    Signed(statement=b"one", signature=bytes(64)),
    Signed(statement=b"two", signature=bytes(64)),
)
HEAD = b"\x07" * 32


def header(round_number: int = 1, attempt: int = 1) -> RoundHeader:
    return RoundHeader(
        federation="f",
        job="job",
        round=round_number,
        attempt=attempt,
        plan=bytes(32),
        roster=bytes(32),
        adapter=bytes(32),
        cohort=("a", "b", "c"),
    )


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Journal]:
    session = Journal(tmp_path / "session.sqlite")
    yield session
    session.close()


def test_an_answer_comes_back_for_the_same_request_only(session: Journal, tmp_path: Path) -> None:
    context = header().context()
    assert session.answer(context, "train", b"request") is None
    session.open_attempt(header(), HEAD, b"state", b"request", b"reply")
    session.close()
    again = Journal(tmp_path / "session.sqlite")
    assert again.answer(context, "train", b"request") == b"reply"
    with pytest.raises(RemoteProtocolError) as refusal:
        again.answer(context, "train", b"another")
    assert refusal.value.check == "second-answer"
    again.close()


def test_burning_replaces_the_state_and_the_last_stage_deletes_it(session: Journal) -> None:
    context = header().context()
    session.open_attempt(header(), HEAD, b"first", b"q", b"r")
    session.record_answer(context, "share", b"q", b"r", b"second")
    assert session.state(context) == b"second"
    session.record_answer(context, "unmask", b"q", b"r", None)
    with pytest.raises(RemoteProtocolError) as refusal:
        session.state(context)
    assert refusal.value.check == "attempt-over"


def test_a_stage_is_burned_once(session: Journal) -> None:
    context = header().context()
    session.open_attempt(header(), HEAD, b"first", b"q", b"r")
    session.record_answer(context, "share", b"q", b"r", b"second")
    with pytest.raises(StorageError):
        session.record_answer(context, "share", b"other", b"other", b"third")
    assert session.state(context) == b"second"
    assert session.answer(context, "share", b"q") == b"r"


def test_a_new_attempt_ends_the_old_ones(session: Journal) -> None:
    session.open_attempt(header(attempt=1), HEAD, b"secret", b"q", b"r")
    session.open_attempt(header(attempt=2), HEAD, b"state", b"q", b"r")
    with pytest.raises(RemoteProtocolError) as refusal:
        session.state(header(attempt=1).context())
    assert refusal.value.check == "attempt-over"
    for number in (1, 2):
        with pytest.raises(RemoteProtocolError) as refusal:
            session.check_new(header(attempt=number))
        assert refusal.value.check == "attempt-reused"
    session.check_new(header(attempt=3))
    session.check_new(header(round_number=2, attempt=1))


def test_secrets_of_a_stage_are_gone_from_all_files_once_the_next_is_answered(
    session: Journal, tmp_path: Path
) -> None:
    first, second = b"a very recognisable secret" * 4, b"another recognisable secret" * 4

    def on_disk(secret: bytes) -> bool:
        return any(secret in path.read_bytes() for path in tmp_path.iterdir())

    session.open_attempt(header(), HEAD, first, b"q", b"r")
    assert on_disk(first)
    session.record_answer(header().context(), "share", b"q", b"r", second)
    assert on_disk(second)
    assert not on_disk(first)
    session.record_answer(header().context(), "unmask", b"q", b"r", None)
    assert not on_disk(second)


def test_the_end_of_a_job_deletes_what_a_given_up_attempt_held(
    session: Journal, tmp_path: Path
) -> None:
    secret = b"a very recognisable secret" * 4
    session.open_attempt(header(), HEAD, secret, b"q", b"r")
    session.end_job("job")
    assert not any(secret in path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(RemoteProtocolError, match="over"):
        session.state(header().context())


def test_a_job_has_one_plan(session: Journal) -> None:
    session.accept_plan("job", ONE)
    session.accept_plan("job", ONE)
    assert session.plan("job") == ONE
    assert session.plans() == [ONE]
    with pytest.raises(RemoteProtocolError) as refusal:
        session.accept_plan("job", TWO)
    assert refusal.value.check == "job-has-other-plan"


def test_a_round_has_one_release(session: Journal) -> None:
    session.keep_release("job", 1, ONE)
    session.keep_release("job", 1, ONE)
    assert session.releases("job") == [ONE]
    with pytest.raises(RemoteProtocolError) as refusal:
        session.keep_release("job", 1, TWO)
    assert refusal.value.check == "two-releases"


def test_confirmed_survivor_sets_are_kept_over_attempts(session: Journal) -> None:
    session.open_attempt(header(attempt=1), HEAD, b"s", b"q", b"r")
    session.record_survivors(header(attempt=1).context(), ("a", "b"))
    session.open_attempt(header(attempt=2), HEAD, b"s", b"q", b"r")
    session.record_survivors(header(attempt=2).context(), ("a", "b", "c"))
    assert sorted(session.survivor_sets(header())) == [("a", "b"), ("a", "b", "c")]
    assert session.survivor_sets(header(round_number=2)) == []
    assert len(session.survivor_sets()) == 2


def test_the_ledger_head_that_was_signed_last_is_known(session: Journal) -> None:
    assert session.published().ledger_head is None
    session.open_attempt(header(attempt=1), HEAD, b"s", b"q", b"r")
    session.open_attempt(header(attempt=2), b"\x08" * 32, b"s", b"q", b"r")
    assert session.published().ledger_head == b"\x08" * 32


def test_answers_are_counted_and_stay_counted_when_their_attempt_is_over(
    session: Journal, tmp_path: Path
) -> None:
    session.open_attempt(header(attempt=1), HEAD, b"s", b"q", b"r")
    session.record_answer(header(attempt=1).context(), "share", b"q", b"r", b"t")
    session.open_attempt(header(attempt=2), HEAD, b"s", b"q", b"r")
    assert session.published() == read_published(tmp_path / "session.sqlite")
    assert session.published().answers == 3


def test_the_file_is_readable_by_its_owner_only(session: Journal, tmp_path: Path) -> None:
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_corrupt_journal_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "session.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match=r"session\.sqlite"):
        Journal(path)


def test_a_journal_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "session.sqlite"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StorageError, match="accepted: at most 3"):
        Journal(path)


@pytest.mark.parametrize(
    ("column", "read"),
    [
        ("attempts.header", lambda journal: journal.header(header().context())),
        ("attempts.survivors", lambda journal: journal.survivor_sets()),
        ("plans.plan", lambda journal: journal.plan("job")),
        ("releases.release", lambda journal: journal.keep_release("job", 1, ONE)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_does_not_decode_is_a_damaged_file_and_no_fault_of_the_server(
    session: Journal, tmp_path: Path, column: str, read: Callable[[Journal], object]
) -> None:
    session.accept_plan("job", ONE)
    session.keep_release("job", 1, ONE)
    session.open_attempt(header(), HEAD, b"state", b"q", b"r")
    session.record_survivors(header().context(), ("a", "b", "c"))
    read(session)
    damage(tmp_path / "session.sqlite", column)
    with pytest.raises(StorageError, match=r"session\.sqlite"):
        read(session)


def damage(path: Path, column: str) -> None:
    """Flips the bits of the first byte in each blob of a column, `table.name`."""
    table, name = column.split(".")
    database = sqlite3.connect(path)
    for row, value in database.execute(f"SELECT rowid, {name} FROM {table}").fetchall():
        flipped = bytes([value[0] ^ 0xFF]) + value[1:]
        database.execute(f"UPDATE {table} SET {name} = ? WHERE rowid = ?", (flipped, row))
    database.commit()
    database.close()
