"""Every line that installs Umbel works: from a clone, pinned, and never from an index.

Umbel is on no index. A line that named it there would install, often as root, what somebody else
registers under the name.
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from umbel_host.installation import install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
PLACES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile")
FOLDERS = ("docs", "deploy", "client", "server", "common", "simulations", ".github")
SUFFIXES = {"", ".md", ".py", ".toml", ".yaml", ".yml", ".service", ".Dockerfile", ".sh", ".txt"}

LINE = re.compile(r"(?:pip3?|uv pip|pipx) install ([^\n`|]*)")
OF_A_CLONE = re.compile(r'-c constraints\.txt (?:-e )?"\.\[([a-z,]+)\]"')
PINNED = re.compile(
    r"--require-hashes|--no-index --no-deps dist/\*\.whl|--no-deps( [\w-]+==[\w.]+)+"
    r"|--force-reinstall --no-deps \"torch=="
)
"""A role's lock file, a wheel that was built from the clone, or one pinned package of another."""
TOOLS = {"pre-commit"}
"""Of a contributor, under names that their makers have on the index."""


def texts() -> dict[str, str]:
    files = [ROOT / name for name in PLACES]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for path in files
        if path.is_file() and "requirements" not in path.parts and path.name != "installation.py"
    }


def install_lines() -> list[tuple[str, str]]:
    continued = re.compile(r"\\\n\s*")
    return [
        (name, found.strip())
        for name, text in texts().items()
        for found in LINE.findall(continued.sub("", text))
    ]


def is_right(line: str) -> bool:
    of_a_clone = OF_A_CLONE.search(line)
    if of_a_clone:
        return set(of_a_clone[1].split(",")) <= EXTRAS
    return line in TOOLS or bool(PINNED.search(" ".join(line.split())))


def test_every_install_line_is_of_a_clone_or_pinned() -> None:
    found = install_lines()
    assert len(found) >= 15
    assert [(name, line) for name, line in found if not is_right(line)] == []
    assert is_right(install("client").partition("install ")[2])


@pytest.mark.parametrize(
    "line",
    [
        '"umbel[server]"',
        "umbel",
        "'umbel[client]' beside the server",
        '-c constraints.txt "umbel[server]"',
        '".[server]"',
        '-c constraints.txt ".[no-such-extra]"',
    ],
)
def test_a_line_that_would_ask_an_index_is_found_out(line: str) -> None:
    assert not is_right(line)


def test_nothing_names_umbel_as_a_package_of_an_index() -> None:
    named = re.compile(r"umbel\[[a-z,]+\]")
    assert [name for name, text in texts().items() if named.search(text)] == []


@pytest.mark.full
@pytest.mark.parametrize("extra", ["server", "relay", "client"])
def test_a_fresh_environment_takes_each_role_from_a_clone(tmp_path: Path, extra: str) -> None:
    """It needs a package index, and for `client` gigabytes: there pip only finds out what it
    would install."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    words = ["-m", "pip", "install", "--quiet", "-c", "constraints.txt", f".[{extra}]"]
    if extra == "client":
        words.insert(3, "--dry-run")
    done = subprocess.run([python, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if extra == "client":
        return
    command = "umbel-server" if extra == "server" else "umbel-client"
    shown = subprocess.run(
        [python.with_name(command), "--version"], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == f"{command} {PROJECT['version']}\n"
    assert sys.executable != str(python)
