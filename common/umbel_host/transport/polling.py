"""How often to ask for what may come in a second, or in hours."""

_SHARE = 0.05
"""What asking adds to a wait is at most this share of it, once it is long."""


def pause(waited: float, *, shortest: float, longest: float) -> float:
    """Seconds to the next question: the longer the wait was, the later.

    A question costs the other side some queries of its database, and a round's messages come close
    together, while sites may train for hours.

    Args:
        waited: seconds since the wait began.
        shortest: seconds between questions at its start.
        longest: seconds between questions in the end.
    """
    return min(max(shortest, _SHARE * waited), longest)
