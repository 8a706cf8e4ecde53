"""What a release installs: pinned as it was tested, by hash, and whole."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "requirements"
EXTRAS = {"server": "server", "relay": "relay", "client": "client", "client-cpu": "client"}
HEAVY = {"torch", "transformers", "peft", "opacus", "datasets", "pandas", "pyarrow", "triton"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Name -> version, of a file with one NAME==VERSION a line."""
    lines = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE)
    return {normal(name): version for name, version in lines}


def wanted(extra: str) -> set[str]:
    """Names that pyproject.toml asks for, of an extra and of every role."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"][extra]]
    names = {normal(re.split(r"[\[<>=!~; ]", line)[0]) for line in asked}
    if "umbel" in names:
        names |= wanted("relay")
    return names - {"umbel"}


LOCKS = sorted(FOLDER.glob("*.txt"))


def test_each_role_and_tool_has_one() -> None:
    assert {path.stem for path in LOCKS} == {*EXTRAS, "build", "release"}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_package_has_hashes_and_the_version_that_was_tested(path: Path) -> None:
    tested = pins(ROOT / "constraints.txt")
    locked = pins(path)
    for name, version in locked.items():
        # +cpu names a build of the same version.
        assert tested.get(name, version) == version.partition("+")[0] or tested[name] == version
    blocks = re.split(r"\n(?=[a-z])", path.read_text())
    packages = [block for block in blocks if re.match(r"[a-z0-9._-]+==", block)]
    assert len(packages) == len(locked) > 5
    for block in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]
    # A place of one machine would mean nothing elsewhere.
    assert not re.search(
        r"--(find-links|index-url|extra-index-url)|file:|https?:", path.read_text()
    )


@pytest.mark.parametrize("role", EXTRAS)
def test_a_role_has_what_it_asks_for(role: str) -> None:
    assert wanted(EXTRAS[role]) <= set(pins(FOLDER / f"{role}.txt"))


@pytest.mark.parametrize("role", ["server", "relay"])
def test_who_does_not_train_gets_nothing_that_does(role: str) -> None:
    assert not HEAVY & set(pins(FOLDER / f"{role}.txt"))


def test_the_cpu_gets_no_cuda_and_the_same_of_everything_else() -> None:
    gpu, cpu = pins(FOLDER / "client.txt"), pins(FOLDER / "client-cpu.txt")
    only_gpu = set(gpu) - set(cpu)
    assert only_gpu
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in only_gpu)
    assert set(cpu) <= set(gpu)
    assert {name for name in cpu if cpu[name] != gpu[name]} == {"torch"}
    assert cpu["torch"] == f"{gpu['torch']}+cpu"


def test_the_wheel_is_made_by_the_backend_of_the_project() -> None:
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert backend == [f"hatchling=={pins(FOLDER / 'build.txt')['hatchling']}"]
