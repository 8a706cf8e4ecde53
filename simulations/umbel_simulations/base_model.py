"""Where a scenario's base model lies."""

import importlib.util
from pathlib import Path

from umbel_common.errors import ModelError
from umbel_simulations.gguf_model import REMEDY, converted
from umbel_simulations.packages import package_folder
from umbel_simulations.scenario import Model


def model_folder(model: Model) -> Path:
    """Where the base model lies; a package that carries one is found, not imported.

    Raises:
        ModelError: it is not there.
    """
    if model.path is not None:
        folder, remedy = Path(model.path), "correct model.path"
    elif model.gguf is not None:
        return converted(package_folder(model.package or "", REMEDY) / model.gguf)
    else:
        package = model.package or ""
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations if spec is not None else None
        folder = Path(places[0] if places else package) / "model"
        remedy = 'install the package; pip install "umbel[demo]" brings the one of the demo'
    if not folder.is_dir():
        raise ModelError("the base model is not there", file=folder, field="model", remedy=remedy)
    return folder
