"""What stands between a site and the port: the site's own proxy, and nginx before the port.

And what a site's firewall has to let out: one connection, to one port.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.daemons import Clinics, free_port
from e2e.transport import EchoRelay, Transport
from e2e.tunnel_proxy import TunnelProxy
from support import warm_python
from support.waiting import HANGING

from umbel_common.errors import ConfigError

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx" / "umbel.conf"
NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
PASSWORD = "c0rrect horse"


@pytest.fixture(scope="module")
def transport(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Transport]:
    made = Transport(Clinics(tmp_path_factory.mktemp("proxies"), tiny_model))
    made.start()
    yield made
    made.close()


@contextmanager
def restarted(transport: Transport, **environment: str) -> Iterator[EchoRelay]:
    """North's relay with other variables, and a log of its own."""
    relay = transport.relays["north"]
    relay.kill()
    relay.log.unlink()
    relay.start(**environment)
    try:
        yield relay
    finally:
        relay.kill()
        relay.start()


def expect_mirrored(transport: Transport) -> None:
    sealed = b"round the corner" + os.urandom(100_000)
    assert transport.exchange({"north": sealed}, HANGING) == {"north": sealed[::-1]}, (
        transport.logs()
    )


def expect_line(relay: EchoRelay, text: str) -> str:
    """Waits until a relay says something; everything that it said."""
    deadline = time.monotonic() + HANGING
    while text not in relay.log.read_text():
        assert time.monotonic() < deadline, relay.log.read_text()
        time.sleep(0.1)
    return relay.log.read_text()


def server(transport: Transport) -> str:
    return f"127.0.0.1:{transport.clinics.port}"


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_relay_goes_through_the_proxy_that_its_environment_names(
    transport: Transport, variable: str
) -> None:
    with TunnelProxy() as proxy:
        with restarted(transport, **{variable: f"http://127.0.0.1:{proxy.port}"}) as relay:
            expect_mirrored(transport)
            assert peers(relay.pid) == {("127.0.0.1", proxy.port)}
        assert proxy.targets == {server(transport)}


@pytest.mark.parametrize("spared", ["127.0.0.1", "*", "10.0.0.1, 127.0.0.1:{port}"])
def test_a_server_that_no_proxy_names_is_reached_directly(
    transport: Transport, spared: str
) -> None:
    with TunnelProxy() as proxy:
        address, port = f"http://127.0.0.1:{proxy.port}", transport.clinics.port
        with restarted(transport, HTTPS_PROXY=address, NO_PROXY=spared.format(port=port)):
            expect_mirrored(transport)
        assert not proxy.targets


def test_a_proxy_that_wants_a_password_gets_it_and_no_log_does(transport: Transport) -> None:
    with TunnelProxy("relay", PASSWORD) as proxy:
        address = f"http://relay:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{proxy.port}"
        with restarted(transport, HTTPS_PROXY=address) as relay:
            expect_mirrored(transport)
            said = expect_line(relay, "connected to")
        assert proxy.targets == {server(transport)}
    assert "c0rrect" not in said


def test_a_proxy_that_refuses_a_password_is_named_without_it(transport: Transport) -> None:
    with TunnelProxy("relay", PASSWORD) as proxy:
        address = f"http://relay:wr0ng@127.0.0.1:{proxy.port}"
        with restarted(transport, HTTPS_PROXY=address) as relay:
            said = expect_line(relay, "is not reached")
        assert not proxy.targets
    assert (
        f"through the proxy http://127.0.0.1:{proxy.port} is not reached: the proxy says 407"
        in said
    )
    assert "needs its user and password" in said
    assert "wr0ng" not in said
    assert "Traceback" not in said


def test_a_proxy_that_is_down_is_one_line_and_tried_again(transport: Transport) -> None:
    port = free_port()
    with restarted(transport, HTTPS_PROXY=f"http://relay:s3cret@127.0.0.1:{port}") as relay:
        said = expect_line(relay, "is not reached")
        (line,) = said.splitlines()[:1]
        assert f"through the proxy http://127.0.0.1:{port} is not reached:" in line
        assert "Connection refused" in line
        assert "Traceback" not in said
        assert "s3cret" not in said
        relay.log.write_text("")
        expect_line(relay, "is not reached")


def peers(process: int) -> set[tuple[str, int]]:
    """Address and port of whatever a process is connected to, or listens at (port 0)."""
    inodes = set()
    if os.geteuid() != 0:
        pytest.skip("a relay hides its descriptors from everybody but root")
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                address, port = fields[2].split(":")
                found.add((_dotted(address), int(port, 16)))
    return found


def _dotted(address: str) -> str:
    return ".".join(str(byte) for byte in reversed(bytes.fromhex(address)))


def test_a_site_needs_one_connection_outward_and_none_inward(transport: Transport) -> None:
    with restarted(transport) as relay:
        seen: set[tuple[str, int]] = set()
        for _ in range(5):
            expect_mirrored(transport)
            seen |= peers(relay.pid)
        assert seen == {("127.0.0.1", transport.clinics.port)}


@contextmanager
def nginx(folder: Path, port: int, to: int) -> Iterator[None]:
    """The project's configuration, at ports that are free here."""
    text = CONFIGURATION.read_text()
    for old, new in (
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("127.0.0.1:9443", f"127.0.0.1:{to}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "umbel.conf").write_text(text.replace("/var/log/nginx", str(folder)))
    main = folder / "nginx.conf"
    main.write_text(
        f"load_module {STREAM};\npid {folder}/pid;\nerror_log {folder}/error.log;\nuser root;\n"
        f"events {{}}\ninclude {folder}/umbel.conf;\n"
    )
    command = [str(NGINX), "-p", str(folder), "-c", str(main)]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"])
    try:
        yield
    finally:
        process.terminate()
        process.wait(HANGING)


@pytest.mark.skipif(
    NGINX is None or not STREAM.exists(),
    reason="nginx is not installed: apt-get install nginx libnginx-mod-stream",
)
def test_nginx_carries_tls_that_it_cannot_open(transport: Transport, tmp_path: Path) -> None:
    """To the relay nginx is the server: the port's own certificate, through another port."""
    relay = transport.relays["north"]
    port = free_port()
    relay.kill()
    through = EchoRelay(relay.log.parent, port)
    with nginx(tmp_path, port, transport.clinics.port):
        through.start()
        try:
            expect_mirrored(transport)
            assert peers(through.pid) == {("127.0.0.1", port)}
        finally:
            through.kill()
            relay.start()
    (line, *_) = (tmp_path / "umbel.log").read_text().splitlines()
    assert line.startswith("127.0.0.1 ")


@pytest.mark.parametrize(
    "address", ["socks5://relay:s3cret@127.0.0.1:1080", "http://relay:s3cret@", "http://s3cret@a:b"]
)
def test_a_proxy_that_cannot_be_used_ends_the_relay_with_one_error(
    transport: Transport, address: str
) -> None:
    site = transport.clinics.sites["east"]
    done = warm_python.run(
        *("-m", "umbel_client.relay", site.config), env={**os.environ, "HTTPS_PROXY": address}
    )
    assert done.returncode == ConfigError.exit_code
    assert "field: HTTPS_PROXY" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr
