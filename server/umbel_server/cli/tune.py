"""`umbel-server tune`: hyper-parameters on public records."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from umbel_common.errors import ConfigError
from umbel_common.plans.requests import TuningRequest


def tune(
    draft: Annotated[Path, typer.Argument(help="A plan's draft, TOML.")],
    data: Annotated[
        Path, typer.Option(help="A file with PUBLIC records of the plan's task: .jsonl, .csv, ...")
    ],
    out: Annotated[Path, typer.Option(help="The draft with the best values, which this makes.")],
    trials: Annotated[int, typer.Option(help="Trials in all, earlier ones included.")] = 20,
    public_size: Annotated[
        int | None,
        typer.Option(help="Public size of a site, for its noise; default: the training records."),
    ] = None,
    sites: Annotated[int, typer.Option(help="Sites to play, whose deltas are averaged.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the search, the noise and the division.")] = 0,
    study: Annotated[
        Path | None, typer.Option(help="The file with the trials; default: beside --out.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the labels.")] = "label",
) -> None:
    """Look for learning rates and clip norm on PUBLIC records, under the plan's own privacy.

    Never on private data: to choose by it is a query that no ledger counts. So this takes a file
    and no site's configuration. A call that was stopped goes on when it is given again.
    """
    missing = [name for name in ("torch", "optuna", "tomlkit") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "hyper-parameters are looked for with packages that are not installed here",
            found=f"no {', '.join(missing)}",
            remedy="pip install 'umbel[server,tune]', or tune on another machine: a draft is a"
            " file like any other",
        )
    request = {
        "draft": str(draft.absolute()),
        "data": str(data.absolute()),
        "out": str(out.absolute()),
        "study": str((study or out.with_suffix(".study.sqlite")).absolute()),
        "trials": trials,
        "public_size": public_size,
        "sites": sites,
        "seed": seed,
        "text_column": text_column,
        "label_column": label_column,
    }
    try:
        checked = msgspec.convert(request, TuningRequest)
    except msgspec.ValidationError as error:
        raise typer.BadParameter(str(error)) from None
    done = subprocess.run(  # our own module
        [sys.executable, "-m", "umbel_client.tuning"],
        input=msgspec.json.encode(checked),
        check=False,
    )
    if done.returncode:
        # It said itself what is wrong.
        raise typer.Exit(done.returncode)
