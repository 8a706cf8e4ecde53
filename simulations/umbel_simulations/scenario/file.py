"""Finds, reads and checks scenario files, and applies the command line's options to them."""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from umbel_client.planning.distributed import DraftDistributed
from umbel_common.device import require_device
from umbel_common.errors import ConfigError
from umbel_common.plans.drafted_start import DraftedLabelNames
from umbel_common.plans.plan import CausalLm, NoPrivacy
from umbel_common.toml_values import from_table, read_table
from umbel_host.files.text_file import from_home
from umbel_simulations.scenario.scenario import (
    FileData,
    HpoData,
    Icd10Data,
    Scenario,
)

SHIPPED = Path(__file__).parents[1] / "scenarios"


def list_scenarios() -> tuple[Scenario, ...]:
    """The scenarios that the package ships, in the order of their file names."""
    return tuple(_load(path) for path in sorted(SHIPPED.glob("*.toml")))


def find_scenario(name_or_path: str) -> Scenario:
    """A shipped scenario by its name, or any scenario by the path of its TOML file.

    Raises:
        ConfigError: there is no such scenario, or its parts do not fit together.
    """
    shipped = SHIPPED / f"{name_or_path}.toml"
    is_path = name_or_path.endswith(".toml") or os.sep in name_or_path
    path = Path(name_or_path) if is_path else shipped
    # A folder that is closed to this user may hold it: reading it says so.
    closed = is_path and not os.access(path.parent, os.X_OK) and path.parent.is_dir()
    if not closed and not os.path.isfile(path):
        names = ", ".join(file.stem for file in sorted(SHIPPED.glob("*.toml")))
        raise ConfigError(
            "there is no such scenario",
            found=name_or_path,
            accepted=f"{names}, or the path of a .toml file",
            remedy="`umbel-simulate list` shows what ships",
        )
    return _load(path)


def override(
    scenario: Scenario,
    *,
    sites: int | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    no_dp: bool = False,
) -> Scenario:
    """The scenario with the command line's options in place of its own values.

    A different number of sites gets generated names and the smallest threshold that the site policy
    allows.

    Raises:
        ConfigError: the options do not fit the rest of the scenario.
    """
    replace = msgspec.structs.replace
    if sites is not None and sites != scenario.sites.count:
        threshold = least_threshold(sites, scenario.site_policy.colluding_sites)
        scenario = replace(
            scenario,
            sites=replace(scenario.sites, count=sites, names=None),
            aggregation=replace(scenario.aggregation, threshold=threshold),
        )
    if rounds is not None:
        scenario = replace(scenario, training=replace(scenario.training, rounds=rounds))
    if seed is not None:
        scenario = replace(scenario, seed=seed)
    if no_dp:
        # Without noise there is nothing to subtract from Adam's moments.
        training = replace(scenario.training, unbiased=False)
        scenario = replace(scenario, privacy=NoPrivacy(), training=training)
    check_scenario(scenario, f"scenario {scenario.name} with the command line's options")
    return scenario


