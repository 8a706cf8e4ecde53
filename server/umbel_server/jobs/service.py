"""The life of the process with the jobs: `umbel_server.rounds_process` starts it."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from umbel_common.errors import StorageError
from umbel_host.files.keys import read_identity
from umbel_host.processes.lifecycle import locked, require_state, stop_on_signals
from umbel_host.transport.sockets import SocketServer
from umbel_server.jobs.runner import JobRunner
from umbel_server.messaging.carrier import CarrierLink
from umbel_server.messaging.link import Link
from umbel_server.operator.config import carrier_socket, load_config, load_roster, rounds_socket
from umbel_server.storage.job_queue import JobQueue

_IDLE_SECONDS = 0.5
_WAITING_SECONDS = 10.0
"""Time between two offers of a plan that people at the sites have not decided about."""

_PROBE_MODE = 0o660

_logger = logging.getLogger("umbel.rounds")


def run(path: Path) -> None:
    """Runs the jobs of the queue until told to stop; the next start resumes the current job.

    Raises:
        UmbelError: the configuration, the key, the roster, the state folder, the queue, or the
            socket for probes.
    """
    config = load_config(path)
    operator = read_identity(Path(config.identity))
    load_roster(config)
    state = Path(config.state)
    require_state(state)
    stopping = stop_on_signals()

    @contextmanager
    def connect(should_stop: Callable[[], bool]) -> Iterator[Link]:
        with closing(CarrierLink(carrier_socket(config), should_stop)) as link:
            yield link

    with (
        locked(state / "rounds.lock", "the process with the jobs"),
        closing(JobQueue(state / "queue.sqlite")) as queue,
    ):
        runner = JobRunner(
            state=state,
            operator=operator,
            queue=queue,
            read_roster=lambda: load_roster(config),
            limits=config.limits,
            connect=connect,
            should_stop=stopping.is_set,
            read_evaluation=lambda: load_config(path).evaluation,
        )
        with _probed(rounds_socket(config)) as report_health:
            _logger.info("waiting for jobs in %s", state)
            work(runner, stopping, report_health)


@contextmanager
def _probed(path: Path) -> Iterator[Callable[[bool], None]]:
    """Answers probes; yields a function that sets whether the answer is healthy."""
    probes = SocketServer(path, _PROBE_MODE, workers=2)
    probes.start()
    try:
        yield probes.report_health
    finally:
        probes.stop(1.0)


def work(
    runner: JobRunner, stopping: threading.Event, report_health: Callable[[bool], None]
) -> None:
    """Runs jobs until `stopping`. A full disk does not end the process: the job can be resumed.

    Args:
        report_health: called with whether the files could be used.
    """
    report_health(True)
    while not stopping.is_set():
        try:
            busy = runner.run_next()
            pause = (
                0.0
                if busy
                else _IDLE_SECONDS
                if runner.queue.next_job() is None
                else _WAITING_SECONDS
            )
            report_health(True)
        except StorageError as error:
            _logger.error("%s", error.diagnostics())
            report_health(False)
            pause = _WAITING_SECONDS
        stopping.wait(pause)
