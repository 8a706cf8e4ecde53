"""Checks the signatures and files of a run folder, without the sites' or the server's files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from umbel_client.privacy.accounting import total_epsilon
from umbel_client.privacy.attempt_cost import attempt_cost
from umbel_client.privacy.calibration import SiteNoise, evaluation_event, noise_for
from umbel_common.adapters.peft_folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    HEAD_FILE,
    PLAN_FILE,
    TASK_FILE,
    is_head_alone,
    text_files,
)
from umbel_common.adapters.reach import require_reachable
from umbel_common.adapters.start import origin_of
from umbel_common.adapters.vector import Vector, adapter_digest, size_of
from umbel_common.canonical import V, decode_canonical
from umbel_common.errors import (
    PlanError,
    RemoteProtocolError,
    StorageError,
    UmbelError,
    VerificationError,
)
from umbel_common.plans.plan import PLAN_VERSIONS, DifferentialPrivacy, LocalPrivacy, TrainingPlan
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.plans.start import SeedStart
from umbel_common.plans.statements import HEADER_VERSIONS, RELEASE_VERSIONS
from umbel_common.protocol.verification import VerifiedJob, verify_transcript
from umbel_common.secagg.encoding import RingVector
from umbel_common.trust.identity import Roster, Signed, open_signed
from umbel_common.trust.roster_file import roster_from_json
from umbel_host.files.adapter_folder import RELEASE_FILE, read_vector
from umbel_host.files.start_file import read_start
from umbel_server.storage.registry import SUMS
from umbel_simulations.backends.site_config import public_size
from umbel_simulations.reporting.results import CurvePoint, RunSummary, SiteResult
from umbel_simulations.scenario.run_folder import START_FILE, read_plan, read_signed


def verify_run(folder: Path) -> VerifiedJob:
    """Checks the plan, headers, transcript, adapter and summary of a run again.

    Each adapter is made again from the sum of its round, if the operator's registry is in the
    folder; `VerifiedJob.not_recomputed` has the other rounds.

    Raises:
        VerificationError: a check failed; the error names the file.
    """
    if not folder.is_dir():
        raise VerificationError(
            "there is no such run", file=folder, remedy="give the folder of a finished run"
        )
    roster = _roster(folder / "roster.json")
    signed_plan = _open(read_plan(folder), PLAN_VERSIONS, roster)
    start = _start(folder / START_FILE, signed_plan)
    registry = folder / "server" / "registry"
    job = verify_transcript(
        read_signed(folder / "transcript.jsonl"),
        roster,
        sums=lambda digest: _sum(registry / SUMS / digest.hex(), signed_plan),
        adapters=lambda digest: _adapter(registry / digest.hex(), signed_plan),
        start=start,
    )
    # Its last release is no outcome of the plan: a cut history would look like a finished run.
    _require(job.final_round is not None, folder / "transcript.jsonl", "the job has not ended")
    _require(
        signed_plan == job.plan,
        folder / "plan.msgpack",
        "the plan is not the one that the transcript starts with",
    )
    _verify_headers(folder / "headers.jsonl", job, roster)
    _verify_adapter(folder / "adapter", job, roster, start)
    _verify_summary(folder / "summary.json", job, roster)
    return job


def _roster(path: Path) -> Roster:
    try:
        return roster_from_json(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise VerificationError("a roster cannot be read", file=path, found=error) from error


def _sum(path: Path, plan: TrainingPlan) -> RingVector | None:
    """A sum that the operator kept; None: it is not there."""
    try:
        return np.fromfile(path, dtype=f"<u{plan.aggregation.ring_bits // 8}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VerificationError("a sum cannot be read", file=path, found=error) from error


def _adapter(folder: Path, plan: TrainingPlan) -> Vector | None:
    """An adapter that the operator kept; None: it is not there."""
    if not folder.exists():
        return None
    try:
        return read_vector(folder, plan)
    except StorageError as error:
        raise VerificationError(error.message, file=folder, found=error.found) from error


def _verify_headers(path: Path, job: VerifiedJob, roster: Roster) -> None:
    headers = [_open(signed, HEADER_VERSIONS, roster) for signed in read_signed(path)]
    _require(
        all(header.plan == job.plan.digest() for header in headers),
        path,
        "a header names another plan",
    )
    numbers = [(header.round, header.attempt) for header in headers]
    _require(len(set(numbers)) == len(numbers), path, "an attempt number was used twice")
    contexts = {header.context() for header in headers}
    _require(
        all(release.context in contexts for release in job.releases[1:]),
        path,
        "the header of a release is missing",
    )


def _start(path: Path, plan: TrainingPlan) -> Vector | None:
    """The tensor that the plan names as its start; None: it names none."""
    if isinstance(plan.start, SeedStart):
        return None
    try:
        return read_start(path, plan)
    except StorageError as error:
        raise VerificationError(error.message, file=path, found=error.found) from None


def _verify_adapter(folder: Path, job: VerifiedJob, roster: Roster, start: Vector | None) -> None:
    try:
        vector = read_vector(folder, job.plan)
        signed = decode_canonical((folder / RELEASE_FILE).read_bytes(), Signed)
    except (OSError, StorageError, RemoteProtocolError) as error:
        found = error.found if isinstance(error, StorageError) else error
        raise VerificationError("an adapter cannot be read", file=folder, found=found) from error
    _require(
        _open(signed, RELEASE_VERSIONS, roster) == job.last,
        folder,
        "its release is not the last one of the transcript",
    )
    _require(
        adapter_digest(job.plan.digest(), vector) == job.last.adapter,
        folder,
        "the adapter is not the one that the last release names",
    )
    _verify_settings(folder, job.plan)
    try:
        origin = None if start is None else origin_of(job.plan, start)
        most = len(roster.members)
        require_reachable(job.plan, job.last.round, vector, origin, sites=most)
    except RemoteProtocolError as error:
        raise VerificationError(
            error.message,
            file=folder,
            field=error.field,
            found=error.found,
            accepted=error.accepted,
        ) from None


def _verify_settings(folder: Path, plan: TrainingPlan) -> None:
    """Compares what says how to use an adapter with its plan: with another scaling, or with other
    labels, the same tensors are another model."""
    wanted = text_files(plan)
    names = [CONFIG_FILE, TASK_FILE, PLAN_FILE]
    if is_head_alone(plan):
        names.remove(CONFIG_FILE)
        _require_no_layers(folder / CONFIG_FILE)
    for name in names:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            if name == PLAN_FILE:
                same = plan_from_json(text, folder / name)[0] == plan
            else:
                same = json.loads(text) == json.loads(wanted[name])
        except (OSError, ValueError, RecursionError, PlanError) as error:
            raise VerificationError(
                "an adapter cannot be read", file=folder / name, found=error
            ) from None
        _require(same, folder / name, "it is not what the plan says")
    # PEFT and other programs would prefer or add what lies beside the tensors.
    for path in sorted(folder.iterdir()):
        _require(
            path.suffix not in (".safetensors", ".bin", ".pt", ".py")
            or path.name in (ADAPTER_FILE, HEAD_FILE),
            path,
            "an adapter of this plan has no such file",
        )


def _require_no_layers(path: Path) -> None:
    """A head alone needs no configuration of PEFT's; one that is there may not add layers to it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise VerificationError("an adapter cannot be read", file=path, found=error) from None
    layers = found.get("target_modules") if isinstance(found, dict) else found
    _require(not layers, path, "it is not what the plan says")


