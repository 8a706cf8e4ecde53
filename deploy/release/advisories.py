"""Asks for known vulnerabilities of what a release installs: pip-audit over the locked packages.

    python deploy/release/advisories.py server relay client

Exits with 0 if no vulnerability is known, 1 if one is (one line for each advisory), and 3 if the
registry could not be asked, which does not mean that no vulnerability is known. With OFFLINE=1 in
the environment it does not ask, says so, and exits with 0.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

KNOWN, NOT_CHECKED = 1, 3
LOCKS = Path(__file__).parents[1] / "requirements"


def main(roles: list[str]) -> int:
    """Asks for each role; returns the exit code."""
    if os.environ.get("OFFLINE") == "1":
        print(f"not checked, as OFFLINE=1 asks: {', '.join(roles)}")
        return 0
    return max(asked(role) for role in roles)


def asked(role: str) -> int:
    """Prints the advisories about a role's packages; returns 0, KNOWN or NOT_CHECKED."""
    done = subprocess.run(  # noqa: S603  # our own files
        [
            *(sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"),
            *("--disable-pip", "--require-hashes", "-r", str(LOCKS / f"{role}.txt")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        said = done.stderr.strip().splitlines() or ["pip-audit said nothing"]
        print(f"{role}: not checked: {said[-1]}", file=sys.stderr)
        return NOT_CHECKED
    left_out = [one for one in packages if "skip_reason" in one]
    known = [(one, found) for one in packages for found in one.get("vulns", ())]
    for one, found in known:
        fixed = ", ".join(found["fix_versions"]) or "none yet"
        print(f"{role}: {one['name']} {one['version']}: {found['id']}; fixed in: {fixed}")
    if left_out:
        first = left_out[0]
        print(
            f"{role}: not checked: {len(left_out)} of {len(packages)} packages,"
            f" such as {first['name']}: {first['skip_reason']}",
            file=sys.stderr,
        )
        return NOT_CHECKED
    if known:
        return KNOWN
    print(f"{role}: nothing is known against {len(packages)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
