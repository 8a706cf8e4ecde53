"""Attacks that spend one data set's budget twice: a second ledger for the same records.

Each is run twice: with the register of ledgers, and with the register taken out.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adversarial.site_process import Quiet
from support.small_models import one_round, plan_for

from umbel_client.data.site_data import SiteData
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import Register, machine_register
from umbel_client.ledger.rows import Stated
from umbel_client.privacy.accounting import total_epsilon
from umbel_client.site.config import ClientConfig, DataConfig, ModelConfig
from umbel_client.site.policy import Policy
from umbel_client.storage.journal import Published
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.trainer import opening
from umbel_common.errors import BudgetError, LedgerError, StorageError
from umbel_common.plans.plan import Classification, LocalPrivacy

TOTAL = 8.0
DELTA = 1e-4
Attack = Callable[[Path], tuple[Path, str | None]]
"""Makes a second site beside the folder `first`: its folder, and the name of its data set."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("self_test", "largest_record_test"):
        monkeypatch.setattr(opening, name, lambda *_, **__: None)
    monkeypatch.setattr(opening, "choose_batch_limit", lambda *_: BatchLimit(4))


@pytest.fixture
def spend(tmp_path: Path, tiny_model: Path) -> Callable[..., float]:
    plan = plan_for(
        tiny_model,
        Classification(labels=("a", "b")),
        training=one_round(12),
        privacy=LocalPrivacy(epsilon=7.9, delta=DELTA, clip_norm=1.0),
    )

    def charge(folder: Path, name: str | None = "notes", *, rounds: int = 1) -> float:
        """Charges a whole budget at a site, and returns what its ledger says is spent."""
        config = ClientConfig(
            site="north",
            state=str(folder / "state"),
            identity="identity.pem",
            roster="roster.json",
            data=DataConfig(path=str(folder / "data.jsonl"), public_size=12, name=name),
            model=ModelConfig(path=str(tiny_model)),
            policy=Policy(total_epsilon=TOTAL, labels=("a", "b"), max_delta=DELTA),
        )
        (folder / "state").mkdir(exist_ok=True)
        opened = opening.open_job(
            config,
            plan,
            None,  # type: ignore[arg-type]  # asked for size classes only
            SiteData.load(config),
            register=machine_register(),
            published=Published(ledger_head=None, answers=0),
            observer=Quiet(),
            entropy=bytes,
        )
        try:
            for number in range(1, rounds + 1):
                opened.reserve(number)
            return opened._ledger.spent(DELTA)
        finally:
            opened.close()

    return charge


