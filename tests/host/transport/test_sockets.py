"""Processes of one machine find each other again."""

from pathlib import Path

import grpc
import pytest

from umbel_host.transport import sockets
from umbel_host.transport.sockets import SocketServer, channel

CHECKED = pytest.mark.parametrize("checked", [False, True], ids=["without the check", "with it"])


@CHECKED
def test_a_process_that_was_away_is_found_again_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    # As if it had been away for a minute already.
    long_away = ("grpc.initial_reconnect_backoff_ms", 20_000)
    options = sockets._OPTIONS if checked else sockets._OPTIONS[:1]
    monkeypatch.setattr(sockets, "_OPTIONS", (*options, long_away))
    path = tmp_path / "a.sock"
    server = SocketServer(path, 0o600, workers=1)
    server.add("a", {"b": grpc.unary_unary_rpc_method_handler(lambda request, _: b"answer")})

    def is_found(seconds: float) -> bool:
        try:
            return bool(call(b"", timeout=seconds, wait_for_ready=seconds > 0.1) == b"answer")
        except grpc.RpcError:
            return False

    with channel(path) as connection:
        call = connection.unary_unary("/a/b")
        assert not is_found(0.1)
        server.start()
        assert is_found(10.0 if checked else 2.0) is checked
    server.stop(0.0)
