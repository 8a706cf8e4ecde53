"""Wheel and source distribution: the same bytes from one commit, whole, and nothing private."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "umbel_common": "common",
    "umbel_host": "common",
    "umbel_client": "client",
    "umbel_server": "server",
    "umbel_simulations": "simulations",
}
TIME = "1767225600"
PRIVATE = ("federation/operator/identity.pem", "deploy/compose/.env", "deploy/compose/site-a/x.pem")


def checkout(folder: Path) -> None:
    """What git has of the working tree, as somebody else would have it; and what lay there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place)
            # Execute bits are git's, everything else is the umask's.
            if os.access(ROOT / name, os.X_OK):
                place.chmod(place.stat().st_mode | (0o111 & ~os.umask(os.umask(0))))
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")


def built(folder: Path, umask: int) -> Path:
    """`python -m build`, in a checkout of its own under another umask and at another time."""
    former = os.umask(umask)
    try:
        checkout(folder / "source")
        done = subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"],
            cwd=folder / "source",
            env={**os.environ, "SOURCE_DATE_EPOCH": TIME},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.umask(former)
    assert done.returncode == 0, done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("one"), 0o022)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_commit_gives_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    one, other = digests(dist), digests(built(tmp_path / "elsewhere", 0o077))
    assert sorted(path.rpartition("-")[2] for path in one) == ["0.1.0.tar.gz", "any.whl"]
    assert one == other


def test_the_wheel_holds_every_file_of_every_package(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT / folder))
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {
        "umbel_simulations/reporting/report.html.j2",
        "umbel_simulations/scenarios/quickstart.toml",
        *(f"{package}/py.typed" for package in PACKAGES),
    } <= names


def test_the_source_holds_the_wheels_and_nothing_that_lay_there(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert not names & set(PRIVATE)
    stored = {name for name in names if name.startswith("tests/migrations/")}
    assert not [name for name in names - stored if name.endswith((".pem", ".sqlite", ".env"))]
    assert {"server/umbel_server/cli/command.py", "SECURITY.md", "deploy/compose/check"} <= names
    assert {(member.uid, member.gid, member.uname) for member in members} == {(0, 0, "")}
    top = {name.partition("/")[0] for name in names}
    assert top == {
        *("client", "common", "deploy", "docs", "server", "simulations", "tests"),
        *(".dockerignore", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"),
        *("PKG-INFO", "README.md", "SECURITY.md", "constraints.txt", "pyproject.toml"),
    }
