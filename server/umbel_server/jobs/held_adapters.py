"""Which adapter each site has kept, as far as this process saw it: who is sent a difference.

A site that answers a request to train has verified the adapter that it starts from, and keeps it.
So the next request needs to bring the site only what changed since. What is remembered here is a
guess, and in no file: a site that has lost its copy says so (`release-missing`), and no site trains
from another adapter than the one that the round's header names.
"""

import msgspec

from umbel_common.adapters.difference import difference, is_smaller
from umbel_common.adapters.vector import Vector
from umbel_common.plans.plan import TrainingPlan
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import TrainFromLastRequest, TrainRequest


class HeldAdapters:
    """The adapters that the sites of one job have kept."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan
        self._held: dict[str, tuple[int, bytes]] = {}
        """Site -> the last round that it trained in, and the digest of the adapter from which that
        round started."""
        self._whole: set[str] = set()
        """Sites of an older version, which know no difference."""

    def answered(self, site: str, header: RoundHeader) -> None:
        """Notes that a site has answered an attempt's request to train."""
        self._held[site] = header.round, header.adapter

    def refused(self, site: str, check: str) -> None:
        """Notes that a site has refused a request with a difference: the next one is whole."""
        self._held.pop(site, None)
        if check == "malformed-message":
            self._whole.add(site)

    def requests(
        self, request: TrainRequest, header: RoundHeader, adapter: Vector
    ) -> dict[str, TrainFromLastRequest]:
        """The requests of an attempt that bring a difference, by site.

        Args:
            request: what the other sites are sent.
            header: the attempt's.
            adapter: the adapter from which it starts, float32[plan.lora.size]. The requests have
                views into it and no copies.
        """
        nothing = TrainFromLastRequest(
            header=request.header, release=request.release, onto=header.adapter, changed=()
        )
        last = header.round - 1
        moved = difference(self._plan, last, adapter) if is_smaller(self._plan, last) else None
        requests = {}
        for site, (round_number, held) in self._held.items():
            if site in self._whole:
                continue
            if held == header.adapter:
                requests[site] = nothing
            elif round_number == last and moved is not None:
                requests[site] = msgspec.structs.replace(nothing, onto=held, changed=moved)
        return requests
