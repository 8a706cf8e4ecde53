"""Reads a Dockerfile, and carries out the steps of its first stage in a folder."""

import fnmatch
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = "/opt/umbel"


@dataclass(frozen=True)
class Step:
    """One instruction."""

    name: str
    text: str


@dataclass
class Stage:
    """From one FROM to the next."""

    base: str
    steps: list[Step] = field(default_factory=list)

    def texts(self, name: str) -> list[str]:
        """Of the instructions of this name."""
        return [step.text for step in self.steps if step.name == name]


def read(path: Path) -> tuple[list[Step], list[Stage]]:
    """What stands before the first FROM, and the stages."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    head: list[Step] = []
    stages: list[Stage] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stages.append(Stage(rest.strip()))
        else:
            (stages[-1].steps if stages else head).append(Step(name, rest.strip()))
    return head, stages


def allowed(path: str, patterns: list[str]) -> bool:
    """Whether a file of the repository gets into the build's context by .dockerignore."""
    inside = True
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        anywhere = bare.removeprefix("**/")
        parts = path.split("/")
        hit = any(
            fnmatch.fnmatchcase("/".join(parts[: end + 1]), bare) for end in range(len(parts))
        ) or (anywhere != bare and any(fnmatch.fnmatchcase(part, anywhere) for part in parts))
        if hit:
            inside = pattern.startswith("!")
    return inside


def patterns() -> list[str]:
    """The lines of .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


class Replay:
    """The build stage of a Dockerfile, step by step, with `/opt/umbel` and the working folder put
    below a folder of the test's; everything else is as it stands there."""

    def __init__(self, path: Path, folder: Path, arguments: dict[str, str]) -> None:
        self._head, stages = read(path)
        self._stage = stages[0]
        self._work = folder / "build"
        self.installed = folder / "installed"
        self._given = arguments
        # Nothing of the environment that runs this test may stand in for what an image lacks.
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        for step in self._head:
            self._argument(step.text)

    def run(self) -> None:
        """Carries out every step.

        Raises:
            AssertionError: a command failed; with what it said.
        """
        self._work.mkdir(parents=True)
        for step in self._stage.steps:
            match step.name:
                case "ARG":
                    self._argument(step.text)
                case "ENV":
                    self._environment |= dict(re.findall(r"(\w+)=(\S+)", step.text))
                case "COPY":
                    self._copy(*step.text.split())
                case "RUN":
                    self._run(step.text)
                case "WORKDIR":
                    pass
                case _:
                    raise AssertionError(f"a step that is not known here: {step}")

    def _argument(self, text: str) -> None:
        name, _, default = text.partition("=")
        if name in self._given or default:
            self._environment[name] = self._given.get(name, default)

    def _copy(self, *words: str) -> None:
        *sources, target = words
        lines = patterns()
        for source in sources:
            files = [
                path for path in (ROOT / source, *(ROOT / source).rglob("*")) if path.is_file()
            ]
            names = [str(path.relative_to(ROOT)) for path in files]
            kept = [name for name in names if allowed(name, lines)]
            assert kept, f"{source} is not in the context"
            for name in kept:
                single = len(files) == 1 and (ROOT / source).is_file()
                place = self._work / target / (Path(name).name if single else "")
                if not single:
                    place = self._work / target / Path(name).relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, place)

    def _run(self, command: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", command.replace(INSTALLED, str(self.installed))],
            cwd=self._work,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
