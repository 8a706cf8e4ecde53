"""Prints the outcome of a run on the terminal."""

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from umbel_simulations.reporting.measures import ACCURACY, Measure, measure_of
from umbel_simulations.reporting.results import (
    Answers,
    Comparison,
    Difference,
    RunSummary,
    SiteResult,
)
from umbel_simulations.reporting.units import size

ANSWERS_SHOWN = 2
"""Number of questions on the terminal; the report has all of them."""


def print_summary(console: Console, summary: RunSummary) -> None:
    """Prints the comparisons and the sites, under a red banner if the run is not private."""
    for warning in warnings_of(summary):
        console.print(Panel.fit(warning, style="bold white on red", box=box.SQUARE))
    for table in (_comparisons(summary), _sites(summary)):
        console.print(table)
        console.print()
    for asked in summary.answers[:ANSWERS_SHOWN]:
        console.print(_answers(asked))
        console.print()
    for line in summary.counted:
        console.print(f"counted at the sites, {line}")
    if summary.held_back:
        rounds = ", ".join(map(str, summary.held_back))
        console.print(f"held back by the release gate: round {rounds}")
    aborted = summary.aborted_attempts
    if aborted:
        console.print(f"{aborted} aborted {'attempt' if aborted == 1 else 'attempts'}")


def _answers(asked: Answers) -> Table:
    table = Table(
        title=Text(asked.prompt), box=box.SIMPLE_HEAD, title_justify="left", show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("reference", Text(asked.reference), style="dim")
    for name, answer in asked.found.items():
        table.add_row(name, Text(answer), style="bold green" if name == "federated" else None)
    return table


def warnings_of(summary: RunSummary) -> list[str]:
    """The reasons why a run is not private, as texts of a banner."""
    warnings = []
    if summary.insecure_test_seed is not None:
        warnings.append(
            f"INSECURE: insecure_test_seed = {summary.insecure_test_seed} made noise, batches and"
            " keys predictable. Nothing in this run is private."
        )
    if summary.privacy == "none":
        warnings.append(
            "NO DIFFERENTIAL PRIVACY: no noise was added. Masks hide each site's delta from the"
            " server, but the released adapters may reveal records."
        )
    return warnings


def ordered(comparisons: list[Comparison]) -> list[Comparison]:
    """Sorts comparisons from the least that one can expect to the most."""
    order = ("base", "majority", "local-only", "head-only", "federated", "pooled")
    return sorted(comparisons, key=lambda row: order.index(row.name))


def _comparisons(summary: RunSummary) -> Table:
    measure = measure_of(summary.comparisons[0].score) if summary.comparisons else ACCURACY
    table = Table(
        title=Text(f"{summary.data}: {summary.test_records:,} test records"),
        caption=_caption(summary, measure),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column(measure.heading, justify="right", no_wrap=True)
    table.add_column(measure.other_name, justify="right", no_wrap=True)
    if summary.differences:
        table.add_column("to federated %", justify="right", no_wrap=True)
    table.add_column("what it is")
    for row in ordered(summary.comparisons):
        table.add_row(
            row.name,
            measure.show(row.score),
            measure.show_other(row.score),
            *([against(summary.differences.get(row.name))] if summary.differences else ()),
            Text(row.description),
            style="bold green" if row.name == "federated" else None,
        )
    return table


def against(difference: Difference | None) -> str:
    """The difference of a perplexity from the federated one, in per cent of the latter."""
    if difference is None:
        return "\N{EN DASH}"
    return f"{100 * difference.share:+.1f} ± {100 * difference.error:.1f}"


def _caption(summary: RunSummary, measure: Measure) -> str:
    if measure is ACCURACY and not summary.standard_error:
        return "no standard error can be given: all test records are right, or all are wrong"
    if measure is ACCURACY:
        return (
            f"standard error of an accuracy: {100 * summary.standard_error:.1f} points;"
            f" differences below {200 * summary.standard_error:.1f} are ties"
        )
    return (
        "lower is better; general text rises as a model forgets; to federated: difference from the"
        " federated perplexity, compared record by record; standard error of the federated"
        f" perplexity: {summary.standard_error:.1f}"
    )


def _sites(summary: RunSummary) -> Table:
    table = Table(
        title="privacy spent by each site, and bytes that left it",
        caption="noise: standard deviation / clip norm; protocol: keys, shares and signatures;"
        " clear: anything else",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("site", overflow="fold")
    shared = any(site.shared_epsilon is not None for site in summary.sites)
    epsilons = ("against readers", "everybody") if shared else ("epsilon",)
    for heading in ("records", *epsilons, "delta", "noise", "masked", "protocol", "clear"):
        table.add_column(heading, justify="right", no_wrap=True)
    for site in summary.sites:
        readers = "–" if site.shared_epsilon is None else f"{site.shared_epsilon:.2f}"
        table.add_row(
            Text(site.name),
            f"{site.records:,}",
            *([readers] if shared else []),
            *privacy_of(site),
            size(site.sent_masked_bytes),
            size(site.sent_protocol_bytes),
            Text(size(site.sent_clear_bytes), style="bold red" if site.sent_clear_bytes else ""),
        )
    return table


def privacy_of(site: SiteResult) -> tuple[str, str, str]:
    """Epsilon, delta and noise multiplier of a site; ∞ and dashes without differential privacy."""
    if site.epsilon is None or site.delta is None or site.noise_multiplier is None:
        return "∞", "–", "–"
    return f"{site.epsilon:.2f}", f"{site.delta:g}", f"{site.noise_multiplier:.3f}"