def _verify_summary(path: Path, job: VerifiedJob, roster: Roster) -> None:
    """Compares each figure that follows from the plan, the roster or the transcript.

    Scores and byte counts follow from none of them.
    """
    try:
        summary = msgspec.json.decode(path.read_bytes(), type=RunSummary)
    except (OSError, msgspec.MsgspecError) as error:
        raise VerificationError("a summary cannot be read", file=path, found=error) from error
    plan = job.plan
    privacy = plan.privacy if isinstance(plan.privacy, DifferentialPrivacy) else None
    figures = {
        "transcript_head": (summary.transcript_head, job.head.hex()),
        "adapter_digest": (summary.adapter_digest, job.last.adapter.hex()),
        "aborted_attempts": (summary.aborted_attempts, job.aborted_attempts),
        "model": (summary.model, plan.model.name),
        "method": (summary.method, plan.lora.method),
        "privacy": (summary.privacy, plan.privacy.__struct_config__.tag),
        "rounds": (summary.rounds, plan.training.rounds),
        "local_steps": (summary.local_steps, plan.training.local_steps),
        "trained_parameters": (summary.trained_parameters, size_of(plan.trained_tensors(1))),
        "curve": (
            [point.round for point in summary.curve],
            [release.round for release in job.releases],
        ),
        "sites": (
            [site.name for site in summary.sites],
            [member.name for member in roster.members],
        ),
    }
    for field, (found, accepted) in figures.items():
        if found != accepted:
            raise VerificationError(
                "a summary says what the transcript does not",
                file=path,
                field=field,
                found=found,
                accepted=accepted,
            )
    names = {member.name for member in roster.members}
    for site in summary.sites:
        _require(
            set().union(*(point.epsilon for point in summary.curve)) <= names
            and _can_be(site, summary.curve, job, privacy),
            path,
            f"a figure of the site {site.name} is not one that the plan and its rounds allow",
        )


