"""A federation of real processes: a SuperLink, the jobs, three relays and three trainers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.daemons import Clinics

from umbel_server.queue import State


@pytest.fixture
def clinics(tmp_path: Path, tiny_model: Path) -> Iterator[Clinics]:
    made = Clinics(tmp_path, tiny_model)
    yield made
    made.close()


def adapters(clinics: Clinics, job: str) -> set[bytes]:
    files = {
        site.folder / "state" / "adapters" / job / "adapter_model.safetensors"
        for site in clinics.sites.values()
    }
    return {path.read_bytes() for path in files}


def test_a_job_runs_and_everybody_has_the_same_adapter(clinics: Clinics) -> None:
    clinics.start_all()
    job = clinics.add()
    clinics.wait(job, State.FINISHED, State.FAILED)
    print(clinics.logs())
    assert clinics.queue.job(job).state is State.FINISHED
    assert len(adapters(clinics, job)) == 1
