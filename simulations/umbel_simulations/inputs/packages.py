"""Files inside installed packages. The packages are never imported: some bring a runtime of their
own, and reading a file needs none of their code."""

import importlib.util
from pathlib import Path

from umbel_common.errors import DataError


def package_folder(package: str, remedy: str) -> Path:
    """The folder of an installed package.

    Args:
        remedy: how to install it.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    if not places:
        raise DataError("a package is not installed", found=package, remedy=remedy)
    return Path(places[0])
