"""A daemon's log: one line for each event, on standard error, which service managers read."""

import logging
import math
import time

from umbel_common.printable import printable

_MOST_LINES = 20
_MINUTE = 60.0
_LONGEST_TEXT = 500
"""Characters of one event of a library."""


class _Lines(logging.Formatter):
    """Formats time (UTC), level, logger and message. Text that another party wrote moves no cursor
    and looks like no event: it is printable, and further lines of a message are indented."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n    ")


class _Printable(logging.Formatter):
    """The lines of a former formatter, printable."""

    def __init__(self, former: logging.Formatter) -> None:
        super().__init__()
        self._former = former

    def format(self, record: logging.LogRecord) -> str:
        return printable(self._former.format(record))


def make_printable(name: str) -> None:
    """Makes what a library writes to the terminal itself printable: it may quote another party."""
    for handler in logging.getLogger(name).handlers:
        if not isinstance(handler.formatter, _Printable):
            handler.setFormatter(_Printable(handler.formatter or logging.Formatter()))


def configure(level: int = logging.INFO) -> None:
    """Lets Umbel's own loggers write from `level` on, and each library few of its warnings."""
    handler = logging.StreamHandler()
    handler.addFilter(_FewOfEach())
    handler.setFormatter(
        _Lines("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("umbel").setLevel(level)


class _Few(logging.Filter):
    """Lets few events through, and none that is long: each may be about a request of somebody who
    sends requests to fill a disk."""

    def __init__(self) -> None:
        super().__init__()
        self._since = -math.inf
        self._lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._since >= _MINUTE:
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines == _MOST_LINES:
            record.msg, record.args, record.exc_info = "more in this minute is left out", None, None
        text = record.getMessage()
        if len(text) > _LONGEST_TEXT:
            record.msg, record.args = f"{text[:_LONGEST_TEXT]}...", None
        return self._lines <= _MOST_LINES


class _FewOfEach(logging.Filter):
    """Lets few events of each library through. Any of them may have one for each message of a
    stranger: gRPC for each error of ours, asyncio for each of a connection's."""

    def __init__(self) -> None:
        super().__init__()
        self._few: dict[str, _Few] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        library = record.name.partition(".")[0]
        return library == "umbel" or self._few.setdefault(library, _Few()).filter(record)


def adopt(name: str) -> None:
    """Lets a library that has a log of its own write its warnings, and few of them, into ours."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.setLevel(logging.WARNING)
    limit(name)


def limit(name: str) -> None:
    """Lets a logger write few events: another party causes them."""
    logger = logging.getLogger(name)
    if not any(isinstance(one, _Few) for one in logger.filters):
        logger.addFilter(_Few())
