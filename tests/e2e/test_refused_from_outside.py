"""What a stranger, or a site that is none any more, gets from the real port: nothing."""

import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from e2e.daemons import Clinics, free_port, write_all
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from support.waiting import HANGING

from umbel_client.relay.server_clock import ServerClock
from umbel_client.relay.signature import Signature
from umbel_server.operator.admitted_sites import load_sites, save_sites
from umbel_server.operator.authority import (
    Authority,
    certificate_pem,
    key_pem,
    new_authority,
    new_key,
)
from umbel_server.port.gate import PATHS


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Clinics]:
    """An operator whose port is open; no site runs."""
    made = Clinics(tmp_path_factory.mktemp("clinics"), tiny_model)
    made.port_process.start()
    deadline = time.monotonic() + HANGING
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", made.port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    else:
        raise AssertionError(made.logs())
    yield made
    made.close()


def context(folder: Path | None, authority: Path) -> ssl.SSLContext:
    """With the certificate and key in `folder`, or with none."""
    made = ssl.create_default_context(cafile=str(authority))
    if folder is not None:
        made.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return made


def authority_of(clinics: Clinics) -> Path:
    return clinics.operator_folder / "ca" / "certificate.pem"


def status(clinics: Clinics, path: str, folder: Path | None = None, method: str = "POST") -> int:
    """Of a request with a site's certificate, east's unless told otherwise."""
    folder = folder or clinics.sites["east"].folder / "relay"
    with httpx.Client(verify=context(folder, authority_of(clinics))) as client:
        answer = client.request(method, f"https://127.0.0.1:{clinics.port}{path}", content=b"")
        assert answer.content == b""
        return answer.status_code


def issue(clinics: Clinics, name: str, authority: Authority, when: datetime | None = None) -> Path:
    """A folder with a new key and its certificate."""
    folder = clinics.folder / f"issued-{name}"
    key = new_key()
    certificate = authority.site("east", key.public_key(), when or datetime.now(UTC))
    write_all(folder, {"certificate.pem": certificate_pem(certificate), "key.pem": key_pem(key)})
    return folder


def fleet(clinics: Clinics, folder: Path, key: ec.EllipticCurvePrivateKey) -> FleetHttpClient:
    """Flower's client over the connection of `folder`, as the node of `key`."""
    return FleetHttpClient(
        f"https://127.0.0.1:{clinics.port}",
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            Signature(key, ServerClock()),
        ],
        verify=context(folder, authority_of(clinics)),
    )


def activate(client: FleetHttpClient, key: ec.EllipticCurvePrivateKey) -> int:
    request = ActivateNodeRequest(
        public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30.0
    )
    return int(client.ActivateNode(request).node_id)


def test_a_site_that_is_admitted_gets_in(clinics: Clinics) -> None:
    site = clinics.sites["east"]
    with fleet(clinics, site.folder / "relay", site.relay_key) as client:
        assert activate(client, site.relay_key) > 0


@pytest.mark.parametrize("who", ["no certificate", "another authority", "an expired certificate"])
def test_without_a_certificate_of_the_authority_there_is_no_connection(
    clinics: Clinics, who: str
) -> None:
    other_key = new_key()
    now = datetime.now(UTC)
    folder = {
        "no certificate": lambda: None,
        "another authority": lambda: issue(
            clinics, "other", Authority(new_authority("clinics", other_key, now), other_key)
        ),
        "an expired certificate": lambda: issue(
            clinics, "old", clinics.authority, now - timedelta(days=91)
        ),
    }[who]()
    with (
        httpx.Client(verify=context(folder, authority_of(clinics))) as client,
        pytest.raises(httpx.TransportError),
    ):
        client.post(f"https://127.0.0.1:{clinics.port}/v1/fleet/pull-messages", content=b"")


def test_a_certificate_without_an_admitted_site_gets_nothing(clinics: Clinics) -> None:
    folder = issue(clinics, "unknown", clinics.authority)
    assert {status(clinics, path, folder) for path in PATHS} == {403}


def test_older_protocols_are_not_spoken(clinics: Clinics) -> None:
    old = context(clinics.sites["east"].folder / "relay", authority_of(clinics))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", clinics.port)) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(raw, server_hostname="127.0.0.1")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/v1/control/start-run",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/runtime/push-messages",
        "/v1/responses",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/get-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/pull-messages/",
        "//v1/control/start-run",
    ],
)
def test_even_a_site_finds_nothing_else_behind_the_port(clinics: Clinics, path: str) -> None:
    assert status(clinics, path) == 404
    assert status(clinics, path, method="GET") == 404


def test_what_it_finds_takes_no_other_method_and_no_endless_body(clinics: Clinics) -> None:
    assert status(clinics, "/v1/fleet/pull-messages", method="GET") == 404
    folder = clinics.sites["east"].folder / "relay"
    with httpx.Client(verify=context(folder, authority_of(clinics))) as client:
        url = f"https://127.0.0.1:{clinics.port}/v1/fleet/push-object"
        assert client.post(url, content=iter([b"x"])).status_code == 413
        assert client.post(url, content=bytes(2**24 + 1)).status_code == 413


