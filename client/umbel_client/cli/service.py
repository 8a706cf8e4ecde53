"""`umbel-client run` and what the site's people do while it runs: status, watch, pause, plans."""

import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from umbel_client.cli.options import CLIENT_TOML, Config
from umbel_client.site.config import (
    ClientConfig,
    load_config,
    relay_socket,
    require_relay,
)
from umbel_client.site.decisions import Decisions, Proposal
from umbel_client.site.ipc import ControlStub, SiteEvent, TrainerStatus
from umbel_client.site.policy import judge_plan
from umbel_common.errors import PolicyRefusal, UmbelError, UnreachableError
from umbel_common.plans.plan_file import plan_lines, privacy_text
from umbel_host.processes.log import configure
from umbel_host.processes.supervisor import Command, supervise
from umbel_host.terminal import print_lines
from umbel_host.transport.sockets import healthy

PROBE_SECONDS = 5.0


def run(config: Config = CLIENT_TOML) -> None:
    """Take part: start the trainer and the relay, and keep them running."""
    require_relay(load_config(config), config)
    configure()
    path = str(config.absolute())
    code = supervise(
        [
            Command("trainer", "umbel_client.trainer_process", (path,)),
            Command("relay", "umbel_client.relay", (path,)),
        ]
    )
    if code:
        raise typer.Exit(code)


