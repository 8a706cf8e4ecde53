"""`umbel-server plan`: make, sign and show what a job may do with a site's data."""

import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from umbel_common.errors import ConfigError, PlanError
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.plan_file import plan_from_json, plan_lines, plan_to_json
from umbel_common.secagg.encoding import encoding_of
from umbel_common.trust.identity import Signed, fingerprint, open_signed, sign
from umbel_host.files.keys import read_identity
from umbel_host.files.text_file import read_text, write_new_text
from umbel_host.processes.supervisor import our_module
from umbel_host.terminal import Screen, print_lines
from umbel_server.cli.options import SERVER_TOML, Config
from umbel_server.operator.config import ServerConfig, load_config, load_roster

plan = typer.Typer(help="Training plans: new, sign, show.", no_args_is_help=True)

PlanFile = Annotated[Path, typer.Argument(help="A plan file.")]


@plan.command()
def new(
    draft: Annotated[
        Path,
        typer.Argument(help="The draft of a plan, a TOML file; docs/operator.md describes it."),
    ],
    out: Annotated[Path, typer.Option(help="The new plan file.")],
) -> None:
    """Make a plan from a draft and the base model's folder.

    The adapter's tensors depend on the model. A separate process with the client's packages finds
    them; the server itself does not have these packages.
    """
    if find_spec("torch") is None:
        raise ConfigError(
            "a plan is made with the client's packages, which are not installed here",
            remedy="pip install 'umbel[client]' beside the server, or make the plan on another"
            " machine and copy the file: it is signed here",
        )
    command = our_module("umbel_client.drafting", str(draft))
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)  # noqa: S603
    if done.returncode:
        # The process has printed its error.
        raise typer.Exit(done.returncode)
    made, _ = plan_from_json(done.stdout, draft)
    write_new_text(out, plan_to_json(made))
    console = Screen()
    print_lines(console, plan_lines(made), fold=True)
    console.print(f"\nplan: {out}", soft_wrap=True)


@plan.command("sign")
def sign_command(
    file: PlanFile,
    out: Annotated[Path, typer.Option(help="The new signed plan file.")],
    config: Config = SERVER_TOML,
) -> None:
    """Sign a plan as the operator; each site then checks it against its own policy."""
    made, _ = plan_from_json(read_text(file), file)
    signed = sign_as_operator(load_config(config), made, file)
    write_new_text(out, plan_to_json(made, signed.signature))
    console = Screen()
    print_lines(console, plan_lines(made), fold=True)
    console.print(f"\nsigned plan: {out}", soft_wrap=True)


def sign_as_operator(settings: ServerConfig, made: TrainingPlan, file: Path) -> Signed:
    """A plan with the operator's signature.

    Args:
        file: where it came from, for errors.

    Raises:
        PlanError: it is for another federation, or its sum would overflow.
        IdentityError: the operator's key cannot be used.
    """
    document = load_roster(settings)
    if made.federation != document.roster.federation:
        raise PlanError(
            "a plan is for another federation",
            file=file,
            field="federation",
            found=made.federation,
            accepted=document.roster.federation,
        )
    # The sum of all sites' deltas must fit, or the job would fail in its first round.
    encoding_of(made.aggregation, max(len(document.roster.members), 1)).prove_headroom()
    return sign(read_identity(Path(settings.identity)), made)


@plan.command()
def show(file: PlanFile, config: Config = SERVER_TOML) -> None:
    """Show a plan, and whether this operator signed it."""
    made, signed = plan_from_json(read_text(file), file)
    console = Screen()
    print_lines(console, plan_lines(made), fold=True)
    if signed is None:
        console.print("\nnot signed")
        return
    key = load_roster(load_config(config)).roster.operator
    open_signed(signed, TrainingPlan, key, "operator")
    console.print(f"\nsigned by {fingerprint(key)}", soft_wrap=True)
