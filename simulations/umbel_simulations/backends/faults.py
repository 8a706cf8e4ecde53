"""Sites that fall silent at a planned moment: their messages are lost on the way."""

from collections.abc import Mapping, Sequence

from umbel_simulations.backends.grid import Lost
from umbel_simulations.scenario.scenario import Dropout


def losing(dropouts: Sequence[Dropout], nodes: Mapping[str, int]) -> Lost:
    """The messages that the dropouts of a scenario lose: in attempt 1 of its round, a site hears
    nothing from its stage on."""
    order = ("train", "share", "mask", "confirm", "unmask")

    def lost(node: int, group: str) -> bool:
        round_number, attempt, stage = group.split(".")
        return any(
            nodes[dropout.site] == node
            and int(round_number) == dropout.round
            and int(attempt) == 1
            and stage in order[order.index(dropout.stage) :]
            for dropout in dropouts
        )

    return lost
