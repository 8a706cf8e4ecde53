"""Python as a user without privileges, also where the tests run as root: root may do anything."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_NOBODY = 65534
_ROOT = Path(__file__).parents[2]
_PYTHONS = (sys.executable, "/usr/bin/python3")
_LOOK = "import sys, umbel_common.errors; assert sys.version_info >= (3, 11)"


def run_unprivileged(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs a script that imports the standard library and, of Umbel, what needs nothing more."""
    how: dict[str, Any] = {
        "env": {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{_ROOT / 'common'}:{_ROOT / 'client'}",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        "cwd": "/",
        "capture_output": True,
        "text": True,
    }
    if os.geteuid() == 0:
        how |= {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    for python in _PYTHONS:
        try:
            found = subprocess.run([python, "-c", _LOOK], **how).returncode == 0
        except PermissionError:
            found = False
        if found:
            return subprocess.run([python, "-c", script, *map(str, arguments)], check=True, **how)
    pytest.skip("a user without privileges has no Python here, or cannot read this folder")
