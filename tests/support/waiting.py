"""How long a test waits for what must happen."""

HANGING = 600.0
"""Seconds after which what a test waits for is taken to hang.

Every wait ends as soon as what it waits for is there: the number bounds hanging, never speed, and a
machine that is busy with something else passes. It is less than pytest's own limit, so that a test
that hangs fails with what its processes said.
"""
