"""A job of hundreds of rounds whose processes are killed at random moments."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from e2e.daemons import Clinics
from support.shared_noise_plans import shared_noise_plan

from umbel_client.ledger.file import read_ledger
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import HEADER_VERSIONS
from umbel_common.protocol.verification import verify_transcript
from umbel_common.trust.identity import open_signed, sign
from umbel_server.storage.job_queue import JobState
from umbel_server.storage.journal import Journal

ROUNDS = 300
SECONDS_BETWEEN_KILLS = 12.0
POLICY = f"""approval = "none"
max_rounds = {ROUNDS}
max_clip_range = 100.0
max_shared_epsilon = 8.0
total_shared_epsilon = 8.0"""


def local(plan: TrainingPlan) -> TrainingPlan:
    training = msgspec.structs.replace(plan.training, rounds=ROUNDS, local_steps=1)
    return msgspec.structs.replace(plan, training=training)


def distributed(plan: TrainingPlan) -> TrainingPlan:
    return shared_noise_plan(
        local(plan),
        epsilon=3.0,
        delta=1e-4,
        honest=2,
        least_survivors=3,
        sampling_rate=0.05,
        attempts=2 * ROUNDS,
    )


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("make", [local, distributed])
def test_three_hundred_rounds_finish_and_each_is_charged_once(
    tmp_path: Path, tiny_model: Path, make: Callable[[TrainingPlan], TrainingPlan]
) -> None:
    clinics = Clinics(tmp_path, tiny_model, POLICY)
    toml = clinics.operator_folder / "server.toml"
    toml.write_text(toml.read_text().replace("attempts = 3", "attempts = 20"))
    plan = make(clinics.plan())
    chance = random.Random(300)
    sites = clinics.sites.values()
    processes = {
        "port": clinics.port_process,
        "rounds": clinics.rounds_process,
        **{f"relay of {site.name}": site.relay for site in sites},
        **{f"trainer of {site.name}": site.trainer for site in sites},
    }
    kills: list[str] = []
    try:
        clinics.start_all()
        for site in sites:
            site.status()
        began = time.monotonic()
        clinics.queue.add(plan.job, sign(clinics.operator, plan))
        following = began + SECONDS_BETWEEN_KILLS
        while clinics.queue.job(plan.job).state not in (
            JobState.FINISHED,
            JobState.FAILED,
            JobState.STOPPED,
        ):
            assert time.monotonic() - began < 3 * 3600, clinics.logs()
            time.sleep(0.2)
            if time.monotonic() > following:
                name = chance.choice(sorted(processes))
                kills.append(name)
                processes[name].kill()
                time.sleep(chance.uniform(0.0, 1.0))
                processes[name].start()
                following = time.monotonic() + chance.uniform(0.3, 1.7) * SECONDS_BETWEEN_KILLS
        seconds = time.monotonic() - began
        queued = clinics.queue.job(plan.job)
        assert queued.state is JobState.FINISHED, (queued.detail, clinics.logs())
    finally:
        clinics.close()
    journal = Journal(clinics.operator_folder / "state" / "journal.sqlite")
    job = verify_transcript(journal.transcript(plan.job), clinics.roster)
    headers = {
        (header.round, header.attempt)
        for header in (
            open_signed(signed, HEADER_VERSIONS, clinics.operator.public_key)
            for signed in journal.headers(plan.job)
        )
    }
    journal.close()
    released = {(release.round, release.attempt) for release in job.releases[1:]}
    assert [release.round for release in job.releases] == list(range(ROUNDS + 1))
    for site in sites:
        ledger = read_ledger(site.folder / "state" / "ledger.sqlite")
        if make is local:
            assert [entry.round for entry in ledger.rounds.values()] == list(range(1, ROUNDS + 1))
        else:
            charged = [(one.round, one.attempt) for one in ledger.attempts.values()]
            assert len(set(charged)) == len(charged)
            assert released <= set(charged) <= headers
    print(
        f"{ROUNDS} rounds in {seconds:.0f} s with {len(kills)} kills;"
        f" {len(headers)} attempts, {job.aborted_attempts} told as aborted"
    )
