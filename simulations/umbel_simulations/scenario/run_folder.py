"""`runs/<name>/`: the files of a run, and whether a name is free.

::

    scenario.json     the scenario as it ran, with the command line's options
    roster.json       the public keys of the parties
    plan.json         the plan, for people; plan.msgpack holds the bytes that the operator signed
    start.safetensors the head that the job started from, if it follows from its labels' names
    headers.jsonl     every signed round header
    transcript.jsonl  every signed entry of the audit transcript
    adapter/          the last global adapter as a PEFT folder, as the sites received it
    metrics.jsonl     the events of the run, in order
    summary.json      the outcome; it exists only if the run is finished
    report.html       the outcome, for people
    server/ sites/    the operator's and each site's own files, as in a deployment
    baselines/        the federations of the comparisons
    public/           the public test set, prepared
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from umbel_common.canonical import decode_canonical, encode
from umbel_common.errors import RemoteProtocolError, RunExists, StorageError, VerificationError
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan, second_version
from umbel_common.trust.identity import Signed
from umbel_simulations.scenario.scenario import Scenario

START_FILE = "start.safetensors"


class SignedLine(msgspec.Struct, frozen=True):
    """One signed statement in a JSON-lines file."""

    statement: bytes
    signature: bytes
    readable: Any
    """The decoded statement, for people. It is never what is verified."""


def claim(folder: Path, scenario: Scenario) -> bool:
    """Takes a folder for a run, and returns whether it resumes an unfinished one.

    Raises:
        RunExists: see `check_free`.
        StorageError: the folder cannot be made.
    """
    if check_free(folder, scenario):
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "scenario.json", _encoded(scenario))
    except OSError as error:
        raise StorageError("a run folder cannot be made", file=folder, found=error) from error
    return False


def check_free(folder: Path, scenario: Scenario) -> bool:
    """Whether a folder holds an unfinished run of the scenario. Nothing is written.

    Raises:
        RunExists: the name belongs to a finished run, or to a run of another scenario.
    """
    path = folder / "scenario.json"
    if path.exists():
        if not _is_of(path, scenario):
            raise RunExists(
                "a run of this name was made from another scenario",
                file=folder,
                remedy="give this run another --name, or delete the folder",
            )
        if finished(folder):
            raise RunExists(
                "a run of this name is finished",
                file=folder,
                remedy="open its report.html, give this run another --name, or delete the folder",
            )
        return True
    if folder.exists() and any(folder.iterdir()):
        raise RunExists(
            "a folder of this name holds something other than a run",
            file=folder,
            remedy="give this run another --name",
        )
    return False


def _is_of(path: Path, scenario: Scenario) -> bool:
    """Whether a kept file is of this scenario. Settings that are newer than the file have their
    defaults there."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Scenario) == scenario
    except msgspec.MsgspecError:
        return False


def _encoded(scenario: Scenario) -> bytes:
    return msgspec.json.format(msgspec.json.encode(scenario), indent=2)


def finished(folder: Path) -> bool:
    """Whether the run in `folder` is finished."""
    return (folder / "summary.json").exists()


def free_name(runs: Path, scenario: Scenario) -> str:
    """The scenario's name, with the first number that no other run has.

    An unfinished run of the same scenario keeps its name, so it is resumed.
    """
    number = 1
    while True:
        name = scenario.name if number == 1 else f"{scenario.name}-{number}"
        path = runs / name / "scenario.json"
        if not (runs / name).exists():
            return name
        if path.exists() and _is_of(path, scenario) and not finished(runs / name):
            return name
        number += 1


def write(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def write_plan(folder: Path, plan: TrainingPlan, signed: Signed) -> None:
    """Writes the plan for people, and the plan as signed."""
    readable = _readable(msgspec.to_builtins(plan, builtin_types=(bytes,)))
    write(folder / "plan.json", msgspec.json.format(msgspec.json.encode(readable), indent=2))
    write(folder / "plan.msgpack", encode(signed))


def begun_plan(folder: Path, plan: TrainingPlan) -> TrainingPlan:
    """The plan with which a run continues: that of its folder, if it was begun with version 1.

    Args:
        plan: the plan that the run's scenario makes today.

    Raises:
        VerificationError: the folder has a plan that cannot be read.
    """
    if not (folder / "plan.msgpack").exists():
        return plan
    former = decode_canonical(read_plan(folder).statement, PLAN_VERSIONS)
    return former if former != plan and second_version(former) == plan else plan


def read_plan(folder: Path) -> Signed:
    """The signed plan.

    Raises:
        VerificationError: it is missing or malformed.
    """
    path = folder / "plan.msgpack"
    try:
        return decode_canonical(path.read_bytes(), Signed)
    except (OSError, RemoteProtocolError) as error:
        raise VerificationError("a plan cannot be read", file=path, found=error) from error


def write_signed(path: Path, statements: Sequence[Signed]) -> None:
    """Writes signed statements as a JSON-lines file."""
    lines = [
        msgspec.json.encode(
            SignedLine(
                statement=signed.statement,
                signature=signed.signature,
                readable=_readable(msgspec.msgpack.decode(signed.statement)),
            )
        )
        for signed in statements
    ]
    write(path, b"\n".join([*lines, b""]))


def read_signed(path: Path) -> list[Signed]:
    """Reads what `write_signed` wrote.

    Raises:
        VerificationError: the file is missing, or a line is malformed.
    """
    try:
        lines = path.read_bytes().splitlines()
        decoded = [msgspec.json.decode(line, type=SignedLine) for line in lines]
    except (OSError, msgspec.MsgspecError) as error:
        raise VerificationError(
            "signed statements cannot be read", file=path, found=error
        ) from error
    return [Signed(statement=line.statement, signature=line.signature) for line in decoded]


def _readable(value: Any) -> Any:
    """The value with bytes as hexadecimal digits and nested statements decoded."""
    match value:
        case {"statement": bytes() as statement, "signature": bytes()}:
            return _readable(msgspec.msgpack.decode(statement))
        case bytes():
            return value.hex()
        case dict():
            return {key: _readable(item) for key, item in value.items()}
        case list():
            return [_readable(item) for item in value]
        case _:
            return value