def site(folder: Path, rows: int = 12) -> Path:
    folder.mkdir()
    records = [{"text": f"w{number}", "label": "ab"[number % 2]} for number in range(rows)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    return folder


def _same_file(folder: Path) -> tuple[Path, str | None]:
    second = folder / "second"
    second.mkdir()
    (second / "data.jsonl").symlink_to(folder / "first" / "data.jsonl")
    return second, "others"


def _same_bytes(folder: Path) -> tuple[Path, str | None]:
    return site(folder / "second"), "others"


def _same_bytes_without_a_name(folder: Path) -> tuple[Path, str | None]:
    return site(folder / "second"), None


def _changed_file_of_that_name(folder: Path) -> tuple[Path, str | None]:
    return site(folder / "second", rows=13), "notes"


def _changed_file_in_that_place(folder: Path) -> tuple[Path, str | None]:
    second, _ = _same_file(folder)
    (folder / "first" / "data.jsonl").write_text('{"text": "w1", "label": "a"}\n' * 12)
    return second, None


def _state_folder_removed(folder: Path) -> tuple[Path, str | None]:
    shutil.rmtree(folder / "first" / "state")
    return folder / "first", "notes"


def _folder_moved_and_state_removed(folder: Path) -> tuple[Path, str | None]:
    second = (folder / "first").rename(folder / "second")
    shutil.rmtree(second / "state")
    return second, "notes"


def _state_folder_rolled_back(folder: Path) -> tuple[Path, str | None]:
    state = folder / "first" / "state"
    shutil.rmtree(state)
    shutil.copytree(folder / "before", state)
    return folder / "first", "notes"


def _former_copy_elsewhere(folder: Path) -> tuple[Path, str | None]:
    """A copy from before the charge, over changed data of another name, without the journal."""
    second = site(folder / "second", rows=12)
    shutil.copytree(folder / "before", second / "state")
    return second, "others"


ATTACKS: tuple[Attack, ...] = (
    _same_file,
    _same_bytes,
    _same_bytes_without_a_name,
    _changed_file_of_that_name,
    _changed_file_in_that_place,
    _state_folder_removed,
    _folder_moved_and_state_removed,
    _state_folder_rolled_back,
    _former_copy_elsewhere,
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_data_set_is_not_charged_in_a_second_ledger(
    attack: Attack,
    spend: Callable[..., float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the register, nothing more is charged; without it, each ledger says less than all."""
    for held in (True, False):
        world = tmp_path / str(held)
        world.mkdir()
        if not held:
            monkeypatch.setattr(Register, "require_free", lambda *_: None)
            monkeypatch.setattr(Register, "enter", lambda *_: None)
        first = site(world / "first")
        spend(first, rounds=0)
        shutil.copytree(first / "state", world / "before")
        spent = spend(first)
        events = read_ledger(first / "state" / "ledger.sqlite").events()
        folder, name = attack(world)
        if held:
            with pytest.raises(LedgerError):
                spend(folder, name)
        else:
            again = spend(folder, name)
            events += read_ledger(folder / "state" / "ledger.sqlite").events()
            assert spent <= TOTAL >= again
            assert total_epsilon(events, DELTA) > TOTAL


def test_a_lost_ledger_is_replaced_once_somebody_states_what_was_spent(
    spend: Callable[..., float], tmp_path: Path
) -> None:
    first = site(tmp_path / "first")
    spend(first)
    shutil.rmtree(first / "state")
    with pytest.raises(LedgerError, match="old copy"):
        spend(first)
    path = first / "state" / "ledger.sqlite"
    contents = read_ledger(path)
    stated = Stated((), True, "2026-11-26T17:24:05+00:00", "weber", "the disk broke")
    with Ledger.open(path, contents.data_set) as ledger:
        ledger.charge_statement(stated)
        machine_register().settle(ledger)
    with pytest.raises(BudgetError):
        spend(first)


def test_a_moved_site_a_changed_name_and_a_shared_state_go_on(
    spend: Callable[..., float], tmp_path: Path
) -> None:
    spent = spend(site(tmp_path / "first"), None)
    assert spend(tmp_path / "first", "notes") == spent
    moved = (tmp_path / "first").rename(tmp_path / "second")
    assert spend(moved, "notes") == spent
    # Two federations: another folder, and its state is that of the first.
    other = tmp_path / "other"
    other.mkdir()
    (other / "state").symlink_to(moved / "state")
    (other / "data.jsonl").symlink_to(moved / "data.jsonl")
    assert spend(other, "notes") == spent
    assert len(machine_register().find(frozenset({"name notes"}))) == 1


def test_other_data_have_a_ledger_of_their_own(spend: Callable[..., float], tmp_path: Path) -> None:
    spent = spend(site(tmp_path / "first"), "notes")
    assert spend(site(tmp_path / "second", rows=13), "letters") == spent


def test_no_row_is_added_after_the_register_lost_a_ledger(
    spend: Callable[..., float], tmp_path: Path
) -> None:
    spend(site(tmp_path / "first"))
    register = machine_register()
    (entry,) = register.find(frozenset({"name notes"}))
    contents = read_ledger(Path(entry.ledger))
    with Ledger.open(Path(entry.ledger), contents.data_set) as ledger:
        register.enter(ledger, frozenset({"name notes"}))
        shutil.rmtree(register.folder)
        with pytest.raises(LedgerError, match="no longer knows"):
            ledger.record_delta("j", 1, bytes(32))


def test_the_environment_does_not_move_the_register(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = machine_register().folder
    for name in ("HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "USER", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    assert machine_register().folder == before


def test_a_folder_of_the_machine_is_the_register_of_all_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbel_client.ledger.register.MACHINE", tmp_path / "ledgers")
    assert machine_register().folder != tmp_path / "ledgers"
    (tmp_path / "ledgers").mkdir()
    assert machine_register().folder == tmp_path / "ledgers"


def test_a_user_without_a_home_is_told_what_to_make(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(StorageError, match="no place"):
        machine_register()


def test_a_damaged_register_is_not_taken_for_an_empty_one(
    spend: Callable[..., float], tmp_path: Path
) -> None:
    spend(site(tmp_path / "first"))
    (file,) = machine_register().folder.glob("*.json")
    file.write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        spend(tmp_path / "first")
