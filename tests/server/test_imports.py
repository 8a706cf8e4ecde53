import pkgutil
import subprocess
import sys

import umbel_server

HEAVY = ("torch", "transformers", "peft", "opacus", "datasets")


def test_the_whole_server_runs_without_torch() -> None:
    modules = [
        module.name for module in pkgutil.walk_packages(umbel_server.__path__, "umbel_server.")
    ]
    assert "umbel_server.jobs.job" in modules
    # As on a machine where only the extra `server` is installed: importing one of these fails.
    script = "\n".join(
        [
            "import sys",
            *(f"sys.modules[{name!r}] = None" for name in HEAVY),
            *(f"import {module}" for module in modules),
        ]
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
