"""`umbel-client doctor`: tries everything that a site needs, one by one, and changes nothing.

It proves rather than believes: it takes the network away from a process and looks, it opens a
connection to the server, and it reads the data. It speaks first, and then gives its own network
away before it reads.
"""

import math
import os
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import partial
from pathlib import Path

import httpx
from cryptography import x509

from umbel_client.cli.running_trainer import NOT_RUNNING, RESTART, ask_trainer, is_stale
from umbel_client.data.site_data import SiteData
from umbel_client.ledger.file import read_ledger, require_data_set
from umbel_client.ledger.register import machine_register, marks_of
from umbel_client.ledger.spending import charged_text
from umbel_client.relay.proxy import way_to
from umbel_client.site.config import ClientConfig
from umbel_client.site.pinned_roster import check_own_key, load_pinned
from umbel_client.trainer.isolation import confine_command
from umbel_common.errors import PlanError, UmbelError
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.trust.identity import fingerprint
from umbel_host.files.keys import read_identity
from umbel_host.files.model_digest import folder_digest
from umbel_host.files.text_file import read_text
from umbel_host.processes.lifecycle import explained, reason, refused, user_name

_SOON = timedelta(days=30)
_ENOUGH_BYTES = 1 << 30

_NOT_JOINED = "not joined yet: umbel-client join KIT, with the kit that the operator sends"

_DROP = """
import sys
from umbel_client.trainer.isolation import drop_network
sys.exit(drop_network())
"""


class Verdict(Enum):
    """How a check ended."""

    FINE = "ok"
    CARE = "look"
    """The check passed, and a person should know something about it."""
    BROKEN = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One check."""

    name: str
    verdict: Verdict
    text: str
    """What was found, and what to do where it is broken."""


Check = Callable[[ClientConfig], tuple[Verdict, str]]
ReadData = Callable[[ClientConfig], SiteData]


def examine(config: ClientConfig, plan: Path | None = None) -> Iterator[Finding]:
    """Runs every check, whatever the others found, and confines this process for good.

    Args:
        plan: a plan file, whose steps are tried at the end.
    """
    spoken = {name: _tried(name, CHECKS[name], config) for name in _SPEAKING}
    confine_command()
    read = _Once()
    about_data: dict[str, Check] = {
        name: partial(check, read=read) for name, check in _ABOUT_DATA.items()
    }
    for name, check in {**CHECKS, **about_data}.items():
        yield spoken[name] if name in spoken else _tried(name, check, config)
    if plan is not None:
        yield _tried("plan", partial(_plan, path=plan), config)


class _Once:
    """Reads the data for the first check that asks, and no other time."""

    def __init__(self) -> None:
        self._found: SiteData | None = None

    def __call__(self, config: ClientConfig) -> SiteData:
        """See `SiteData.load`."""
        self._found = self._found or SiteData.load(config)
        return self._found


def _tried(name: str, check: Check, config: ClientConfig) -> Finding:
    try:
        verdict, text = check(config)
    except UmbelError as error:
        verdict, text = Verdict.BROKEN, explained(error).diagnostics()
    except OSError as error:
        verdict, text = Verdict.BROKEN, refused(error).diagnostics()
    return Finding(name, verdict, text)


def _identity(config: ClientConfig) -> tuple[Verdict, str]:
    return Verdict.FINE, fingerprint(read_identity(Path(config.identity)).public_key)


def _roster(config: ClientConfig) -> tuple[Verdict, str]:
    pinned = load_pinned(config)
    check_own_key(pinned, config.site, read_identity(Path(config.identity)))
    operator = fingerprint(pinned.roster.operator)
    return Verdict.FINE, f"{len(pinned.roster.members)} sites, operator {operator}"


def _model(config: ClientConfig) -> tuple[Verdict, str]:
    from umbel_client.training.model_look import describe

    folder = Path(config.model.path)
    found = folder_digest(folder).hex()
    text = describe(folder)
    if found not in config.policy.models:
        return Verdict.BROKEN, (
            f"policy.models does not allow the model at hand, {found}: if it is the one that was"
            f' agreed on, put models = ["{found}"] into [policy] of client.toml\n{text}'
        )
    return Verdict.FINE, f"{found}\n{text}"


def _device(config: ClientConfig) -> tuple[Verdict, str]:
    # Only here: the other checks should not wait for what it takes to load PyTorch.
    from umbel_client.models.base.device import chosen_devices, described, require_alike
    from umbel_client.models.base.precision import chosen_precision
    from umbel_client.models.base.spread import require_exact_copies
    from umbel_client.training.device_check import try_private_step

    devices = chosen_devices(config.model.device)
    # Before a look at its precision, so that a GPU that does not answer is a finding.
    name = described(*devices)
    require_exact_copies(devices)
    if config.model.split == "records":
        require_alike(devices)
        name += ", each with a copy of the model"
    times = [try_private_step(device, entropy=os.urandom) for device in devices]
    precision = chosen_precision(config.model.precision, *devices)
    took = ", ".join(f"{seconds * 1000:.1f}" for seconds in times)
    return Verdict.FINE, (
        f"{name}, frozen layers in {precision}: a small private step takes"
        f" {took} ms, and gives what this machine's processor gives"
    )


def _plan(config: ClientConfig, path: Path) -> tuple[Verdict, str]:
    """Seconds and memory of the plan's steps; whether the policy allows it is for `approve`."""
    from umbel_client.models.base.device import memory_in_use
    from umbel_client.training.trial import try_plan

    plan, _ = plan_from_json(read_text(path, PlanError), path)
    try:
        found = try_plan(config, plan, entropy=os.urandom)
    except (RuntimeError, MemoryError) as error:
        return Verdict.BROKEN, f"the model cannot be loaded or computed here: {error}"
    expected, steps = plan.training.expected_batch_size, plan.training.local_steps
    seconds = found.seconds * math.ceil(expected / found.rows)
    memory = memory_in_use(*found.devices)
    lines = [
        f"{found.rows} records of {plan.task.max_tokens} tokens, computed at once, take"
        f" {found.seconds:.3g} s",
        f"a step on {expected:g} records takes about {seconds:.3g} s, and a round of {steps} steps"
        f" {seconds * steps:.3g} s: less where records are shorter or frozen layers are cached",
    ]
    return Verdict.FINE, "\n".join(
        lines if memory is None else [*lines, f"{memory} of memory in use"]
    )


