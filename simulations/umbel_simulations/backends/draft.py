"""The draft of a plan, as an operator writes it by hand for `umbel-server plan new`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from umbel_common.plans.server_optimizer import Average
from umbel_simulations.scenario.plan import plan_optimizer, plan_task
from umbel_simulations.scenario.scenario import Scenario
from umbel_simulations.scenario.toml_text import toml_text


def draft_toml(scenario: Scenario, labels: Sequence[str], model: Path, holdout: str = "") -> str:
    """A draft of the scenario's plan.

    Args:
        holdout: file of the public records that a release gate asks.
    """
    training = scenario.training
    tables: dict[str, Mapping[str, object]] = {
        "": {"federation": scenario.name, "job": scenario.name, "seed": scenario.seed},
        "model": {"name": scenario.model.name, "path": str(model)},
        "task": _fields(plan_task(scenario, tuple(labels))),
        "lora": _fields(scenario.lora),
        "training": {
            "rounds": training.rounds,
            "local_steps": training.local_steps,
            "expected_batch_size": training.expected_batch_size,
            "final_learning_rate": training.final_learning_rate,
            "average_decay": training.average_decay,
        },
        "training.optimizer": _fields(plan_optimizer(scenario)),
        "privacy": _fields(scenario.privacy),
        "aggregation": _fields(scenario.aggregation),
    }
    if not isinstance(scenario.server, Average):
        server = _fields(scenario.server)
        del server["schedule"]
        tables["server"] = server
        tables["server.schedule"] = _fields(scenario.server.schedule)
    if scenario.evaluation is not None:
        tables["evaluation"] = _fields(scenario.evaluation)
    if scenario.release_gate is not None:
        tables["release_gate"] = {"holdout": holdout, **_fields(scenario.release_gate)}
    return "\n".join(_table(name, fields) for name, fields in tables.items())


def _fields(part: msgspec.Struct) -> dict[str, object]:
    found: dict[str, object] = msgspec.to_builtins(part)
    return found


def _table(name: str, fields: Mapping[str, object]) -> str:
    head = f"[{name}]\n" if name else ""
    lines = [
        f"{field} = {toml_text(value)}\n" for field, value in fields.items() if value is not None
    ]
    return head + "".join(lines)
