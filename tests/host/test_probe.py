"""One command asks any process of ours whether it is well."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from umbel_common.errors import ConfigError, UnreachableError
from umbel_host.transport.sockets import SocketServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SocketServer]:
    made = SocketServer(tmp_path / "a.sock", 0o660, workers=1)
    made.start()
    yield made
    made.stop(1.0)


def probe(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "umbel_host.probe", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_who_is_well_is_told_from_who_is_not(server: SocketServer, tmp_path: Path) -> None:
    server.report_health(True)
    done = probe(f"unix:{tmp_path}/a.sock")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    server.report_health(False)
    done = probe(f"unix:{tmp_path}/a.sock")
    assert done.returncode == 1
    assert "not well" in done.stderr
    assert "Traceback" not in done.stderr


def test_who_does_not_answer_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    done = probe(f"unix:{tmp_path}/none.sock")
    assert (done.returncode, done.stderr.count("\n")) == (UnreachableError.exit_code, 1)
    assert "none.sock" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("unix:",), ("/run/a.sock",), ("127.0.0.1:9443",)])
def test_what_is_no_socket_is_one_clear_error(arguments: tuple[str, ...]) -> None:
    done = probe(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (ConfigError.exit_code, 1)
    assert "unix:PATH" in done.stderr
