"""Home folders of their own for a test's processes, and so a register of ledgers of their own.

Umbel asks the system where the user's home is. `own_register/sitecustomize.py` changes the answer
in this process, and in each that inherits the variables that are set here.
"""

import os
import runpy
from pathlib import Path

_OWN_REGISTER = Path(__file__).parent / "own_register"
_HOME = "UMBEL_HOME_OF_TESTS"


def own_homes() -> None:
    """Lets `live_in` name the home folder of this process and of those that it starts."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_OWN_REGISTER), before)))
    runpy.run_path(str(_OWN_REGISTER / "sitecustomize.py"))


def live_in(folder: Path | str) -> None:
    """Makes a folder the home of what starts from now on."""
    os.environ[_HOME] = str(folder)


def home() -> str:
    """The folder that `live_in` named last."""
    return os.environ[_HOME]
