"""Real sites with a tiny model, for benchmarks of what is carried: one job of several rounds."""

import string
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.daemons import Clinics
from support.homes import live_in, own_homes
from support.small_models import save_bert

from umbel_server.messaging.carrier import CarrierLink
from umbel_server.messaging.link import Link
from umbel_server.operator.config import Limits
from umbel_server.storage.job_queue import JobState


@contextmanager
def tiny_clinics(sites: int, most_rounds: int) -> Iterator[Clinics]:
    """An operator and so many sites, each a relay and a trainer; none has been started.

    Args:
        most_rounds: rounds that the policies of the sites allow.
    """
    own_homes()
    with tempfile.TemporaryDirectory() as folder:
        live_in(folder)
        model = save_bert(
            Path(folder) / "model",
            [f"w{number}" for number in range(35)],
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
        )
        names = [f"site-{letter}" for letter in string.ascii_lowercase[:sites]]
        policy = f'approval = "none"\nmax_rounds = {most_rounds}'
        clinics = Clinics(Path(folder) / "clinics", model, policy, names)
        try:
            yield clinics
        finally:
            clinics.close()


def start(clinics: Clinics, rounds: int) -> None:
    """Starts all processes, for a job of so many rounds."""
    text = clinics.draft.read_text().replace("rounds = 3", f"rounds = {rounds}")
    clinics.draft.write_text(text.replace("threshold = 2", f"threshold = {len(clinics.sites)}"))
    clinics.port_process.start()
    for site in clinics.sites.values():
        site.trainer.start()
        site.relay.start()
        site.status()


def run(clinics: Clinics, watched: Callable[[CarrierLink], Link]) -> None:
    """Runs the job to its end.

    Args:
        watched: puts a measurement around the link.
    """

    def link(stopped: Callable[[], bool]) -> Link:
        return watched(CarrierLink(clinics.operator_folder / "state" / "carrier.sock", stopped))

    limits = Limits(offer_seconds=300, train_seconds=300, stage_seconds=300)
    job = clinics.run(clinics.rounds(link, limits))
    assert job.state is JobState.FINISHED, job.detail
