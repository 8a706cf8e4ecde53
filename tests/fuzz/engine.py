"""Hypothesis as an engine: any number of inputs, in batches that each have a seed."""

from fuzz.target import Property, Tally, Target
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

BATCH = 10_000
"""Number of inputs in a batch. Hypothesis remembers what it tried, so a longer run would fill the
memory and slow down."""
SHORTEST, LONGEST = 8, 60
"""Numbers of bytes of an input, enough for one change and for four. Hypothesis by itself prefers
short inputs, most of which change nothing; the coverage-guided engine tries those too."""


def search(target: Target, prove: Property, count: int, start: int, tally: Tally) -> None:
    """Feeds `count` inputs to a target; the seeds of the batches follow `start`.

    Raises:
        Exception: a finding, with the smallest input that shows it.
    """
    for batch in range(0, count, BATCH):

        @seed(start + batch)
        @settings(
            max_examples=min(BATCH, count - batch),
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(st.binary(min_size=SHORTEST, max_size=LONGEST))
        def examples(data: bytes) -> None:
            tally.feed(target, prove, data)

        examples()
