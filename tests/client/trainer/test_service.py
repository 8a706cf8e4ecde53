"""What a trainer looks at before it takes requests, and what its people see meanwhile."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from umbel_client.cli import doctor, running_trainer, service
from umbel_client.cli.command import app
from umbel_client.data.site_data import SiteData
from umbel_client.ledger.ledger import Ledger
from umbel_client.site.config import ClientConfig, load_config
from umbel_client.site.ipc import SharedEpsilon, TrainerStatus
from umbel_client.site.pinned_roster import Pinned
from umbel_client.trainer.log import SiteLog
from umbel_client.trainer.service import _read_data
from umbel_common.errors import DataError, LedgerError, UnreachableError
from umbel_common.trust.identity import Identity, Roster

CLIENT_TOML = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"
[data]
path = "notes.jsonl"
public_size = 4
{unit}
[model]
path = "model"
[policy]
labels = ["a", "b"]
[relay]
server = "127.0.0.1:9"
"""
ROWS = [{"text": f"note {number}", "label": "ab"[number % 2], "who": number} for number in range(4)]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ClientConfig]:
    """Writes a site's files, in the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(rows: list[dict[str, Any]] = ROWS, unit: str = "") -> ClientConfig:
        Path("notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("client.toml").write_text(CLIENT_TOML.format(unit=unit))
        Path("state").mkdir(exist_ok=True)
        return load_config(Path("client.toml"))

    return write


def open_ledger(config: ClientConfig) -> None:
    data_set = SiteData.load(config).data_set
    assert data_set is not None
    Ledger.open(config.state_folder.ledger, data_set, config.data.unit_column).close()


OTHERS = {
    "a record more": {"rows": [*ROWS, ROWS[0]]},
    "another label": {"rows": [{**ROWS[0], "label": "b"}, *ROWS[1:]]},
    "another unit": {"unit": 'unit_column = "who"'},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_changed_file_stops_a_trainer_at_its_start_and_in_doctor(
    site: Callable[..., ClientConfig], change: dict[str, Any]
) -> None:
    config = site()
    assert _read_data(config).read
    open_ledger(config)
    assert _read_data(config).read
    assert doctor._ledger(config)[0] is doctor.Verdict.FINE
    changed = site(**change)
    with pytest.raises(LedgerError) as caught:
        _read_data(changed)
    finding = doctor._tried("ledger", doctor._ledger, changed)
    assert finding.verdict is doctor.Verdict.BROKEN
    assert finding.text == caught.value.diagnostics()
    if "unit" not in change:
        data_set = SiteData.load(changed).data_set
        assert data_set is not None
        assert f"budget carry --data-set {data_set.hex()}" in str(caught.value.remedy)


def test_doctor_says_that_people_are_asked_about_labels_where_they_are(
    site: Callable[..., ClientConfig],
) -> None:
    site()
    config = Path("client.toml")
    text = config.read_text().replace('labels = ["a", "b"]', "labels = []")
    for approval, verdict, said in (
        ("each-plan", doctor.Verdict.CARE, "umbel-client approve offers"),
        ("none", doctor.Verdict.BROKEN, "every plan is refused"),
    ):
        config.write_text(text.replace("[policy]", f'[policy]\napproval = "{approval}"'))
        found = doctor._tried("data", doctor._data, load_config(config))
        assert (found.verdict, said in found.text) == (verdict, True)


def test_doctor_reads_the_data_once(
    site: Callable[..., ClientConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = site()
    open_ledger(config)
    names = ("data", "ledger", "data set")
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in names})
    monkeypatch.setattr(doctor, "_SPEAKING", ())
    # It would last, and these checks speak to nobody.
    monkeypatch.setattr(doctor, "confine_command", lambda: None)
    load, read = SiteData.load, []

    def noted(config: ClientConfig) -> SiteData:
        read.append(config.data.path)
        return load(config)

    monkeypatch.setattr(SiteData, "load", noted)
    assert [finding.name for finding in doctor.examine(config)] == [*names]
    assert read == [config.data.path]


def test_a_file_that_no_task_can_use_is_named_first(site: Callable[..., ClientConfig]) -> None:
    with pytest.raises(DataError):
        _read_data(site(rows=[{"words": "a"}]))


def status(monkeypatch: pytest.MonkeyPatch, answer: TrainerStatus | None, *words: str) -> Any:
    class Stub:
        def __init__(self, path: Path) -> None:
            assert path.name == "control.sock"

        def status(self, seconds: float = 5.0) -> TrainerStatus:
            if answer is None:
                raise UnreachableError("it does not answer", found="connect failed")
            return answer

        def close(self) -> None:
            pass

    monkeypatch.setattr(running_trainer, "ControlStub", Stub)
    return CliRunner().invoke(app, ["status", *words], catch_exceptions=False)


def running(**fields: Any) -> TrainerStatus:
    found: dict[str, Any] = dict.fromkeys(("epsilon", "last"))
    found |= {"site": "north", "federation": "clinics", "isolated": True, "paused": False}
    return TrainerStatus(**(found | {"waiting": (), "device": "cpu"} | fields))


def test_status_answers_whatever_the_trainer_does(
    site: Callable[..., ClientConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    site()
    down = status(monkeypatch, None)
    assert "trainer  not running: umbel-client run" in down.stdout
    assert "relay    not running" in down.stdout
    assert json.loads(status(monkeypatch, None, "--json").stdout)["trainer"] is None
    starting = status(monkeypatch, running(starting=True, device=None))
    assert starting.exit_code == 0
    assert "trainer  starting" in starting.stdout
    # Nothing is pinned here, so what this trainer believes is another roster.
    assert "stop umbel-client run" in status(monkeypatch, running(pinned="1" * 64)).stdout
    assert "stop umbel-client run" not in status(monkeypatch, running()).stdout


def test_what_a_trainer_believes_has_a_mark_that_any_change_changes() -> None:
    keys = [Identity(bytes([number]) * 32).public_key for number in (1, 2)]
    rosters = [Roster("clinics", key, ()) for key in keys]
    pinned = [
        Pinned(rosters[0], frozenset()),
        Pinned(rosters[1], frozenset()),
        Pinned(rosters[0], frozenset({keys[1]})),
        Pinned(rosters[0], frozenset(), (rosters[1],)),
    ]
    assert len({one.mark() for one in pinned}) == len(pinned)


def test_the_log_says_what_is_charged_once_and_where_an_adapter_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    log = SiteLog(logging.getLogger("umbel.trainer"))
    log.charged(3, 1.25, again=False)
    log.charged(3, 1.25, again=True)
    log.finished("clinics", Path("/srv/state/adapters/clinics"))
    assert [record.getMessage() for record in caplog.records] == [
        "round 3 is charged: epsilon 1.25 in all",
        "round 3 was charged before, nothing is charged now: epsilon 1.25 in all",
        "clinics is finished; its adapter is in /srv/state/adapters/clinics",
    ]
    assert log.last is not None
    assert log.last.kind == "finished"


def test_the_log_and_the_status_tell_both_totals_once_noise_was_shared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    log = SiteLog(logging.getLogger("umbel.trainer"))
    log.charged(3, 1.25, again=False, shared=SharedEpsilon(0.625, 4))
    readers = (
        "epsilon 0.625 against readers of the sums, while 4 sites in each keep their noise secret"
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"round 3 is charged: epsilon 1.25 against everybody, and {readers}, in all"
    ]
    told = TrainerStatus(
        site="north",
        federation="clinics",
        isolated=True,
        paused=False,
        waiting=(),
        epsilon=log.epsilon,
        last=None,
        shared=log.shared,
    )
    lines = service._status_lines(told, "connected")
    assert lines[-2:] == [("spent", "epsilon 1.25 against everybody"), ("", readers)]
    alone = msgspec.structs.replace(told, shared=None)
    assert service._status_lines(alone, "connected")[-1] == ("spent", "epsilon 1.25")
