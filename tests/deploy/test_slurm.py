"""The script of a Slurm job, without Slurm: which commands it starts, and how it ends."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy/slurm/umbel-site.sbatch"
NOTE = '#!/bin/bash\necho "{name} $* proxy=${{HTTPS_PROXY:-none}} in $PWD" >> "$NOTES"\n'


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with commands that note how they were started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("umbel-client", "ssh"):
        command = folder / name
        command.write_text(NOTE.format(name=name))
        command.chmod(0o755)
    return folder


def run(tmp_path: Path, commands: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{commands}:{os.environ['PATH']}"
    environment = {"PATH": path, "NOTES": str(tmp_path / "notes"), **variables}
    return subprocess.run(
        ["bash", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )


def noted(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "notes").read_text().splitlines())


def test_a_job_runs_the_site_of_its_folder(tmp_path: Path, commands: Path) -> None:
    done = run(tmp_path, commands, UMBEL_SITE=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert noted(tmp_path) == [
        f"umbel-client run --config client.toml proxy=none in {tmp_path}",
    ]


def test_a_node_without_a_way_out_goes_through_a_forwarded_proxy(
    tmp_path: Path, commands: Path
) -> None:
    forward = "3128:proxy.clinic.example:3129,login1"
    done = run(tmp_path, commands, UMBEL_SITE=str(tmp_path), UMBEL_FORWARD=forward)
    assert (done.returncode, done.stderr) == (0, "")
    client, ssh = sorted(noted(tmp_path), key=lambda line: line.startswith("ssh"))
    assert client.endswith(f"client.toml proxy=http://127.0.0.1:3128 in {tmp_path}")
    assert "-L 127.0.0.1:3128:proxy.clinic.example:3129 login1" in ssh


def test_a_job_without_a_folder_does_not_run(tmp_path: Path, commands: Path) -> None:
    done = run(tmp_path, commands)
    assert done.returncode != 0
    assert "UMBEL_SITE" in done.stderr
    assert not (tmp_path / "notes").exists()
    assert run(tmp_path, commands, UMBEL_SITE=str(tmp_path / "none")).returncode != 0