def least_threshold(sites: int, colluding_sites: int) -> int:
    """The smallest t with 2 t > sites + colluding_sites.

    With it, two survivor sets that each have t signatures share an honest signer.
    """
    return max(2, (sites + colluding_sites) // 2 + 1)


def check_scenario(scenario: Scenario, file: object) -> None:
    """Refuses a scenario whose parts do not fit together. Each field's type checks its own value.

    Raises:
        ConfigError: names the field.
    """

    def require(fits: bool, field: str, found: object, accepted: str) -> None:
        message = "two values of a scenario do not fit together"
        if not fits:
            raise ConfigError(message, file=file, field=field, found=found, accepted=accepted)

    require(len(scenario.compute.devices) > 0, "compute.device", "none", "at least one device")
    for device in scenario.compute.devices:
        require_device(device, field="compute.device", file=file)
    _check_sources(scenario, require)
    _check_protocol(scenario, require)
    for index, dropout in enumerate(scenario.faults.dropouts):
        names, rounds = scenario.sites.all_names, scenario.training.rounds
        field = f"faults.dropouts[{index}]"
        require(dropout.site in names, f"{field}.site", dropout.site, ", ".join(names))
        require(
            dropout.round <= rounds,
            f"{field}.round",
            dropout.round,
            f"at most training.rounds = {rounds}",
        )


Require = Callable[[bool, str, object, str], None]
"""Takes a condition, then field, found and accepted; raises unless the condition holds."""


def _check_sources(scenario: Scenario, require: Require) -> None:
    model, sites = scenario.model, scenario.sites
    places = [name for name in ("package", "path") if getattr(model, name) is not None]
    require(
        len(places) == 1,
        "model",
        " and ".join(places) or "neither package nor path",
        "exactly one of package and path",
    )
    require(
        len(set(sites.all_names)) == sites.count == len(sites.all_names),
        "sites.names",
        ", ".join(sites.all_names),
        f"sites.count = {sites.count} different names",
    )
    require(
        (sites.partition == "column") == (sites.column is not None),
        "sites.column",
        sites.column or "no column",
        'a column if partition = "column", otherwise none',
    )
    for kind, source, column in ((Icd10Data, "icd10cm", "category"), (HpoData, "hpo", "system")):
        require(
            not isinstance(scenario.data, kind) or sites.column in (None, column),
            "sites.column",
            sites.column,
            f'{column}, with data.source = "{source}"',
        )
    answers, data = isinstance(scenario.task, CausalLm), scenario.data
    require(
        isinstance(data, FileData) or isinstance(data, HpoData) == answers,
        "data.source",
        data.__struct_config__.tag,
        'hpo or files if task = "causal-lm", otherwise icd10cm or files',
    )
    if isinstance(data, FileData):
        _check_files(scenario, data, require)
    else:
        require(
            sites.partition != "files", "sites.partition", "files", 'a data.source = "files" for it'
        )
    fitting = {"base", "local-only", "pooled"} if answers else {"majority", "head-only"}
    others = {"local-only", "pooled"} | fitting
    require(
        set(scenario.baselines) <= others,
        "baselines",
        ", ".join(scenario.baselines),
        ", ".join(sorted(others)),
    )
    require(
        model.gguf is None or model.package is not None,
        "model.gguf",
        model.gguf,
        "a file of model.package",
    )


def _check_files(scenario: Scenario, data: FileData, require: Require) -> None:
    sites = scenario.sites
    several = isinstance(data.train, dict)
    require(
        several == (sites.partition == "files"),
        "sites.partition",
        sites.partition,
        '"files" if data.train names a file for each site, otherwise another one',
    )
    if isinstance(data.train, dict):
        require(
            set(data.train) == set(sites.all_names),
            "data.train",
            ", ".join(data.train),
            f"a file for each of {', '.join(sites.all_names)}",
        )
    if isinstance(scenario.task, CausalLm):
        require(
            data.records_per_label is None,
            "data.records_per_label",
            data.records_per_label,
            "none for a language model, whose records have no label",
        )
    else:
        require(data.general is None, "data.general", data.general, "none for a classification")


def _check_protocol(scenario: Scenario, require: Require) -> None:
    count, policy = scenario.sites.count, scenario.site_policy
    require(
        policy.minimum_cohort <= count,
        "site_policy.minimum_cohort",
        policy.minimum_cohort,
        f"at most sites.count = {count}",
    )
    least = least_threshold(count, policy.colluding_sites)
    require(
        least <= count,
        "site_policy.colluding_sites",
        policy.colluding_sites,
        f"less than sites.count - 1 = {count - 1}",
    )
    require(
        least <= scenario.aggregation.threshold <= count,
        "aggregation.threshold",
        scenario.aggregation.threshold,
        f"{least} to {count}, since 2 x threshold must exceed sites + colluding sites",
    )
    privacy = scenario.privacy
    if isinstance(privacy, DraftDistributed):
        require(
            privacy.least_survivors <= count,
            "privacy.least_survivors",
            privacy.least_survivors,
            f"at most sites.count = {count}",
        )
        honest = privacy.least_survivors - policy.colluding_sites
        require(
            privacy.honest <= honest,
            "privacy.honest",
            privacy.honest,
            f"at most least_survivors without colluding sites, {honest}",
        )


def _load(path: Path) -> Scenario:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("a scenario cannot be read", file=path, found=error) from error
    return parse_scenario(text, path)


def parse_scenario(text: str, path: Path) -> Scenario:
    """The scenario of a text.

    Args:
        path: the file that it is in, or will be; relative paths start at its folder.

    Raises:
        ConfigError: a field is unknown, missing or wrong, or parts do not fit together.
    """
    table = read_table(text, path)
    task = table.get("task")
    if isinstance(task, dict):
        # Most scenarios are classifications, and need not say so.
        task.setdefault("task", "classification")
    data, sites = table.get("data"), table.get("sites")
    if isinstance(data, dict) and isinstance(sites, dict) and isinstance(data.get("train"), dict):
        # The files say who the sites are.
        names = list(data["train"])
        for field, value in (("count", len(names)), ("names", names), ("partition", "files")):
            sites.setdefault(field, value)
    scenario = _anchored(from_table(table, Scenario, path), path)
    check_scenario(scenario, path)
    return scenario


def _anchored(scenario: Scenario, file: Path) -> Scenario:
    """The scenario with the relative paths of its file made absolute."""
    replace, folder = msgspec.structs.replace, file.resolve().parent

    def resolve(name: str, field: str) -> str:
        return str(folder / from_home(name, file, field=field))

    model, data = scenario.model, scenario.data
    if model.gguf is not None:
        # It starts at its package, and is only checked here.
        resolve(model.gguf, "model.gguf")
    if model.path is not None:
        model = replace(model, path=resolve(model.path, "model.path"))
    if isinstance(data, FileData):
        train = (
            resolve(data.train, "data.train")
            if isinstance(data.train, str)
            else {site: resolve(name, f"data.train.{site}") for site, name in data.train.items()}
        )
        general = None if data.general is None else resolve(data.general, "data.general")
        test = resolve(data.test, "data.test")
        data = replace(data, train=train, test=test, general=general)
    start = scenario.start
    if isinstance(start, DraftedLabelNames) and isinstance(start.names, str):
        start = replace(start, names=resolve(start.names, "start.names"))
    return replace(scenario, model=model, data=data, start=start)
