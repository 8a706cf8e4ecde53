"""`umbel-client run`, and what the site's people do while it runs: status, watch, pause, doctor."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from umbel_client.cli.options import CLIENT_TOML, Config, Json
from umbel_client.cli.running_trainer import NOT_RUNNING, RESTART, ask_trainer, is_stale
from umbel_client.site.config import ClientConfig, load_config, relay_socket, require_relay
from umbel_client.site.decisions import Decisions
from umbel_client.site.ipc import ControlStub, SiteEvent, TrainerStatus
from umbel_common.errors import UnreachableError
from umbel_host.processes.log import configure
from umbel_host.processes.supervisor import Command, supervise
from umbel_host.terminal import Screen, json_time, local_time, print_json, print_lines, say
from umbel_host.transport.sockets import is_healthy

PROBE_SECONDS = 5.0
_STALE = f"ANOTHER WAS PINNED SINCE THE TRAINER STARTED: {RESTART}"


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


def status(config: Config = CLIENT_TOML, as_json: Json = False) -> None:
    """Show the state of trainer and relay."""
    settings = load_config(config)
    relay = _relay_state(settings, config)
    trainer = ask_trainer(settings)
    if trainer is None:
        if as_json:
            print_json({"trainer": None, "relay": relay})
        else:
            lines = [("site", settings.site), ("relay", relay), ("trainer", NOT_RUNNING)]
            print_lines(Screen(), lines)
        raise typer.Exit(UnreachableError.exit_code)
    stale = is_stale(settings, trainer)
    if as_json:
        shown = msgspec.to_builtins(trainer)
        if trainer.last is not None:
            shown["last"]["time"] = json_time(trainer.last.time)
        print_json({"trainer": {**shown, "restart_for_roster": stale}, "relay": relay})
        return
    lines = _status_lines(trainer, relay)
    print_lines(Screen(), [*lines, ("roster", _STALE)] if stale else lines)


def _relay_state(settings: ClientConfig, config: Path) -> str:
    try:
        connected = is_healthy(relay_socket(require_relay(settings, config)), PROBE_SECONDS)
    except UnreachableError:
        return "not running"
    return "connected" if connected else "not connected to the server"


def _status_lines(trainer: TrainerStatus, relay: str) -> list[tuple[str, str]]:
    lines = [
        ("site", f"{trainer.site} of {trainer.federation}"),
        ("relay", relay),
        ("trainer", _trainer_text(trainer)),
        ("network", "none" if trainer.isolated else "THE TRAINER HAS A WAY OUT"),
    ]
    if trainer.device is not None:
        memory = "" if trainer.memory is None else f", {trainer.memory} of memory in use"
        lines.append(("device", f"{trainer.device}{memory}"))
    if trainer.not_apart is not None:
        lines.append(("users", f"NOT KEPT APART: {trainer.not_apart}"))
    if trainer.waiting:
        lines.append(("to approve", ", ".join(trainer.waiting)))
    if trainer.epsilon is not None:
        whom = "" if trainer.shared is None else " against everybody"
        lines.append(("spent", f"epsilon {trainer.epsilon:.4g}{whom}"))
    if trainer.shared is not None:
        lines.append(("", trainer.shared.text()))
    if trainer.last is not None:
        lines.append(("last", _line(trainer.last)))
    return lines


def _trainer_text(trainer: TrainerStatus) -> str:
    if trainer.starting:
        return "starting"
    return "paused" if trainer.paused else "ready"


def watch(config: Config = CLIENT_TOML) -> None:
    """Print what happens at the trainer, until Ctrl-C."""
    stub = ControlStub(load_config(config).state_folder.control_socket)
    console = Screen()
    try:
        for event in stub.watch():
            console.print(_line(event), soft_wrap=True)
    finally:
        stub.close()


def _line(event: SiteEvent) -> str:
    return f"{local_time(event.time)}  {event.text.partition(chr(10))[0]}"


def pause(config: Config = CLIENT_TOML) -> None:
    """Finish a round that is under way, and begin nothing new."""
    Decisions(load_config(config).state_folder).pause()
    say("paused: plans and rounds are refused until `umbel-client resume`")


def resume(config: Config = CLIENT_TOML) -> None:
    """Undo `pause`."""
    Decisions(load_config(config).state_folder).resume()
    say("resumed")


def doctor(
    config: Config = CLIENT_TOML,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="A plan file: load the model, and measure steps of this plan on made-up records."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try everything that this site needs, one by one; change nothing."""
    # It reads models and data; no other command should wait for what that takes to load.
    from umbel_client.cli.doctor import Verdict, examine

    console = Screen()
    broken = 0
    found: list[dict[str, str]] = []
    for finding in examine(load_config(config), plan):
        broken += finding.verdict is Verdict.BROKEN
        if as_json:
            verdict = finding.verdict.value
            found.append({"check": finding.name, "verdict": verdict, "text": finding.text})
            continue
        first, *more = finding.text.splitlines()
        console.print(f"{finding.verdict.value:<5} {finding.name:<12} {first}", soft_wrap=True)
        for line in more:
            console.print(f"      {'':<12} {line}", soft_wrap=True)
    if as_json:
        print_json(found)
    if broken:
        raise typer.Exit(1)


def adapters(config: Config = CLIENT_TOML, as_json: Json = False) -> None:
    """List the adapters that this site received."""
    folder = load_config(config).state_folder.adapters
    there = folder.iterdir() if folder.exists() else ()
    found = sorted(path for path in there if not path.name.startswith("."))
    if as_json:
        print_json([{"job": path.name, "folder": str(path)} for path in found])
        return
    for path in found:
        say(f"{path.name}  {path}")
    if not found:
        say("No adapter was received yet.")


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    for command in (run, status, watch, pause, resume, adapters, doctor):
        app.command()(command)
