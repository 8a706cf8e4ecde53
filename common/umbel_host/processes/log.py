"""A daemon's log: one line for each event, on standard error, which service managers read."""

import logging
import time

from umbel_common.printable import printable


class _Lines(logging.Formatter):
    """Formats time (UTC), level, logger and message. Text that another party wrote moves no cursor
    and looks like no event: it is printable, and further lines of a message are indented."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n    ")


def configure(level: int = logging.INFO) -> None:
    """Lets Umbel's own loggers write from `level` on, and other loggers their warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        _Lines("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("umbel").setLevel(level)


def adopt(name: str) -> None:
    """Lets a library that has a log of its own write its warnings, and only these, into ours."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.setLevel(logging.WARNING)
