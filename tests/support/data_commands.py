"""Files of records, and `umbel-client data` run over them, for the tests of its commands."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.small_models import plan_for
from typer.testing import CliRunner

from umbel_client.cli.command import app
from umbel_common.errors import UmbelError
from umbel_common.plans.plan import Task
from umbel_common.plans.plan_file import plan_to_json

CONFIG = """
site = "north"
state = "state"
identity = "identity.pem"
roster = "roster.json"

[data]
path = "{path}"
public_size = 100
{data}

[model]
path = "{model}"

[policy]
labels = {labels}
"""
PAIRS = [
    {"prompt": f"secret {n}", "completion": "x" * (5 + n), "patient": f"p{n // 4}"}
    for n in range(20)
]
TEXTS = [{"text": f"secret {n}", "label": "ab"[n % 2], "patient": n // 4} for n in range(20)]
KINDS = ("a.jsonl", "a.csv", "a.parquet", "a")


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """The rows as the kind of file that the name says; a name without an ending is a folder."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        Dataset.from_list(list(rows)).to_csv(path)
    elif path.suffix == ".parquet":
        Dataset.from_list(list(rows)).to_parquet(path)
    else:
        Dataset.from_list(list(rows)).save_to_disk(str(path))
    return path


def command(*arguments: object) -> str:
    done = CliRunner().invoke(
        app, ["data", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    assert "secret" not in done.output
    return done.output


def shown(*arguments: object) -> dict[str, str]:
    """A command's lines by their names."""
    pairs = [line.split("  ", 1) for line in command(*arguments).splitlines()]
    return {name: value.strip() for name, value in pairs if name}


def refused(kind: type[UmbelError], *arguments: object) -> UmbelError:
    with pytest.raises(kind) as caught:
        CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    assert "secret" not in caught.value.diagnostics()
    return caught.value


def plan_file(folder: Path, model: Path, task: Task) -> Path:
    path = folder / "plan.json"
    path.write_text(plan_to_json(plan_for(model, task)))
    return path


def config_file(
    folder: Path, path: Path, model: Path, data: str = "", labels: Sequence[str] = ()
) -> Path:
    file = folder / "client.toml"
    file.write_text(
        CONFIG.format(path=path, model=model, data=data, labels=json.dumps(list(labels)))
    )
    return file
