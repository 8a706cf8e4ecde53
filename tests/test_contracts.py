"""The contracts of pyproject.toml bite, and the folders keep what docs/architecture.md says.

A copy of the sources gets one forbidden import for each contract; the linter must refuse every one
of them for that very import.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = ("common", "server", "client", "simulations")
CONTRACTS = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
]

OFFENCES = {
    "simulations -> client | server -> host -> common": ("umbel_server.operator", "umbel_client"),
    "common is sans-IO: numpy, cryptography, msgspec and nothing else": (
        "umbel_common.secagg",
        "socket",
    ),
    "what both share: messages stand on plans, plans on identities": (
        "umbel_common.trust",
        "umbel_common.plans",
    ),
    "what both machines need: a door, files and transport, processes": (
        "umbel_host.processes",
        "umbel_host.files",
    ),
    "the server needs no torch": ("umbel_server.aggregation", "torch"),
    "the operator: jobs and port do not know each other": (
        "umbel_server.jobs",
        "umbel_server.port",
    ),
    "the port sees neither journal nor sum": ("umbel_server.port", "umbel_server.storage"),
    "the operator's key has no network": ("umbel_server.jobs", "httpx"),
    "aggregation is pure: no clock, disk, socket or thread": (
        "umbel_server.aggregation",
        "sqlite3",
    ),
    "Unix sockets know nothing of Flower": ("umbel_host.processes", "umbel_host.transport.flower"),
    "the relay needs nothing that trains": ("umbel_client.relay", "torch"),
    "on the server and the host, flwr only in the port and the transport": (
        "umbel_server.messaging",
        "flwr",
    ),
    "a site: from its commands down to its people's own word": (
        "umbel_client.site",
        "umbel_client.ledger",
    ),
    "models: adapters on a base, and the two as one": (
        "umbel_client.models.base",
        "umbel_client.models.adapters",
    ),
    "the side with network has no data": ("umbel_client.relay", "umbel_client.data"),
    "the side with data has no network": ("umbel_client.trainer", "httpx"),
    "at a site, flwr only in the relay": ("umbel_client.privacy", "flwr"),
    "simulations: scenario, inputs, a backend, a run": (
        "umbel_simulations.scenario",
        "umbel_simulations.runs",
    ),
}
"""For each contract: a folder, and what a module in it must not import."""


def copy_of_the_sources(folder: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", folder)
    for tree in TREES:
        shutil.copytree(
            ROOT / tree, folder / tree, ignore=shutil.ignore_patterns("__pycache__", "*.json")
        )
    return folder


def lint(folder: Path) -> str:
    """What the linter says about the sources in a folder, which it finds before the installed."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(folder / tree) for tree in TREES),
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For each broken contract of a copy with every offence, what the linter says about it."""
    folder = copy_of_the_sources(tmp_path_factory.mktemp("broken"))
    for importer, imported in OFFENCES.values():
        tree = next(tree for tree in TREES if (folder / tree / importer.split(".")[0]).exists())
        path = folder.joinpath(tree, *importer.split("."), "offence.py")
        path.write_text(path.read_text() if path.exists() else "")
        with path.open("a") as module:
            module.write(f"import {imported}\n")
    said = lint(folder).partition("Broken contracts")[2]
    parts = re.split(r"\n(.+)\n-+\n", said)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_sources_keep_every_contract(tmp_path: Path) -> None:
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in lint(copy_of_the_sources(tmp_path))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_forbidden_import_breaks_its_contract(refusals: dict[str, str], contract: str) -> None:
    importer, imported = OFFENCES[contract]
    assert f"{importer}.offence -> {imported}" in refusals[contract]


def folders() -> Iterator[Path]:
    """Every folder with modules of Umbel."""
    for tree in TREES:
        for path in sorted((ROOT / tree).rglob("__init__.py")):
            yield path.parent


FOLDERS = {str(folder.relative_to(ROOT)): folder for folder in folders()}
WINGS = {name: folder for name, folder in FOLDERS.items() if name.count("/") > 1}
"""The folders within a package."""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_has_fourteen_modules_at_most(name: str) -> None:
    modules = {path.name for path in FOLDERS[name].glob("*.py")} - {"__init__.py"}
    assert len(modules) <= (24 if name.endswith("/cli") else 14), sorted(modules)


@pytest.mark.parametrize("name", WINGS)
def test_a_wing_begins_with_its_law_and_imports_nothing(name: str) -> None:
    """The doors of the commands alone are imported by what starts them."""
    module = ast.parse((WINGS[name] / "__init__.py").read_text())
    law = ast.get_docstring(module)
    assert law is not None
    assert law.partition("\n\n")[0].endswith(".")
    if not name.endswith("/cli"):
        assert len(module.body) == 1
