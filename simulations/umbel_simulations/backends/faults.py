"""Makes sites fall silent at a planned moment, by losing the messages to them."""

from collections.abc import Mapping, Sequence

from umbel_simulations.backends.grid import ShouldLose
from umbel_simulations.scenario.scenario import Dropout


def planned_losses(dropouts: Sequence[Dropout], nodes: Mapping[str, int]) -> ShouldLose:
    """Tells which messages the dropouts of a scenario lose.

    In attempt 1 of the round, a site gets no message from its stage on.
    """
    order = ("train", "share", "mask", "confirm", "unmask")

    def should_lose(node: int, group: str) -> bool:
        round_number, attempt, stage = group.split(".")
        return any(
            nodes[dropout.site] == node
            and int(round_number) == dropout.round
            and int(attempt) == 1
            and stage in order[order.index(dropout.stage) :]
            for dropout in dropouts
        )

    return should_lose