def _data(config: ClientConfig, read: ReadData = SiteData.load) -> tuple[Verdict, str]:
    data = read(config)
    data.require()
    if not data.read:
        if config.policy.approval == "each-plan":
            return Verdict.CARE, (
                "not read: policy.labels names no labels yet. umbel-client approve offers to write"
                " those of a plan; until then, umbel-client data check looks at the file"
            )
        return Verdict.BROKEN, "policy.labels names no labels, so every plan is refused"
    records = next(iter(data.read.values()))
    column = config.data.unit_column
    unit = "each its own unit" if column is None else f"units by {column}"
    warnings = list(data.warnings())
    verdict = Verdict.CARE if warnings else Verdict.FINE
    return verdict, "\n".join([f"{len(records):,} records, {unit}", *warnings])


def _ledger(config: ClientConfig, read: ReadData = SiteData.load) -> tuple[Verdict, str]:
    path = config.state_folder.ledger
    if not path.exists():
        return Verdict.FINE, "none yet: the first plan creates it"
    contents = read_ledger(path)
    if contents.old_copy:
        return Verdict.BROKEN, "an old copy: state what was spent since (docs/budget.md)"
    data_set = read(config).data_set
    if data_set is not None:
        require_data_set(path, contents, data_set, config.data.unit_column)
    return Verdict.FINE, f"{charged_text(contents)}, head {contents.head().hex()[:16]}"


def _data_set(config: ClientConfig, read: ReadData = SiteData.load) -> tuple[Verdict, str]:
    source = read(config).source
    if source is None:
        return Verdict.CARE, "the data cannot be read, so its ledger is not known"
    marks = marks_of(config, source)
    register = machine_register()
    register.require_free(config.state_folder.ledger, marks)
    found = [entry.ledger for entry in register.find(marks)]
    if not found:
        text = f"has no ledger yet in {register.folder}: the first plan creates it"
    else:
        text = f"its ledger is {', '.join(found)}"
        if found != [str(config.state_folder.ledger)]:
            return Verdict.CARE, f"{text}, which is gone: state what was spent (docs/budget.md)"
    if config.data.name is None:
        return Verdict.CARE, f"{text}. Give data.name, so that a changed file is known too"
    return Verdict.FINE, f"{config.data.name}: {text}"


def _modes(config: ClientConfig) -> tuple[Verdict, str]:
    there = [path for path in (Path(config.data.path), Path(config.state)) if path.exists()]
    for path in there:
        if stat.S_IMODE(path.stat().st_mode) & 0o007:
            change = shlex.join(["chmod", "o=", str(path)])
            return Verdict.CARE, f"every user of this machine may read {path}: {change}"
    if not there:
        return Verdict.CARE, "neither data nor state is there yet"
    return Verdict.FINE, "data and state are closed to other users"


