"""What the operator's log says of sites that refuse again and again."""

import logging
from contextlib import closing
from pathlib import Path

import pytest

from umbel_common.protocol.wire import Refusal
from umbel_server.jobs.progress import ProgressObserver
from umbel_server.messaging.link import Step
from umbel_server.storage.job_queue import JobQueue


def test_a_refusal_that_waits_for_people_is_named_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answers = ["awaiting-approval", "awaiting-approval", "site-paused", "awaiting-approval"]
    with closing(JobQueue(tmp_path / "queue.sqlite")) as queue:
        for check in [*answers, "budget", "budget"]:
            # Each offer of a waiting job has an observer of its own.
            observer = ProgressObserver(queue, "job")
            observer.on_answered(Step("offer"), "north", Refusal(check=check), 1, 1)
        assert [answer.refused for answer in queue.answers("job")] == ["budget"]
    told = [message.rsplit(": ", 1)[1] for message in caplog.messages]
    assert told == ["awaiting-approval", "site-paused", "awaiting-approval", "budget", "budget"]
