"""A real site under an operator that may lie about anything at each stage."""

from itertools import count
from typing import Any

from fuzz.choices import Choices
from fuzz.mutate import damaged, encoded, mutated, tree_of
from fuzz.real_site import SITE, STAGES, RealSite, Refused
from fuzz.target import Place
from vectors.values import OPERATOR

from umbel_common.canonical import decode
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import MAGIC, TrainFromLastRequest, TrainRequest

MOST_ATTEMPTS = 900
"""Attempt numbers end at 1,000; a new site then takes over."""


class Attacked:
    """A real site at some stage, and the honest requests from which lies are made."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._numbers = count()
        self._stages = 0
        self._renew()

    def _renew(self) -> None:
        self.site = RealSite(
            self._place.folder / f"site-{next(self._numbers)}", self._place.model()
        )
        # An honest attempt comes first: a refused lie proves nothing if the truth is refused too.
        self.site.next_attempt(len(STAGES))
        self.go_on()

    def go_on(self) -> None:
        """Opens another attempt, one stage further than the one before."""
        self._stages = (self._stages + 1) % (len(STAGES) + 1)
        try:
            self.requests = {
                name: tree_of(request)
                for name, request in self.site.next_attempt(self._stages).items()
            }
        except Refused:
            self.site.trainer.close()
            self._renew()
        if self.site.attempt > MOST_ATTEMPTS:
            self.site.trainer.close()
            self._renew()

    def lie(self, choices: Choices) -> tuple[bytes, bytes]:
        """A request's body, and the sealed request: mostly that of the present stage with
        something wrong."""
        names = list(self.requests)
        name = names[-1] if choices.below(2) else names[choices.below(len(names))]
        others = list(self.requests.values())
        match choices.below(8):
            case 7:
                body = choices.rest()
            case 6:
                body = damaged(encoded(self.requests[name]), choices)
            case _:
                body = encoded(mutated(self.requests[name], choices, others))
        sealed = MAGIC + OPERATOR.sign(f"request to {SITE}", body) + body
        return body, damaged(sealed, choices) if choices.below(8) == 7 else sealed

    def note_attempt(self, body: bytes) -> None:
        """Notes an accepted train request, which uses up its attempt number and all below."""
        kinds: Any = TrainRequest | TrainFromLastRequest
        request = decode(body, kinds)
        header = decode(request.header.statement, RoundHeader)
        self.site.attempt = max(self.site.attempt, header.attempt)