def status(
    config: Config = CLIENT_TOML,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show how trainer and relay stand."""
    settings = load_config(config)
    stub = ControlStub(settings.state_folder.control_socket)
    try:
        trainer = stub.status()
    finally:
        stub.close()
    relay = _relay_state(settings, config)
    if as_json:
        document = {"trainer": trainer, "relay": relay}
        typer.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
        return
    print_lines(Console(highlight=False), _status_lines(trainer, relay))


def _relay_state(settings: ClientConfig, config: Path) -> str:
    try:
        connected = healthy(relay_socket(require_relay(settings, config)), PROBE_SECONDS)
    except UnreachableError:
        return "not running"
    return "connected" if connected else "not connected to the server"


def _status_lines(trainer: TrainerStatus, relay: str) -> list[tuple[str, str]]:
    lines = [
        ("site", f"{trainer.site} of {trainer.federation}"),
        ("relay", relay),
        ("trainer", "paused" if trainer.paused else "ready"),
        ("network", "none" if trainer.isolated else "THE TRAINER HAS A NETWORK"),
    ]
    if trainer.waiting:
        lines.append(("to approve", ", ".join(trainer.waiting)))
    if trainer.epsilon is not None:
        lines.append(("spent", f"epsilon {trainer.epsilon:.4g}"))
    if trainer.last is not None:
        lines.append(("last", _line(trainer.last)))
    return lines


def watch(config: Config = CLIENT_TOML) -> None:
    """Print what happens at the trainer, until Ctrl-C."""
    stub = ControlStub(load_config(config).state_folder.control_socket)
    console = Console(highlight=False)
    try:
        for event in stub.watch():
            console.print(_line(event), markup=False, soft_wrap=True)
    finally:
        stub.close()


def _line(event: SiteEvent) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    return f"{moment}  {event.text.splitlines()[0]}"


def pause(config: Config = CLIENT_TOML) -> None:
    """Begin nothing new; a round under way is finished."""
    Decisions(load_config(config).state_folder).pause()
    typer.echo("paused: plans and rounds are refused until `umbel-client resume`")


def resume(config: Config = CLIENT_TOML) -> None:
    """Undo `pause`."""
    Decisions(load_config(config).state_folder).resume()
    typer.echo("resumed")


def plans(
    config: Config = CLIENT_TOML,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """List the plans that wait for approval."""
    proposals = Decisions(load_config(config).state_folder).proposals()
    if as_json:
        rows = [{"job": one.plan.job, "digest": one.digest.hex()} for one in proposals]
        typer.echo(msgspec.json.encode(rows).decode())
        return
    console = Console(highlight=False)
    if not proposals:
        console.print("No plan waits for approval.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("job", "model", "rounds", "privacy", "digest"):
        table.add_column(name, no_wrap=True)
    for proposal in proposals:
        plan = proposal.plan
        table.add_row(
            plan.job,
            plan.model.name,
            str(plan.training.rounds),
            privacy_text(plan),
            proposal.digest.hex()[:16],
        )
    # Rich would cut a table to the width of a terminal that is none.
    console.print(table, soft_wrap=True)


def approve(
    job: Annotated[str, typer.Argument(help="The job whose plan waits, or the plan's digest.")],
    config: Config = CLIENT_TOML,
    digest: Annotated[
        str | None, typer.Option(help="Approve without asking, and only the plan of this digest.")
    ] = None,
) -> None:
    """Show a plan that waits, and allow it by your own decision."""
    settings = load_config(config)
    decisions = Decisions(settings.state_folder)
    proposal = _find(decisions, job)
    console = Console(highlight=False)
    print_lines(console, plan_lines(proposal.plan))
    try:
        judge_plan(settings.policy, proposal.plan)
    except PolicyRefusal as refusal:
        console.print(f"\nThis site's policy refuses it all the same: {refusal.check}.")
    if digest is not None:
        _require_digest(proposal, digest)
    else:
        _ask(console)
    decisions.approve(proposal.digest)
    console.print(f"\napproved: {proposal.digest.hex()}", soft_wrap=True)


def reject(
    job: Annotated[str, typer.Argument(help="The job whose plan waits, or the plan's digest.")],
    config: Config = CLIENT_TOML,
) -> None:
    """Take a plan off the list of those that wait."""
    decisions = Decisions(load_config(config).state_folder)
    proposal = _find(decisions, job)
    decisions.reject(proposal.digest)
    typer.echo(f"rejected: {proposal.digest.hex()}")


def _find(decisions: Decisions, text: str) -> Proposal:
    waiting = decisions.proposals()
    found = [one for one in waiting if text == one.plan.job or one.digest.hex().startswith(text)]
    if len(found) != 1:
        raise UmbelError(
            "no plan of this name waits for approval" if not found else "several plans match",
            found=text,
            accepted=", ".join(f"{one.plan.job} {one.digest.hex()}" for one in waiting) or None,
            remedy="umbel-client plans lists those that wait",
        )
    return found[0]


def _require_digest(proposal: Proposal, digest: str) -> None:
    if proposal.digest.hex() != digest.lower():
        raise UmbelError(
            "a plan is not the one that was to be approved: nothing was changed",
            field="--digest",
            found=proposal.digest.hex(),
            accepted=digest.lower(),
        )


def _ask(console: Console) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UmbelError(
            "a plan is approved by a person at a terminal, or by its digest",
            remedy="run this at a terminal, or add --digest with the digest that you compared;"
            " nothing was changed",
        )
    try:
        answer = console.input("\nType yes to approve: ")
    except EOFError:
        answer = ""
    if answer != "yes":
        raise UmbelError("the plan was not approved: nothing was changed")


def doctor(config: Config = CLIENT_TOML) -> None:
    """Try everything that this site needs, one by one; change nothing."""
    # It reads models and data; no other command should wait for what that takes to load.
    from umbel_client.cli.doctor import Verdict, examine

    console = Console(highlight=False)
    broken = 0
    for finding in examine(load_config(config)):
        broken += finding.state is Verdict.BROKEN
        first, *more = finding.text.splitlines()
        console.print(f"{finding.state.value:<5} {finding.name:<12} {first}", soft_wrap=True)
        for line in more:
            console.print(f"      {'':<12} {line}", soft_wrap=True)
    if broken:
        raise typer.Exit(1)


def adapters(config: Config = CLIENT_TOML) -> None:
    """List the adapters that this site received."""
    folder = load_config(config).state_folder.adapters
    found = sorted(path for path in folder.glob("*") if not path.name.startswith("."))
    for path in found:
        typer.echo(f"{path.name}  {path}")
    if not found:
        typer.echo("No adapter was received yet.")


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    for command in (run, status, watch, pause, resume, plans, approve, reject, adapters, doctor):
        app.command()(command)