def _disk(config: ClientConfig) -> tuple[Verdict, str]:
    folder = Path(config.state)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    verdict = Verdict.FINE if free >= _ENOUGH_BYTES else Verdict.CARE
    return verdict, f"{free / 1e9:.1f} GB free at {folder}"


def _isolation(config: ClientConfig) -> tuple[Verdict, str]:
    tried = subprocess.run(  # noqa: S603  # our own module
        [sys.executable, "-P", "-c", _DROP], capture_output=True, text=True, check=False
    )
    if tried.returncode == 0:
        return Verdict.FINE, "a process here can close every way out"
    verdict = Verdict.BROKEN if config.isolation == "required" else Verdict.CARE
    return verdict, (
        f"a process here keeps a way out ({tried.stderr.strip()}): run the trainer on x86-64 or"
        " ARM64, where the kernel allows seccomp"
    )


def _users(config: ClientConfig) -> tuple[Verdict, str]:
    if config.relay is None:
        return Verdict.CARE, "client.toml has no table [relay]: umbel-client join KIT"
    try:
        trainer = os.stat(config.identity).st_uid
        relay = os.stat(config.relay.key).st_uid
    except OSError as error:
        return Verdict.CARE, f"{error.filename}: {reason(error)}"
    if trainer == relay:
        return Verdict.CARE, (
            f"one user, {user_name(trainer)}, has the keys of trainer and relay: run each as a user"
            ' of its own (docs/deploy/systemd.md); isolation = "required" refuses anything else'
        )
    if trainer == 0:
        return Verdict.CARE, "the identity key is root's: run the trainer as a user of its own"
    return Verdict.FINE, f"trainer {user_name(trainer)}, relay {user_name(relay)}"


def _certificate(config: ClientConfig) -> tuple[Verdict, str]:
    if config.relay is None:
        return Verdict.BROKEN, "client.toml has no table [relay]: umbel-client join KIT"
    path = Path(config.relay.certificate)
    if not path.exists():
        return Verdict.BROKEN, _NOT_JOINED
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        return Verdict.BROKEN, f"{path}: {error}; umbel-client join KIT"
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    if left < timedelta():
        return Verdict.BROKEN, "expired: ask the operator for a new kit, then umbel-client join KIT"
    return (Verdict.FINE if left > _SOON else Verdict.CARE), f"good for {left.days} days"


def _server(config: ClientConfig) -> tuple[Verdict, str]:
    relay = config.relay
    if relay is None:
        return Verdict.BROKEN, "client.toml has no table [relay]"
    if not (Path(relay.certificate).exists() and Path(relay.server_ca).exists()):
        return Verdict.BROKEN, _NOT_JOINED
    for file in (relay.certificate, relay.server_ca, relay.key):
        Path(file).open("rb").close()
    way = way_to(relay.server)
    try:
        context = ssl.create_default_context(cafile=relay.server_ca)
        context.load_cert_chain(relay.certificate, relay.key)
        with way.client(context, 10.0) as client:
            # The server has nothing at this address: any answer proves that it let us in.
            client.get(f"https://{relay.server}/")
    except (OSError, httpx.HTTPError) as error:
        return Verdict.BROKEN, f"{way} is not reached: {error}"
    return Verdict.FINE, f"{way} speaks TLS with this site's certificate"


def _trainer(config: ClientConfig) -> tuple[Verdict, str]:
    status = ask_trainer(config, 2.0)
    if status is None:
        return Verdict.CARE, NOT_RUNNING
    if status.starting:
        return Verdict.CARE, "starting: ask again in a while"
    if is_stale(config, status):
        return Verdict.CARE, (
            f"another roster, or a revocation, was pinned since it started: {RESTART}"
        )
    if not status.isolated:
        return Verdict.CARE, "running WITH A WAY OUT"
    if status.not_apart is not None:
        return Verdict.CARE, f"running without a network, but {status.not_apart}"
    return Verdict.FINE, "running without a network"


CHECKS: dict[str, Check] = {
    "identity": _identity,
    "roster": _roster,
    "model": _model,
    "device": _device,
    "data": _data,
    "ledger": _ledger,
    "data set": _data_set,
    "file modes": _modes,
    "disk": _disk,
    "isolation": _isolation,
    "users": _users,
    "certificate": _certificate,
    "server": _server,
    "trainer": _trainer,
}
_ABOUT_DATA = {"data": _data, "ledger": _ledger, "data set": _data_set}
_SPEAKING = ("isolation", "users", "server", "trainer")
"""The checks that need a network, a socket, or the machine as it is outside of a namespace."""
