"""`umbel-server plan`: make, sign and show what a job may do with a site's data."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import msgspec
import typer

from umbel_common.adapters.start import norm_of
from umbel_common.errors import ConfigError, PlanError
from umbel_common.plans.drafted_start import DraftedReleased
from umbel_common.plans.plan import PLAN_VERSIONS
from umbel_common.plans.plan_file import is_not_tried, plan_from_json, plan_lines, plan_to_json
from umbel_common.plans.requests import EarlierAdapter
from umbel_common.toml_values import from_table, read_table
from umbel_common.trust.identity import fingerprint, open_signed
from umbel_host.files.output import require_new_file
from umbel_host.files.start_file import start_file
from umbel_host.files.text_file import read_text, write_new_text
from umbel_host.processes.supervisor import belong_to_parent, our_module
from umbel_host.terminal import Screen, print_lines
from umbel_server.cli.adapters import find_release
from umbel_server.cli.options import SERVER_TOML, Config, Unchecked
from umbel_server.operator.config import load_config, load_roster
from umbel_server.operator.plan_signing import require_tried, sign_as_operator

plan = typer.Typer(help="Training plans: new, try, sign, show.", no_args_is_help=True)

PlanFile = Annotated[Path, typer.Argument(help="A plan file.")]
Labels = Annotated[
    bool, typer.Option("--labels", help="Show all labels of a classification, each on a line.")
]


@plan.command()
def new(
    draft: Annotated[
        Path,
        typer.Argument(help="The draft of a plan, a TOML file; docs/operator.md describes it."),
    ],
    out: Annotated[Path, typer.Option(help="The new plan file.")],
    config: Config = SERVER_TOML,
) -> None:
    """Make a plan from a draft and the base model's folder.

    The adapter's tensors depend on the model. A separate process finds them, in the Python that
    `evaluation.python` of server.toml names, or in this one. If it does not have the packages that
    load a model, it reads the names and shapes of the weights from the model's files, and the plan
    is marked as not tried.
    """
    require_new_file(out)
    with _start_of(draft, out, config) as start:
        text = _made(python_for(config), str(draft), *([] if start is None else ["--start", start]))
        made, _ = plan_from_json(text, draft)
        place = start_file(out, made)
        if start is not None and place is not None:
            # Before the plan, which names it; a file of this name has the same content.
            os.replace(start, place)
    write_new_text(out, text)
    console = Screen()
    print_lines(console, plan_lines(made), fold=True)
    console.print(f"\nplan: {out}", soft_wrap=True)
    if place is not None:
        console.print(f"start: {place.name}, which job start needs beside the plan", soft_wrap=True)
    if is_not_tried(text):
        console.print(
            "not tried: it was made from the model's files, without loading the model.\n"
            f"Before it is signed: umbel-server plan try {out} --model FOLDER --out TRIED",
            soft_wrap=True,
        )


@plan.command("try")
def try_command(
    file: PlanFile,
    model: Annotated[Path, typer.Option(help="Folder of the plan's base model.")],
    out: Annotated[Path, typer.Option(help="The new plan file, without the mark.")],
    config: Config = SERVER_TOML,
) -> None:
    """Load the plan's base model, and try the plan on made-up records.

    It needs the packages that load a model, in the Python that `evaluation.python` of server.toml
    names, or in this one; or copy plan and model to a machine that has them.
    """
    require_new_file(out)
    text = _made(python_for(config), str(file), str(model))
    write_new_text(out, text)
    Screen().print(f"tried: {out}", soft_wrap=True)


@contextmanager
def _start_of(draft: Path, out: Path, config: Path) -> Iterator[str | None]:
    """The path of the file of a draft's `[start]`, in a folder that is deleted afterwards; None: it
    has no such table, or cannot be read, which the process that makes the plan says."""
    try:
        table = read_table(read_text(draft, ConfigError), draft).get("start")
    except ConfigError:
        table = None
    if not isinstance(table, dict) or table.get("start") not in ("label-names", "released"):
        yield None
        return
    with TemporaryDirectory(prefix=".start-", dir=out.absolute().parent) as folder:
        file = Path(folder) / "start"
        if table["start"] == "released":
            asked = from_table({"start": table}, _Draft, draft).start
            before, release, vector = find_release(load_config(config), asked.job, asked.round)
            earlier = EarlierAdapter(
                plan=plan_to_json(before),
                adapter=release.adapter.hex(),
                round=release.round,
                norm=norm_of(vector),
            )
            file.write_bytes(msgspec.json.encode(earlier))
        yield str(file)


class _Draft(msgspec.Struct, frozen=True):
    """The part of a draft that is asked of the registry."""

    start: DraftedReleased


def python_for(config: Path) -> str:
    """The Python that has the packages that load a model, if server.toml names it. Where no
    operator's folder is, plans are made with this one."""
    if config == SERVER_TOML and not config.exists():
        return sys.executable
    evaluation = load_config(config).evaluation
    return sys.executable if evaluation is None else evaluation.python or sys.executable


def _made(python: str, *arguments: str) -> str:
    """What a process of `umbel_client.drafting` prints; it prints its own errors."""
    done = subprocess.run(  # noqa: S603  # the operator's own Python
        our_module("umbel_client.drafting", *arguments, python=python),
        stdout=subprocess.PIPE,
        check=False,
        text=True,
        preexec_fn=belong_to_parent,
    )
    if done.returncode:
        raise typer.Exit(done.returncode)
    return done.stdout


@plan.command("sign")
def sign_command(
    file: PlanFile,
    out: Annotated[Path, typer.Option(help="The new signed plan file.")],
    config: Config = SERVER_TOML,
    unchecked: Unchecked = False,
) -> None:
    """Sign a plan as the operator; each site then checks it against its own policy."""
    settings = load_config(config)
    text = read_text(file, PlanError)
    made, _ = plan_from_json(text, file)
    if not unchecked:
        require_tried(text, file)
    signed = sign_as_operator(settings, made, file)
    write_new_text(out, plan_to_json(made, signed.signature))
    console = Screen()
    print_lines(console, plan_lines(made), fold=True)
    console.print(f"\nsigned plan: {out}", soft_wrap=True)


@plan.command()
def show(file: PlanFile, labels: Labels = False, config: Config = SERVER_TOML) -> None:
    """Show a plan, and whether this operator signed it."""
    made, signed = plan_from_json(read_text(file, PlanError), file)
    console = Screen()
    print_lines(console, plan_lines(made, labels=labels), fold=True)
    if signed is None:
        console.print("\nnot signed")
        return
    key = load_roster(load_config(config)).roster.operator
    open_signed(signed, PLAN_VERSIONS, key, "operator")
    console.print(f"\nsigned by {fingerprint(key)}", soft_wrap=True)
