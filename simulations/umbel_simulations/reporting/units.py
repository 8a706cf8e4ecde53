"""Bytes and times as people read them."""

_UNITS = ((1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))


def size(count: int) -> str:
    """A number of bytes for people, with three digits and a decimal unit."""
    if count < 1000:
        return f"{count} B"
    factor, unit = next(
        ((factor, unit) for factor, unit in _UNITS if count < 999.5 * factor), _UNITS[-1]
    )
    return f"{count / factor:.3g} {unit}"


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
