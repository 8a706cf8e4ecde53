"""A command that opens data, or reads a key, has no network by then, and keeps its memory."""

from pathlib import Path

import pytest
from support import warm_python
from support.data_commands import CONFIG, TEXTS, written

from umbel_client.cli.command import SPEAKING

AT_THE_DATA = """
import socket, sys
held, data = sys.argv.pop(1) == "held", sys.argv.pop(1)

def look(event, arguments):
    if event == "open" and str(arguments[0]) == data:
        try:
            socket.socket(socket.AF_INET).close()
            print("the data is read with a network")
        except OSError:
            print("the data is read without a network")

sys.addaudithook(look)
if not held:
    from umbel_client.trainer import isolation
    isolation.drop_network = lambda: None
from umbel_client.cli import main
main()
"""
AFTER_A_DOOR = """
import ctypes, importlib, resource, socket, sys
door = sys.argv.pop(1)
resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))
try:
    importlib.import_module(door).main()
except SystemExit:
    pass
dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
try:
    socket.socket(socket.AF_INET).close()
    network = True
except OSError:
    network = False
print("found", dumpable, resource.getrlimit(resource.RLIMIT_CORE), network)
"""


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Path:
    """A site's folder with a configuration and data."""
    data = written(tmp_path / "a.jsonl", TEXTS)
    text = CONFIG.format(path=data, model=tiny_model, labels=["a", "b"], data="")
    (tmp_path / "client.toml").write_text(text)
    (tmp_path / "look.py").write_text(AT_THE_DATA)
    (tmp_path / "door.py").write_text(AFTER_A_DOOR)
    return tmp_path


def at_the_data(site: Path, held: str, *words: str) -> set[str]:
    said = warm_python.run("look.py", held, site / "a.jsonl", *words, cwd=site)
    found = {line for line in said.stdout.splitlines() if line.startswith("the data is read")}
    assert found, said.stdout + said.stderr
    return found


@pytest.mark.parametrize("words", [("data", "check"), ("doctor",)])
def test_a_command_has_no_network_when_it_opens_the_data(site: Path, words: list[str]) -> None:
    assert at_the_data(site, "held", *words) == {"the data is read without a network"}


def test_it_would_have_one(site: Path) -> None:
    found = at_the_data(site, "not held", "data", "check")
    assert found == {"the data is read with a network"}


def test_the_commands_that_keep_their_network_are_named() -> None:
    """Whatever is added to `umbel-client` is confined, unless it is added to these."""
    assert SPEAKING == ("run", "status", "watch", "doctor")


@pytest.mark.parametrize(
    ("door", "network"),
    [
        ("umbel_client.trainer_process", False),
        ("umbel_client.drafting", False),
        pytest.param("umbel_client.calibrating", False, marks=pytest.mark.full),
        pytest.param("umbel_client.evaluating", False, marks=pytest.mark.full),
        pytest.param("umbel_client.tuning", False, marks=pytest.mark.full),
        ("umbel_client.cli", False),
        ("umbel_server.rounds_process", False),
        ("umbel_client.relay.process", True),
        ("umbel_server.port_process", True),
        ("umbel_server.cli", True),
        ("umbel_simulations.cli", True),
    ],
)
def test_a_process_with_a_key_or_data_keeps_its_memory_to_itself(
    site: Path, door: str, network: bool
) -> None:
    said = warm_python.run("door.py", door, "nowhere.toml", cwd=site)
    assert said.stdout.splitlines()[-1] == f"found 0 (0, 0) {network}", said.stderr
