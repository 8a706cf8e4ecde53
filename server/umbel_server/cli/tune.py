"""`umbel-server tune`: search for hyper-parameters on public records."""

import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from umbel_common.device import require_device
from umbel_common.errors import ConfigError
from umbel_common.plans.requests import TuningRequest
from umbel_host.files.output import require_new_file, require_place
from umbel_host.installation import install
from umbel_host.processes.supervisor import belong_to_parent, our_module


def tune(
    draft: Annotated[Path, typer.Argument(help="The draft of a plan, a TOML file.")],
    data: Annotated[
        Path, typer.Option(help="A file with PUBLIC records of the plan's task: .jsonl, .csv, ...")
    ],
    out: Annotated[Path, typer.Option(help="The new draft, with the best values.")],
    trials: Annotated[
        int, typer.Option(help="Total number of trials, including earlier ones.")
    ] = 20,
    public_size: Annotated[
        int | None,
        typer.Option(
            help="Public size of a site, which sets its noise; default: number of training records."
        ),
    ] = None,
    sites: Annotated[
        int, typer.Option(help="Number of simulated sites, whose deltas are averaged.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Seed of the search, the noise and the division of records.")
    ] = 0,
    study: Annotated[
        Path | None, typer.Option(help="File with the trials; default: beside --out.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the labels.")] = "label",
    device: Annotated[
        str, typer.Option(help="The device that computes: cpu, cuda, cuda:1, mps, or auto.")
    ] = "cpu",
) -> None:
    """Search for learning rates and clip norm on PUBLIC records, with the plan's own privacy.

    Never use private data: a choice that looks at it reveals something that no ledger counts. So
    this command takes a file, and no site's configuration. If it is interrupted, the same command
    resumes it.
    """
    missing = [name for name in ("torch", "optuna", "tomlkit") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "the search for hyper-parameters needs packages that are not installed here",
            found=f"no {', '.join(missing)}",
            remedy=f"{install('server', 'tune')}, or tune on another machine and copy the draft",
        )
    require_device(device, field="--device")
    trials_file = study or out.with_suffix(".study.sqlite")
    request = {
        "draft": str(draft.absolute()),
        "data": str(data.absolute()),
        "out": str(out.absolute()),
        "study": str(trials_file.absolute()),
        "trials": trials,
        "public_size": public_size,
        "sites": sites,
        "seed": seed,
        "text_column": text_column,
        "label_column": label_column,
        "device": device,
    }
    try:
        checked = msgspec.convert(request, TuningRequest)
    except msgspec.ValidationError as error:
        raise typer.BadParameter(str(error)) from None
    require_new_file(out)
    require_place(trials_file)
    done = subprocess.run(  # noqa: S603  # our own module
        our_module("umbel_client.tuning"),
        input=msgspec.json.encode(checked),
        check=False,
        preexec_fn=belong_to_parent,
    )
    if done.returncode:
        # The process has printed its error.
        raise typer.Exit(done.returncode)
