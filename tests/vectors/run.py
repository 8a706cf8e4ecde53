"""One whole attempt, driven by the inputs of a vector through both state machines."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from umbel_common.canonical import Entropy
from umbel_common.plans.statements import RoundHeader
from umbel_common.secagg import coordinator, participant
from umbel_common.secagg.messages import preparation_of
from umbel_common.secagg.preparation import prepare
from umbel_common.secagg.preparing import Preparing
from umbel_common.secagg.rules import Rules
from umbel_common.trust.identity import Identity, Roster

STAGES = ("advertise", "share", "mask", "confirm", "reveal")


class Run:
    """Sites and coordinator in memory; `output` has what each stage sent."""

    def __init__(self, inputs: Mapping[str, Any], entropy: Mapping[str, Entropy]) -> None:
        """Takes the inputs of a vector, with its byte strings as bytes."""
        self.inputs = inputs
        self.entropy = entropy
        self.header = msgspec.convert(inputs["header"], RoundHeader)
        self.roster = msgspec.convert(inputs["roster"], Roster)
        self.rules = msgspec.convert(inputs["rules"], Rules)
        self.identities = {site: Identity(seed) for site, seed in inputs["seeds"].items()}
        self.dtype = f"<u{inputs['ring_bits'] // 8}"
        length = len(self.vector(self.header.cohort[0]))
        self.machine: Any = coordinator.open_attempt(
            self.header, self.roster, self.rules.threshold, inputs["ring_bits"], length
        )
        self.states: dict[str, Any] = {}
        self.output: dict[str, Any] = {"context": self.header.context()}

    def vector(self, site: str) -> Any:
        """A fresh copy of a site's unmasked vector."""
        return np.frombuffer(self.inputs["vectors"][site], dtype=self.dtype).copy()

    def requests(self, stage: str) -> dict[str, Any]:
        """The coordinator's requests, by site."""
        if stage == "advertise":
            return dict.fromkeys(self.header.cohort, self.header)
        return dict(self.machine.requests())

    def answer(self, site: str, request: Any) -> tuple[Any, Any]:
        """The site's next state and its answer; the site stays as it is."""
        state = self.states.get(site)
        match state:
            case None:
                return participant.advertise(
                    request,
                    site,
                    self.rules,
                    self.identities[site],
                    self.inputs["ledger_head"],
                    self.entropy[site],
                )
            case participant.Advertised():
                return state.receive(request, self.roster, self.entropy[site])
            case participant.Shared():
                after, vector = state.receive(request, self.vector(site))
                return after, vector.tobytes()
            case participant.Masked():
                return state.receive(request, self.identities[site])
            case participant.Confirmed():
                return state.receive(request, self.roster)
            case _:
                raise AssertionError("the attempt is over for this site")

    def to(self, stage: str) -> "Run":
        """Runs the stages before `stage`; for `end`, all of them."""
        for present in STAGES[: (*STAGES, "end").index(stage)]:
            self._run(present)
        return self

    def _run(self, stage: str) -> None:
        sent: dict[str, Any] = {}
        for site, request in self.requests(stage).items():
            if site in self.inputs["silent"].get(stage, ()):
                continue
            self.states[site], sent[site] = self.answer(site, request)
            self.machine = self.machine.receive(site, sent[site])
        self.output[stage] = sent
        self.machine = self.machine.close()

    def whole(self) -> dict[str, Any]:
        """The messages of every stage, and the sum."""
        self.to("end")
        return {
            **self.output,
            "survivors": self.machine.survivors,
            "total": self.machine.total.tobytes(),
        }


class PreparedRun(Run):
    """An attempt that its whole cohort prepared; `output` also has what was prepared."""

    def __init__(self, inputs: Mapping[str, Any], entropy: Mapping[str, Entropy]) -> None:
        super().__init__(inputs, entropy)
        preparation = preparation_of(self.header)
        keys: Any = Preparing(preparation, self.roster)
        sent: dict[str, Any] = {}
        self.slots: dict[str, Any] = {}
        for site in self.header.cohort:
            self.slots[site], sent[site] = prepare(
                preparation, site, self.rules, self.identities[site], self.entropy[site]
            )
            keys = keys.receive(site, sent[site])
        shares = keys.close()
        filled: dict[str, Any] = {}
        for site, slot in self.slots.items():
            self.slots[site], filled[site] = slot.fill(
                shares.signed, self.roster, self.entropy[site]
            )
            shares = shares.receive(site, filled[site])
        length = len(self.vector(self.header.cohort[0]))
        self.machine = coordinator.open_attempt(
            self.header,
            self.roster,
            self.rules.threshold,
            inputs["ring_bits"],
            length,
            prepared=shares.close(),
        )
        self.output |= {
            "preparation": preparation.context(),
            "prepare": sent,
            "fill": filled,
        }

    def requests(self, stage: str) -> dict[str, Any]:
        """The coordinator's requests, by site; those for vectors have the adverts too."""
        found = super().requests(stage)
        if stage != "mask" or self.machine.unseen is None:
            return found
        return {site: (self.machine.unseen, shares) for site, shares in found.items()}

    def answer(self, site: str, request: Any) -> tuple[Any, Any]:
        """The site's next state and its answer; the site stays as it is."""
        match self.states.get(site):
            case participant.Advertised() as state:
                return state.receive(request, self.roster, self.entropy[site], again=True)
            case participant.Prepared() as state if isinstance(self.machine, coordinator.Sharing):
                own = state.advertised
                return own.receive(request, self.roster, self.entropy[site], again=True)
            case None if site not in self.inputs.get("restarted", ()):
                slot = self.slots[site]
                head = self.inputs["ledger_head"]
                return slot.advertise(request, self.identities[site], head)  # type: ignore[no-any-return]
            case participant.Prepared() as state:
                after, vector = state.receive(*request, self.roster, self.vector(site))
                return after, vector.tobytes()
        return super().answer(site, request)

    def to(self, stage: str) -> "Run":
        """Runs the stages before `stage`; for `end`, all of them."""
        for present in STAGES[: (*STAGES, "end").index(stage)]:
            if present != "share" or isinstance(self.machine, coordinator.Sharing):
                self._run(present)
        return self
