"""What one attempt of 100 sites costs all its parties together, in processor time of one thread.

`python tests/benchmarks/bench_crypto.py` prints JSON. The real machines of sites and coordinator,
without training, sealing and transport: 100 sites with vectors of a million elements of 32 bits, of
which every tenth drops out after it has handed out its shares, the dearest moment.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from bench_masking import entry

from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg import coordinator, participant
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, Member, Roster

SITES = 100
THRESHOLD = 67
ELEMENTS = 1_000_000
EVERY = 10
"""Every tenth site drops out."""


class Clock:
    """Adds up processor seconds, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is done within it."""
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def attempt(clock: Clock) -> None:
    """One attempt, every step of it counted; checks that the sum is exact."""
    names = tuple(f"site-{index:03}" for index in range(SITES))
    identities = {name: Identity.generate(os.urandom) for name in names}
    roster = Roster(
        federation="bench",
        operator=Identity.generate(os.urandom).public_key,
        members=tuple(Member(name=name, public_key=identities[name].public_key) for name in names),
    )
    header = RoundHeader(
        federation="bench",
        job="bench",
        round=1,
        attempt=1,
        plan=bytes(32),
        roster=roster.digest(),
        adapter=bytes(32),
        cohort=names,
    )
    rules = Rules(threshold=THRESHOLD, colluding=1, minimum_cohort=3)
    states: dict[str, Any] = {}
    machine: Any = coordinator.open_attempt(header, roster, THRESHOLD, 32, ELEMENTS)
    expected = np.zeros(ELEMENTS, dtype="<u4")

    def stage(name: str, requests: Any, answer: Callable[[str, Any], Any]) -> None:
        nonlocal machine
        for site, request in requests.items():
            with clock.part(f"sites: {name}"):
                states[site], payload = answer(site, request)
            with clock.part(f"coordinator: {name}"):
                machine = machine.receive(site, payload)
        with clock.part(f"coordinator: {name}"):
            machine = machine.close()

    def masked(site: str, shares: Any) -> tuple[Any, Any]:
        with clock.part("sites: mask"):
            return states[site].receive(shares, vector)

    stage(
        "keys",
        dict.fromkeys(names, header),
        lambda site, _: participant.advertise(
            header, site, rules, identities[site], bytes(32), os.urandom
        ),
    )
    stage("share", machine.requests(), lambda s, ask: states[s].receive(ask, roster, os.urandom))
    random = np.random.default_rng(1)
    for index, (site, request) in enumerate(machine.requests().items()):
        if index % EVERY == 0:
            continue
        vector = random.integers(0, 2**32, ELEMENTS, dtype="<u4")
        expected += vector
        states[site], out = masked(site, request)
        with clock.part("coordinator: sum"):
            machine = machine.receive(site, out.data.cast("B"))
    machine = machine.close()
    stage("confirm", machine.requests(), lambda s, ask: states[s].receive(ask, identities[s]))
    stage("unmask", machine.requests(), lambda s, ask: states[s].receive(ask, roster))
    assert (machine.total == expected).all()


def measure() -> dict[str, dict[str, Any]]:
    """The figure, and its parts on standard error."""
    clock = Clock()
    attempt(clock)
    for name, seconds in clock.seconds.items():
        print(f"  {name:24} {seconds:7.3f} s", file=sys.stderr)
    total = sum(clock.seconds.values())
    return {"crypto_cpu_100_sites_1m_10pct_dropout_s": entry(total, "s of CPU", 10.0)}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