def test_a_body_in_chunks_under_a_small_length_is_not_taken(clinics: Clinics) -> None:
    folder = clinics.sites["east"].folder / "relay"
    key = public_key_to_bytes(clinics.sites["east"].relay_key.public_key())
    chunk = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"
    with (
        socket.create_connection(("127.0.0.1", clinics.port)) as raw,
        context(folder, authority_of(clinics)).wrap_socket(raw, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(
            b"POST /v1/fleet/push-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n"
            b"transfer-encoding: chunked\r\nflwr-public-key: " + b64encode(key) + b"\r\n\r\n"
        )
        assert tls.recv(100).startswith(b"HTTP/1.1 413")
        with pytest.raises(OSError, match=r"reset|[Bb]roken|EOF|closed"):
            tls.sendall(1000 * chunk)


def test_a_site_gets_in_while_strangers_wait_at_the_door(clinics: Clinics) -> None:
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", clinics.port)))
        assert status(clinics, "/v1/fleet/pull-object") != 200
        site = clinics.sites["east"]
        with fleet(clinics, site.folder / "relay", site.relay_key) as client:
            assert activate(client, site.relay_key) > 0


def test_a_site_that_connects_while_the_database_is_busy_makes_nobody_else_wait(
    clinics: Clinics,
) -> None:
    """Its former connection is ended in the database, which another writer may hold for long."""
    path = clinics.operator_folder / "state" / "superlink.sqlite"
    site = clinics.sites["east"]
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as database,
        fleet(clinics, site.folder / "relay", site.relay_key) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        database.execute("BEGIN IMMEDIATE")
        connecting = pool.submit(activate, client, site.relay_key)
        time.sleep(0.5)
        try:
            north = clinics.sites["north"].folder / "relay"
            assert status(clinics, "/", north) == 404
            assert not connecting.done()
        finally:
            database.execute("ROLLBACK")
        assert connecting.result(HANGING) > 0


def test_a_site_cannot_speak_as_another_whose_key_it_has(clinics: Clinics) -> None:
    east, north = clinics.sites["east"], clinics.sites["north"]
    with (
        fleet(clinics, east.folder / "relay", north.relay_key) as client,
        pytest.raises(httpx.HTTPStatusError, match="403"),
    ):
        activate(client, north.relay_key)


def test_a_site_cannot_fetch_the_messages_of_anothers_node(clinics: Clinics) -> None:
    east, north = clinics.sites["east"], clinics.sites["north"]
    with fleet(clinics, north.folder / "relay", north.relay_key) as client:
        node = activate(client, north.relay_key)
    with (
        fleet(clinics, east.folder / "relay", east.relay_key) as client,
        pytest.raises(httpx.HTTPStatusError, match="401"),
    ):
        client.PullMessages(PullMessagesRequest(node={"node_id": node}))  # type: ignore[arg-type]


def test_a_revoked_site_is_turned_away_from_then_on_over_an_open_connection_too(
    clinics: Clinics,
) -> None:
    south = clinics.sites["south"]
    path = clinics.operator_folder / "sites.json"
    before = load_sites(path)
    with fleet(clinics, south.folder / "relay", south.relay_key) as client:
        node = activate(client, south.relay_key)
        client.PullMessages(PullMessagesRequest(node={"node_id": node}))  # type: ignore[arg-type]
        revoked = msgspec.structs.replace(before["south"], revoked=True)
        save_sites(path, {**before, "south": revoked})
        time.sleep(1.5)
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            client.PullMessages(PullMessagesRequest(node={"node_id": node}))  # type: ignore[arg-type]
    save_sites(path, before)
    time.sleep(1.5)
    with fleet(clinics, south.folder / "relay", south.relay_key) as client:
        assert activate(client, south.relay_key) > 0


def test_a_stock_supernode_does_not_get_in(clinics: Clinics, tmp_path: Path) -> None:
    key = tmp_path / "node-key"
    # The key of a site that is admitted; what a stock SuperNode lacks is the certificate.
    own = clinics.sites["east"].relay_key
    key.write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    log, failed = tmp_path / "log", "Connection attempt failed"
    with log.open("wb") as output:
        node = subprocess.Popen(
            [
                Path(sys.executable).with_name("flower-supernode"),
                "--superlink",
                f"127.0.0.1:{clinics.port}",
                "--root-certificates",
                authority_of(clinics),
                "--auth-supernode-private-key",
                key,
                "--port",
                str(free_port()),
            ],
            env={
                **os.environ,
                # It starts a process of its own by name.
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
            },
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + HANGING
        while time.monotonic() < deadline and log.read_text().count(failed) < 3:
            time.sleep(0.2)
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
    said = log.read_text()
    assert said.count(failed) >= 3, said


APP = """\
[project]
name = "stranger"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "stranger"

[tool.flwr.app.components]
serverapp = "stranger:app"
clientapp = "stranger:app"
"""


def test_a_stock_flwr_run_does_not_get_in(clinics: Clinics, tmp_path: Path) -> None:
    app, home = tmp_path / "app", tmp_path / "home"
    for folder in (app, home):
        folder.mkdir()
    (app / "pyproject.toml").write_text(APP)
    (app / "stranger.py").write_text("app = None\n")
    (home / "config.toml").write_text(
        f'[superlink.target]\naddress = "127.0.0.1:{clinics.port}"\n'
        f'root-certificates = "{authority_of(clinics)}"\n'
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("flwr"), "run", app, "target"],
        env={
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        },
        capture_output=True,
        text=True,
        timeout=HANGING,
    )
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "Connection to the SuperLink is unavailable" in said, said
    assert "Successfully started run" not in said
