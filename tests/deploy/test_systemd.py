"""The units as they lie in deploy/systemd: well formed, closed, and put in place and taken away."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from umbel_client.ledger.register import MACHINE

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*/*.service"))
MOST_EXPOSURE = {"umbel-trainer.service": 2.0}
"""As systemd-analyze counts, from 0 to 10; 3 for all others."""
UNITS_OF_DEBIAN = Path("/lib/systemd/system")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("systemd-sysusers") is None,
    reason="only root makes users and gives files away, and systemd's own tools do it",
)


def analyze(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def install(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [FOLDER / "install", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with a Python for the units and those of systemd itself."""
    for name in ("opt/umbel/bin/python", "bin/true"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch(0o755)
    return tmp_path


def tree(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Mode, owner, group and content of everything in a tree; users' files keep no time."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            content,
        )
    return found


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_is_closed(unit: Path) -> None:
    shown = analyze("security", "--offline=true", unit).stdout
    (level,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", shown)
    assert float(level) <= MOST_EXPOSURE.get(unit.name, 3.0), shown


@needs_systemd
def test_what_the_tool_says_of_a_unit_that_is_open(tmp_path: Path) -> None:
    """Or the figures above would prove nothing."""
    unit = tmp_path / "open.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    (level,) = re.findall(
        r"level for \S+: ([0-9.]+)", analyze("security", "--offline=1", unit).stdout
    )
    assert float(level) > 9


@needs_systemd
@needs_root
@pytest.mark.skipif(not UNITS_OF_DEBIAN.exists(), reason="systemd's own units are elsewhere")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_is_well_formed(unit: Path, root: Path) -> None:
    for role in ("site", "operator"):
        assert install(role, "--root", root).returncode == 0
    shutil.copytree(UNITS_OF_DEBIAN, root / "usr/lib/systemd/system", symlinks=True)
    verified = analyze("verify", f"--root={root}", "--man=no", unit.name)
    ours = [line for line in verified.stderr.splitlines() if "umbel" in line]
    assert not ours, verified.stderr
    (root / "etc/systemd/system" / unit.name).write_text(
        unit.read_text().replace("PrivateUsers=", "PrivateUser=")
    )
    assert "PrivateUser'" in analyze("verify", f"--root={root}", "--man=no", unit.name).stderr


@needs_root
@pytest.mark.parametrize("role", ["site", "operator"])
def test_installing_twice_changes_nothing_and_undoing_leaves_what_is_the_users(
    root: Path, role: str
) -> None:
    before = {path for path in root.rglob("*") if path.is_file()}
    first = install(role, "--root", root)
    assert first.returncode == 0, first.stderr
    made = tree(root)
    configuration = {"site": "etc/umbel", "operator": "etc/umbel-server"}[role]
    precious = root / configuration / "identity.pem"
    precious.write_text("a key")
    again = install(role, "--root", root)
    assert "installed" not in again.stdout
    precious.unlink()
    assert tree(root) == made
    precious.write_text("a key")
    undone = install(role, "--root", root, "--undo")
    assert undone.returncode == 0
    left = {path for path in root.rglob("*") if path.is_file()} - before
    assert precious in left
    assert not {path for path in left if path.suffix in (".service", ".conf")}
    assert (root / "etc/passwd").read_text().count("umbel-") >= 2
    assert install(role, "--root", root, "--undo").returncode == 0


@needs_root
def test_a_unit_that_somebody_changed_is_put_right(root: Path) -> None:
    install("site", "--root", root)
    unit = root / "etc/systemd/system/umbel-relay.service"
    unit.write_text("")
    done = install("site", "--root", root)
    assert f"installed  {unit}" in done.stdout
    assert done.stdout.count("installed") == 1
    assert unit.read_bytes() == (FOLDER / "site" / unit.name).read_bytes()


def nothing(root: Path) -> tuple[object, ...]:
    return ()


def no_such_role(root: Path) -> tuple[object, ...]:
    return ("clinic",)


def no_such_root(root: Path) -> tuple[object, ...]:
    return ("site", "--root", root / "nowhere")


def root_without_a_value(root: Path) -> tuple[object, ...]:
    return ("site", "--root")


@needs_root
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (nothing, 2, "usage: install"),
        (no_such_role, 2, "unknown argument clinic"),
        (root_without_a_value, 2, "usage: install"),
        (no_such_root, 1, "is not a folder"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_changes_nothing(
    root: Path, arguments: Callable[[Path], tuple[object, ...]], code: int, said: str
) -> None:
    before = tree(root)
    done = install(*arguments(root))
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert tree(root) == before


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_writes_no_core_and_runs_nothing_from_a_working_folder(unit: Path) -> None:
    text = unit.read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    if start != "/bin/true":
        assert start.startswith("/opt/umbel/bin/python -P -m umbel_")
        assert "\nLimitCORE=0\n" in text


@pytest.mark.parametrize(
    ("unit", "places"),
    [("site/umbel-trainer", {"/run/umbel"}), ("operator/umbel-rounds", {"/run/umbel-server"})],
)
def test_a_unit_without_a_network_does_not_see_the_sockets_of_others(
    unit: str, places: set[str]
) -> None:
    text = (FOLDER / f"{unit}.service").read_text()
    assert "\nTemporaryFileSystem=/run:ro\n" in text
    assert set(re.findall(r"^BindPaths=(.*)$", text, re.MULTILINE)) <= places
    # Without this call it could not install its own filter, which does more than the unit's.
    assert re.search(r"^SystemCallFilter=seccomp\b", text, re.MULTILINE)


def test_the_relay_may_open_nothing_of_the_trainers() -> None:
    """The folders that one unit needs are those that the other is kept out of."""
    relay = (FOLDER / "site" / "umbel-relay.service").read_text()
    for path in ("/var/lib/umbel-trainer", "/var/lib/umbel-ledgers", "/etc/umbel/identity.pem"):
        assert re.search(rf"^InaccessiblePaths=.*-{path}\b", relay, re.MULTILINE)
    users = re.findall(r"^User=(.*)$", "".join(unit.read_text() for unit in UNITS), re.MULTILINE)
    assert set(users) == {"umbel-trainer", "umbel-relay", "umbel-port", "umbel-rounds"}


def test_the_trainers_unit_keeps_the_register_of_ledgers() -> None:
    unit = (FOLDER / "site" / "umbel-trainer.service").read_text()
    folders = re.findall(r"^StateDirectory=(.*)$", unit, re.MULTILINE)
    assert f"/var/lib/{folders[0].split()[-1]}" == str(MACHINE)
    tmpfiles = (FOLDER / "site" / "umbel-site.tmpfiles.conf").read_text()
    assert re.search(rf"^d {MACHINE} +0700 umbel-trainer ", tmpfiles, re.MULTILINE)
