"""The state of a run as its events tell it: what the live view shows."""

from dataclasses import dataclass, field

from umbel_simulations.reporting import events
from umbel_simulations.reporting.results import Score

ANSWERED = {
    "offer": "accepted",
    "prepare": "keys prepared",
    "fill": "shares prepared",
    "train": "trained",
    "share": "keys shared",
    "mask": "masked",
    "confirm": "confirmed",
    "unmask": "unmasked",
    "finish": "has adapter",
}
"""What a site has done after it answered a stage, in the words of the live view."""

STAGES = ("train", "share", "mask", "confirm", "unmask")
"""The stages of an attempt, in order."""


@dataclass
class SiteState:
    """The state of one site: a row of the table."""

    records: int
    doing: str = "waiting"
    steps: int = 0
    """Optimizer steps done so far, over the whole job."""
    epsilon: float | None = None
    masked_bytes: int = 0
    answered: list[str] = field(default_factory=list)
    """Stages that it answered in the current attempt."""
    refused: bool = False
    """Whether it refused a stage of the current attempt."""


@dataclass
class RunState:
    """The state of a run, changed by each event."""

    name: str = ""
    rounds: int = 0
    steps: int = 0
    """Steps of each site over the whole job."""
    round: int = 0
    """The current round, from 1."""
    sites: dict[str, SiteState] = field(default_factory=dict)
    scores: list[tuple[int, Score]] = field(default_factory=list)
    """Round and score of each release."""
    warnings: list[str] = field(default_factory=list)
    baselines: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Steps done and in total, of each comparison."""
    seconds: float = 0.0
    """Time of the last event."""
    first_step: tuple[float, float] | None = None
    """Time and progress at the first step that was seen; a resumed run does not start at 0."""

    def apply(self, event: events.AnyEvent) -> None:
        """Changes the state by an event."""
        self.seconds = event.seconds
        match event:
            case events.Started():
                self.name, self.rounds, self.steps = event.name, event.rounds, event.steps
                self.sites = {site: SiteState(records) for site, records in event.sites.items()}
            case events.Preparing():
                share = f"{event.done / max(event.total, 1):.0%}"
                doing = f"preparing {share}" if event.done < event.total else "prepared"
                for site in self.sites if event.site is None else [event.site]:
                    self.sites[site].doing = doing
            case events.SiteStep():
                self._step(event)
            case events.SiteStage():
                self._stage(event)
            case events.RoundReleased():
                self._released(event)
            case events.AttemptAborted():
                self.warnings.append(
                    f"round {event.round}, attempt {event.attempt}: aborted, {event.check}"
                )
                self._begin_attempt()
            case events.BaselineStep():
                self.baselines[event.name] = (event.done, event.total)

    @property
    def progress(self) -> float:
        """Share of the steps of all sites that are done."""
        return sum(site.steps for site in self.sites.values()) / max(
            1, self.steps * len(self.sites)
        )

    def seconds_left(self) -> float | None:
        """Time until the last release, at the speed so far; None while the speed is unknown."""
        if self.first_step is None or self.progress <= self.first_step[1]:
            return None
        began, progress = self.first_step
        return (self.seconds - began) / (self.progress - progress) * (1 - self.progress)

    def comparison(self, name: str) -> str:
        """The comparison of a `BaselineStep`, for people. A site's name means that site alone."""
        return f"comparison local-only, {name}" if name in self.sites else f"comparison {name}"

    def _step(self, event: events.SiteStep) -> None:
        site = self.sites[event.site]
        self.round = event.round
        site.doing = "training"
        site.steps = (event.round - 1) * event.steps + event.step
        if self.first_step is None:
            self.first_step = (event.seconds, self.progress)

    def _stage(self, event: events.SiteStage) -> None:
        site = self.sites[event.site]
        site.masked_bytes += event.masked_bytes
        site.refused = event.refusal is not None
        if event.refusal is None:
            site.doing = ANSWERED[event.stage]
            site.answered.append(event.stage)
        else:
            site.doing = "refused"
            refused = f"{event.site} refused {event.stage}, {event.refusal}"
            self.warnings.append(f"round {event.round}: {refused}" if event.round else refused)

    def _released(self, event: events.RoundReleased) -> None:
        self.round = event.round
        self.scores.append((event.round, event.score))
        # An attempt that was prepared has no stage of sharing.
        held = {stage for site in self.sites.values() for stage in site.answered}
        stages = [stage for stage in STAGES if stage in held]
        for name, site in self.sites.items():
            site.epsilon = event.epsilon[name]
            missed = next((stage for stage in stages if stage not in site.answered), None)
            if missed is not None and not site.refused:
                site.doing = "silent"
                self.warnings.append(f"round {event.round}: {name} fell silent before {missed}")
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        for site in self.sites.values():
            site.answered, site.refused = [], False
