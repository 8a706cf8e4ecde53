"""A daemon's log: one line an event, on standard error, where every service manager reads it."""

import logging
import time


class _Lines(logging.Formatter):
    """UTC, level, who, what; further lines are indented, so that none looks like an event."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n    ")


def configure(level: int = logging.INFO) -> None:
    """Lets Umbel's own loggers speak, and of others what is a warning."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        _Lines("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("umbel").setLevel(level)


def adopt(name: str) -> None:
    """Lets a library that brings a log of its own speak through ours, and of warnings only."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.setLevel(logging.WARNING)
