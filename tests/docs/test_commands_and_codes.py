"""The documentation says what the code does."""

import re
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

import umbel_client.cli.command
import umbel_server.cli.command
from umbel_common import errors
from umbel_simulations.cli.command import app

ROOT = Path(__file__).parents[2]


def leaves(kind: type[errors.UmbelError]) -> list[type[errors.UmbelError]]:
    # A kind of its own of another module has its parent's code.
    children = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    return [kind] if not children else [leaf for child in children for leaf in leaves(child)]


def test_every_exit_code_is_documented_and_no_other() -> None:
    table = (ROOT / "docs" / "errors.md").read_text()
    documented = {
        name: int(code)
        for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE)
    }
    of_code = {kind.__name__: kind.exit_code for kind in leaves(errors.UmbelError)}
    assert documented == {"UmbelError": 1, **of_code}


def test_every_exit_code_is_in_the_range_of_its_kind() -> None:
    ranges = {
        range(10, 20): "ConfigError DataError ModelError PlanError JobUnknown",
        range(20, 30): "IdentityError SignatureError",
        range(30, 40): "PolicyRefusal BudgetError CalibrationError LedgerError",
        range(40, 50): "RemoteProtocolError LocalProtocolError RoundAborted JobFailed"
        " UnreachableError",
        range(50, 60): "StorageError RunExists VerificationError",
    }
    for kind in leaves(errors.UmbelError):
        (home,) = [codes for codes, names in ranges.items() if kind.__name__ in names.split()]
        assert kind.exit_code in home


def test_no_two_errors_share_an_exit_code() -> None:
    codes = [kind.exit_code for kind in leaves(errors.UmbelError)]
    assert len(codes) == len(set(codes))


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_every_command_of_the_readme_exists_with_its_options() -> None:
    lines = re.findall(r"^umbel-simulate .*$", readme(), re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        _, command, *words = line.split()
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.stdout, line


APPS = {"umbel-client": umbel_client.cli.command.app, "umbel-server": umbel_server.cli.command.app}


def commands(script: str) -> list[str]:
    """Every line of the documentation with a command: in a session, or within a paragraph."""
    pages = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    session = re.compile(rf"^(?:\w+\$ )?({script} .*)$", re.MULTILINE)
    paragraph = re.compile(rf"`({script}[^`]+)`")
    in_sessions = [line for page in pages for line in session.findall(page)]
    in_paragraphs = [line for page in pages for line in paragraph.findall(page)]
    return list(dict.fromkeys([*in_sessions, *in_paragraphs]))


@pytest.mark.parametrize("line", [line for script in APPS for line in commands(script)])
def test_every_command_of_the_documentation_exists_with_its_options(line: str) -> None:
    script, *words = line.split()
    command = typer.main.get_command(APPS[script])
    while words and isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("script", APPS)
def test_the_documentation_shows_every_command(script: str) -> None:
    shown = " ".join(" ".join(line.split()) for line in commands(script))
    for name, command in typer.main.get_command(APPS[script]).commands.items():
        for inner in getattr(command, "commands", [None]):
            assert f"{script} {name} {inner or ''}".strip() in shown


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "lint", "bench", "fuzz", "docs"} <= targets
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert set(re.findall(r"`make ([a-z-]+)", path.read_text())) <= targets, path


def test_every_link_and_file_that_the_documentation_names_exists() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), (path, link)


def test_architecture_names_every_wing_and_no_other() -> None:
    sections = re.split(
        r"^### ", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE
    )
    packages = {text.split()[0]: text for text in sections[1:]}
    assert len(packages) == 5
    for package, text in packages.items():
        # The package named last runs on into the rest of the page.
        rows = re.findall(r"^\| `(\w+)/` \|", text.split("\n## ")[0], re.MULTILINE)
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert sorted(rows) == sorted(folders), package


def arguments(command: click.Command, path: str) -> list[tuple[str, str]]:
    """(command, help text) of every argument of a command and those within it."""
    own = [
        (path, parameter.help)
        for parameter in command.params
        if isinstance(parameter, typer.core.TyperArgument) and parameter.help
    ]
    inner = getattr(command, "commands", {}).items()
    return own + [one for name, child in inner for one in arguments(child, f"{path} {name}")]


@pytest.mark.parametrize("script", APPS)
def test_help_explains_every_argument(script: str) -> None:
    """Click 8.5 drops these texts under the Typer that Flower allows."""
    found = arguments(typer.main.get_command(APPS[script]), "")
    assert found
    for path, text in found:
        shown = CliRunner().invoke(
            APPS[script], [*path.split(), "--help"], env={"COLUMNS": "300", "TERM": "dumb"}
        )
        assert text in shown.stdout, (path, text)
