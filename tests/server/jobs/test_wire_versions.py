"""A site of another wire version is named with what it speaks, and nobody waits for it."""

import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from umbel_common.errors import JobFailed
from umbel_common.plans.plan import Aggregation
from umbel_common.protocol.wire import MAGIC, WIRE_VERSION
from umbel_server.jobs.progress import ProgressObserver
from umbel_server.storage.job_queue import JobQueue

TWO = Aggregation(threshold=2, clip_range=1.0, step=1e-6)
THREE = Aggregation(threshold=3, clip_range=1.0, step=1e-6)
MakeSetting = Callable[..., Any]


def speaks(setting: Any, site: str, version: int, asked: list[int]) -> None:
    """Has a site answer as one of another version would: it cannot read the request, and says so
    in its own."""

    def handle(sealed: bytes) -> bytes:
        asked.append(len(sealed))
        reply: bytes = setting.sites[site].handle(sealed)
        return f"UMB{version}".encode() + reply[len(MAGIC) :]

    setting.link.sites[site] = handle


@pytest.mark.parametrize(
    ("version", "behind"),
    [(WIRE_VERSION - 1, "upgrade Umbel at site-01"), (WIRE_VERSION + 1, "on this side")],
)
def test_a_site_of_another_version_is_named_in_the_log_and_sits_the_job_out(
    make_setting: MakeSetting, caplog: pytest.LogCaptureFixture, version: int, behind: str
) -> None:
    setting = make_setting(3, aggregation=TWO)
    asked: list[int] = []
    speaks(setting, "site-01", version, asked)
    with closing(JobQueue(setting.folder / "queue.sqlite")) as queue:
        setting.observer = ProgressObserver(queue, "job")
        with caplog.at_level(logging.ERROR, logger="umbel.rounds"):
            assert setting.job().run().survivors == ("site-00", "site-02")
    line = f"site-01 cannot take part: site-01 speaks wire version {version}, this side speaks"
    assert caplog.messages[0] == f"job: {line} {WIRE_VERSION}: {caplog.messages[0].split(': ')[-1]}"
    assert behind in caplog.messages[0]
    # The offer, and the adapter at the end: no attempt waits for it.
    assert len(asked) == 2


def test_a_job_that_cannot_begin_says_which_sites_speak_another_version(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(3, aggregation=THREE)
    speaks(setting, "site-01", WIRE_VERSION + 1, [])
    with pytest.raises(JobFailed, match="site-01 refused: wire-version"):
        setting.job().run()
