"""What a process may do after it was forked from a test's."""

import os
from collections.abc import Callable


def is_refused_in_a_fork(action: Callable[[], object]) -> bool:
    """Whether `action` raises RuntimeError in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os.write(writing, b"done")
        except RuntimeError:
            os.write(writing, b"refused")
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        told = answer.read()
    os.waitpid(child, 0)
    assert told in (b"done", b"refused")
    return told == b"refused"
