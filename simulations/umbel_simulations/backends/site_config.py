"""`client.toml` of a simulated site: what its administrator would write by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from umbel_client.planning.distributed import DraftDistributed
from umbel_common.adapters.reach import largest_step
from umbel_common.plans.drafted_start import DraftedLabelNames
from umbel_common.plans.plan import NoPrivacy
from umbel_host.files.model_digest import folder_digest
from umbel_simulations.scenario.scenario import Data, FileData, Scenario
from umbel_simulations.scenario.toml_text import toml_text

_AGAINST_EVERYBODY = 10_000.0
"""Bound of a simulated site's epsilon against everybody in distributed mode: it accepts any."""

CLIENT_TOML = """\
site = {site}
state = "state"
identity = "identity.pem"
roster = "roster.json"
physical_batch_size = {physical_batch_size}

[data]
path = {data}
public_size = {public_size}
{units}
[model]
path = {model}
precision = "fastest"
device = {device}
{relay}
[policy]
approval = {approval}
models = [{digest}]
tasks = [{task}]
labels = {labels}
max_rank = {rank}
max_rounds = {rounds}
max_local_steps = {local_steps}
max_clip_range = {clip_range}
{start}{privacy}
examples_as_weights = {examples}
federated_evaluation = {evaluation}
minimum_cohort = {minimum_cohort}
colluding_sites = {colluding_sites}
"""


def client_toml(
    scenario: Scenario,
    site: str,
    *,
    records: int,
    labels: Sequence[str],
    model: Path,
    approval: Literal["each-plan", "none"],
    physical_batch_size: int | Literal["auto"],
    device: str,
    data: str = "data.jsonl",
    server: str | None = None,
) -> str:
    """A configuration that allows what the scenario plans, and nothing more.

    Args:
        records: how many the site has, or how many units; the file says their `public_size`.
        data: the data file, from the file's folder.
        server: the address that the site's relay connects to; absent for a site without a relay.
    """
    return CLIENT_TOML.format(
        site=toml_text(site),
        data=toml_text(data),
        physical_batch_size=toml_text(physical_batch_size),
        public_size=public_size(records),
        model=toml_text(str(model.resolve())),
        device=toml_text(device),
        relay="" if server is None else f"\n[relay]\nserver = {toml_text(server)}\n",
        approval=toml_text(approval),
        digest=toml_text(folder_digest(model).hex()),
        task=toml_text(scenario.task.__struct_config__.tag),
        labels=toml_text(list(labels)),
        units=_units(scenario.data),
        clip_range=_longest_step(scenario),
        evaluation=toml_text(scenario.evaluation is not None),
        rank=scenario.lora.rank,
        rounds=scenario.training.rounds,
        local_steps=scenario.training.local_steps,
        start=_start_policy(scenario),
        privacy=_privacy_policy(scenario),
        examples=toml_text(scenario.aggregation.weights == "examples"),
        minimum_cohort=scenario.site_policy.minimum_cohort,
        colluding_sites=scenario.site_policy.colluding_sites,
    )


def _units(data: Data) -> str:
    if not isinstance(data, FileData) or data.unit_column is None:
        return ""
    return f'unit_column = "unit"\nmax_records_per_unit = {data.max_records_per_unit}\n'


def public_size(records: int) -> int:
    """The size that a simulated site makes public: two digits, the rest zeros."""
    unit = int(10 ** max(0, len(str(records)) - 2))
    return records // unit * unit


def _start_policy(scenario: Scenario) -> str:
    start = scenario.start
    if not isinstance(start, DraftedLabelNames):
        return ""
    return (
        'starts = ["label-names"]\n'
        f"max_start_scale = {start.scale}\nmax_start_tolerance = {start.tolerance}\n"
    )


def _longest_step(scenario: Scenario) -> float:
    """The `max_clip_range` that allows the scenario's plan (`reach.longest_step`)."""
    change = scenario.aggregation.clip_range or 1.0
    if isinstance(scenario.privacy, DraftDistributed):
        change /= scenario.training.expected_batch_size
        change = max(scenario.privacy.clip_norm, change)
    return max(change, largest_step(scenario.server, change, scenario.training.rounds))


def _privacy_policy(scenario: Scenario) -> str:
    privacy = scenario.privacy
    if isinstance(privacy, NoPrivacy):
        return "allow_without_privacy = true"
    if isinstance(privacy, DraftDistributed):
        return "\n".join(
            (
                f"max_shared_epsilon = {privacy.epsilon}",
                f"total_shared_epsilon = {privacy.epsilon}",
                # What a site's own share is worth alone, which a simulation's table reports.
                f"max_epsilon = {_AGAINST_EVERYBODY}",
                f"total_epsilon = {_AGAINST_EVERYBODY}",
                f"max_delta = {privacy.delta}",
            )
        )
    return "\n".join(
        (
            f"max_epsilon = {privacy.epsilon}",
            f"total_epsilon = {privacy.epsilon}",
            f"max_delta = {privacy.delta}",
        )
    )
