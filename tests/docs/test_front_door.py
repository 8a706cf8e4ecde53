"""What a contributor meets first: `make help`, the hooks, the forms, and pages that must agree."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
HEADINGS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
"""Those of Keep a Changelog."""
PAGES = [
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/releasing.md"),
    ".github/pull_request_template.md",
]


def make(*arguments: str) -> str:
    """What make prints, as on a terminal of its own: this may be a test of another make."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def targets() -> set[str]:
    """The targets of `.PHONY`."""
    (names,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    return set(names.replace("\\\n", " ").split())


def test_make_alone_lists_every_target_with_a_text() -> None:
    shown = make()
    assert shown == make("help")
    listed = re.findall(r"^  ([a-z-]+) +(\S.*\.)$", shown, re.MULTILINE)
    assert len(listed) == len(re.findall(r"^  ", shown, re.MULTILINE))
    assert sorted(name for name, _text in listed) == sorted(targets())
    assert max(len(line) for line in shown.splitlines()) <= 100


def test_make_alone_builds_nothing() -> None:
    assert "pip install" not in make("--dry-run", "--always-make")


def sections() -> list[tuple[str, str]]:
    """Heading and text of each version in CHANGELOG.md."""
    parts = re.split(r"^## (.*)\n", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_the_changelog_has_the_newest_version_first() -> None:
    names = [name for name, _text in sections()]
    assert names[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", n) for n in names[1:]]
    assert all(released), names
    numbers = [tuple(map(int, found.groups())) for found in released if found]
    assert numbers == sorted(set(numbers), reverse=True)


@pytest.mark.parametrize(("name", "text"), sections(), ids=[name for name, _text in sections()])
def test_a_version_of_the_changelog_has_the_headings_of_keep_a_changelog(
    name: str, text: str
) -> None:
    parts = re.split(r"^### (.*)\n", text, flags=re.MULTILINE)
    found = parts[1::2]
    assert set(found) <= set(HEADINGS), name
    assert len(found) == len(set(found)), name
    for heading, entries in zip(found, parts[2::2], strict=True):
        assert re.search(r"^- \S", entries, re.MULTILINE), (name, heading)


def test_a_break_of_the_wire_is_the_first_entry_of_its_version() -> None:
    (wire,) = (ROOT / "common").rglob("wire.py")
    (version,) = re.findall(r"^WIRE_VERSION = (\d+)$", wire.read_text(), re.MULTILINE)
    breaks = []
    for name, text in sections():
        entries = re.findall(r"^- (.*)$", text, re.MULTILINE)
        told = [re.match(r"\*\*The wire has version (\d+)", entry) for entry in entries]
        assert not any(told[1:]), name
        breaks += [found[1] for found in told if found]
    assert breaks[0] == version


def test_the_security_policy_supports_the_version_of_the_project() -> None:
    table = re.findall(r"^\| ([\d.]+|older) \| (yes|no) \|$", security(), re.MULTILINE)
    assert table == [(VERSION.rpartition(".")[0], "yes"), ("older", "no")]


def security() -> str:
    return (ROOT / "SECURITY.md").read_text()


def test_the_hooks_run_what_make_lint_runs() -> None:
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    commands = [line.replace("$(BIN)", ".venv/bin") for line in recipe.split("\n\t")]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == [command.strip() for command in commands]
    stages = {stage for hook in hooks for stage in hook.get("stages", config["default_stages"])}
    assert stages == set(config["default_install_hook_types"])
    for hook in hooks:
        # Whatever changed, the whole tree is checked, as make does.
        assert (hook["language"], hook["always_run"], hook["pass_filenames"]) == (
            "system",
            True,
            False,
        )


@pytest.mark.parametrize(
    ("schema", "names"),
    [("github-issue-forms", ["bug.yml", "feature.yml"]), ("github-issue-config", ["config.yml"])],
)
def test_the_issue_forms_are_what_github_accepts(schema: str, names: list[str]) -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    done = subprocess.run(
        [
            Path(sys.executable).with_name("check-jsonschema"),
            *("--builtin-schema", f"vendor.{schema}", *(folder / name for name in names)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} == {"bug.yml", "feature.yml", "config.yml"}


def test_who_found_a_weakness_is_sent_to_the_security_policy() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    config = yaml.safe_load((folder / "config.yml").read_text())
    assert config["blank_issues_enabled"] is False
    (link,) = config["contact_links"]
    assert "SECURITY.md" in link["about"]
    assert "SECURITY.md" in (folder / "bug.yml").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_and_link_of_a_page_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    for line in re.findall(r"`make ((?:[a-z-]+ ?)+)", text):
        assert set(line.split()) <= targets(), line
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/releasing.md", "docs/threat-model.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    """By its path, or by the end of it."""
    top = ("client", "common", "server", "simulations", "tests", "docs", "deploy")
    files = [path for folder in top for path in (ROOT / folder).rglob("*")]
    for name in re.findall(r"`([\w./-]+\.(?:py|md|toml))`", (ROOT / page).read_text()):
        if "/" in name:
            assert any(path.match(name) for path in files), name


SUITE = """
import pytest

@pytest.mark.full
def test_long(): pass

@pytest.mark.full
def test_wrong(): assert False

@pytest.mark.soak
def test_soaked(): pass

# Left out on purpose: the record of a suite counts such tests.
@pytest.mark.skip(reason="no GPU")
def test_left_out(): pass

def test_short(): pass
"""


def test_the_full_suite_is_recorded_with_its_commit(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SUITE)
    record = tmp_path / "record.json"
    done = subprocess.run(
        # One worker, not two: each starts an interpreter.
        [sys.executable, ROOT / "tests" / "benchmarks" / "full.py", record, "-n", "1", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    found = json.loads(record.read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert found["commit"] == commit.strip()
    assert found["tests"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert found["marked_full"] == {"passed": 1, "failed": 1}
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_wrong"]
    assert list(found["skipped"].values()) == ["no GPU"]


def test_make_test_leaves_out_what_is_long() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "-m 'not soak and not full'" in options["addopts"]
    assert {marker.partition(":")[0] for marker in options["markers"]} >= {"soak", "full"}
    (recipe,) = re.findall(r"^test:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert " -m " not in recipe
