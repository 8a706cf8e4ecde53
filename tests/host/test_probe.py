"""`python -m umbel_host.probe`, as a service manager gives it: one line and an exit code."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from umbel_host.sockets import SocketServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SocketServer]:
    opened = SocketServer(tmp_path / "a.sock", 0o600)
    opened.start()
    yield opened
    opened.stop(0)


def probe(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "umbel_host.probe", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_process_that_is_well(server: SocketServer, tmp_path: Path) -> None:
    server.serving(True)
    address = f"unix:{tmp_path / 'a.sock'}"
    assert probe(address) == (0, f"{address}: serving\n", "")


def test_a_process_that_is_not_well(server: SocketServer, tmp_path: Path) -> None:
    server.serving(False)
    address = f"unix:{tmp_path / 'a.sock'}"
    assert probe(address) == (44, "", f"{address}: not serving\n")


def test_no_process(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'none.sock'}"
    code, out, err = probe(address)
    assert (code, out) == (44, "")
    assert err.startswith(f"{address}: does not answer: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("/run/umbel/trainer.sock",), ("unix:",)])
def test_a_wrong_command_line_is_told_what_is_right(arguments: tuple[str, ...]) -> None:
    code, out, err = probe(*arguments)
    assert (code, out) == (2, "")
    assert "unix:/path/of/a/socket" in err
    assert err.count("\n") == 1
