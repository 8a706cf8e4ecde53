"""Rounds lost to one set of survivors: `python tests/benchmarks/bench_lost_rounds.py` prints JSON.

A model of a round: in each attempt a site drops out with the given probability, before one of the
five stages, and is back at the next attempt. The threshold is the smallest that the default policy
accepts. A round is lost when its three attempts fail. Measured is the share of lost rounds, with
the sites' own rule and without it.
"""

import json
from random import Random
from typing import Any

from bench_masking import entry
from toy_federation import Federation

from umbel_client.site.policy import Policy, judge_survivors
from umbel_common.errors import PolicyRefusal
from umbel_common.plans.plan import TrainingPlan
from umbel_server.operator.config import Limits

SITES = (3, 10, 20)
DROPOUTS = (0.01, 0.05, 0.10)
ROUNDS = 20_000
SEED = 1
TRAIN, SHARE, MASK, CONFIRM, UNMASK = range(5)
NEVER = 5
WORTH = 0.002
"""Share of rounds that the rule may cost."""


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}; without a target, both of the last are None."""
    plan = Federation(3, 32).plan
    figures = {}
    for sites in SITES:
        for dropout in DROPOUTS:
            name = f"rounds_lost_{sites}_sites_{round(100 * dropout)}pct_dropout"
            free = lost_rounds(plan, sites, dropout, ruled=False)
            ruled = lost_rounds(plan, sites, dropout, ruled=True)
            figures[f"{name}_any_set"] = entry(free, "share", None)
            figures[name] = entry(ruled, "share", round(free + WORTH, 4))
    return figures


def lost_rounds(plan: TrainingPlan, sites: int, dropout: float, *, ruled: bool) -> float:
    """Share of rounds that no attempt releases."""
    random = Random(SEED)
    lost = 0
    for _ in range(ROUNDS):
        confirmed: dict[int, tuple[str, ...]] = {}
        lost += not any(
            released(plan, sites, dropout, confirmed if ruled else {}, random)
            for _ in range(Limits().attempts)
        )
    return lost / ROUNDS


def released(
    plan: TrainingPlan,
    sites: int,
    dropout: float,
    confirmed: dict[int, tuple[str, ...]],
    random: Random,
) -> bool:
    """Whether an attempt gives a sum.

    Args:
        confirmed: site -> the set that it confirmed in the round; the attempt adds to it.
    """
    policy = Policy()
    threshold = (sites + policy.colluding_sites) // 2 + 1
    floor = max(threshold, policy.minimum_cohort)
    gone_at = [
        random.randrange(NEVER) if random.random() < dropout else NEVER for _ in range(sites)
    ]

    def there(stage: int) -> list[int]:
        return [site for site in range(sites) if gone_at[site] > stage]

    if any(len(there(stage)) < floor for stage in (TRAIN, SHARE, MASK)):
        return False
    survivors = tuple(f"site-{site:02}" for site in there(MASK))
    confirming = 0
    # A site whose answer is lost has confirmed the set all the same.
    for site in there(MASK):
        if site in confirmed:
            try:
                judge_survivors(policy, plan, survivors, same_round=[confirmed[site]], ever=())
            except PolicyRefusal:
                continue
        confirmed[site] = survivors
        confirming += gone_at[site] > CONFIRM
    return confirming >= threshold and len(there(UNMASK)) >= threshold


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
