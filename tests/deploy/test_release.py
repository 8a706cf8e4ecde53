"""What is said of a release's packages, also where nobody can be asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "release" / "advisories.py"
FINE = {"name": "rich", "version": "14.3.4", "vulns": []}
BAD = {
    "name": "msgspec",
    "version": "0.22.0",
    "vulns": [{"id": "CVE-1", "fix_versions": ["0.22.1"]}, {"id": "CVE-2", "fix_versions": []}],
}
UNKNOWN = {"name": "flwr", "skip_reason": "not found"}


def advisories(folder: Path, answer: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the script over a pip-audit that gives this answer: the real one asks the network."""
    (folder / "pip_audit.py").write_text(
        f"import sys\nassert '--require-hashes' in sys.argv\nprint({answer!r})\n"
        "print('no route', file=sys.stderr)\n"
    )
    return subprocess.run(
        [sys.executable, SCRIPT, "relay"],
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([FINE], 0, "relay: nothing is known against 1 packages"),
        ([FINE, BAD], 1, "relay: msgspec 0.22.0: CVE-1; fixed in: 0.22.1"),
        ([FINE, BAD], 1, "relay: msgspec 0.22.0: CVE-2; fixed in: none yet"),
        ([FINE, UNKNOWN], 3, "relay: not checked: 1 of 2 packages, such as flwr: not found"),
        ([BAD, UNKNOWN], 3, "CVE-1"),
    ],
)
def test_what_is_known(
    tmp_path: Path, packages: list[dict[str, object]], code: int, said: str
) -> None:
    done = advisories(tmp_path, json.dumps({"dependencies": packages}))
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_no_network_is_not_the_same_as_nothing_known(tmp_path: Path) -> None:
    done = advisories(tmp_path, "")
    assert (done.returncode, done.stderr) == (3, "relay: not checked: no route\n")


def test_who_says_offline_is_believed_and_told_so(tmp_path: Path) -> None:
    done = advisories(tmp_path, "", OFFLINE="1")
    assert (done.returncode, done.stdout) == (0, "not checked, as OFFLINE=1 asks: relay\n")