_TOLERANCE = 0.01
"""Relative difference of a figure from the recomputed one: another version of an accountant may
differ by a part of it."""


def _can_be(
    site: SiteResult,
    curve: Sequence[CurvePoint],
    job: VerifiedJob,
    privacy: DifferentialPrivacy | None,
) -> bool:
    """Whether the figures of a site fit together, and are those of a job of this plan.

    Noise and sampling rate follow from the plan and the number of records; what a site spent is at
    least the cost of the rounds that it has a part in. The number of records is the operator's
    word: it is in no entry.
    """
    steps = [point.epsilon.get(site.name) for point in curve]
    known = [epsilon for epsilon in (*steps, site.epsilon) if epsilon is not None]
    rounds = sum(site.name in release.survivors for release in job.releases)
    if min(site.records, *site.labels.values(), site.sent_clear_bytes) < 0:
        return False
    if site.units is not None and not 1 <= site.units <= site.records:
        return False
    try:
        noise = noise_for(job.plan, public_size(site.units or site.records))
    except UmbelError:
        # With this number of records no site can take part.
        return False
    if not math.isclose(site.sampling_rate, noise.sampling_rate):
        return False
    shared = site.shared_epsilon
    if privacy is None:
        figures = (site.delta, site.noise_multiplier, shared)
        return not known and all(figure is None for figure in figures)
    attempts = attempt_cost(job.plan)
    if attempts is None:
        fits = shared is None and all(epsilon <= privacy.epsilon for epsilon in known)
        least = _cost(job.plan, noise, rounds)
    else:
        bounds = attempts.epsilons(privacy.delta)
        readers = total_epsilon(attempts.for_readers(rounds), privacy.delta)
        fits = (1 - _TOLERANCE) * readers <= (shared or 0.0) <= privacy.epsilon and all(
            epsilon <= (1 + _TOLERANCE) * bounds.everybody for epsilon in known
        )
        least = total_epsilon(attempts.for_everybody(rounds), privacy.delta)
    return (
        site.delta == privacy.delta
        and site.noise_multiplier is not None
        and noise.noise_multiplier is not None
        and math.isclose(site.noise_multiplier, noise.noise_multiplier, rel_tol=_TOLERANCE)
        # What was spent never comes back.
        and known == sorted(known)
        and all(epsilon >= 0 for epsilon in known)
        and fits
        and (site.epsilon or 0.0) >= (1 - _TOLERANCE) * least
        and (site.epsilon is not None or rounds == 0)
    )


def _cost(plan: TrainingPlan, noise: SiteNoise, rounds: int) -> float:
    """The epsilon of some rounds of a plan at one site."""
    if rounds == 0 or not isinstance(plan.privacy, LocalPrivacy):
        return 0.0
    events = [noise.event(rounds * plan.training.local_steps)]
    if plan.evaluation is not None:
        events.append(evaluation_event(plan, rounds=rounds))
    return total_epsilon(events, plan.privacy.delta)


def _open(signed: Signed, versions: tuple[type[V], ...], roster: Roster) -> V:
    try:
        return open_signed(signed, versions, roster.operator)
    except RemoteProtocolError as error:
        name = versions[0].__name__
        raise VerificationError(f"a {name} does not verify: {error.message}") from None


def _require(condition: bool, file: Path, what: str) -> None:
    if not condition:
        raise VerificationError(what, file=file)
