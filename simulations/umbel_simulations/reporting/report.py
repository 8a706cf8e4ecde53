"""`report.html`: one file that explains the outcome of a run to someone who did not see it.

It loads nothing and has no script. The template escapes all text that comes from data, such as
names and labels.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from umbel_common.printable import printable
from umbel_simulations.reporting.measures import ACCURACY, Measure, measure_of
from umbel_simulations.reporting.results import Comparison, RunSummary, Score
from umbel_simulations.reporting.table import against, ordered, privacy_of, warnings_of
from umbel_simulations.reporting.units import size
from umbel_simulations.scenario.run_folder import write

CLAIM = (
    "For each site, and against the server and the other sites working together: all that is"
    " released over all rounds of all jobs on one data set is (epsilon, delta)-differentially"
    " private for each record (or each patient), under add/remove adjacency. The claim does not"
    " cover participation, the time at which a site answers, poisoning, a compromised endpoint, or"
    " memorisation at inference time beyond epsilon."
)
"""The privacy claim, in the words of docs/privacy.md."""

SITES_IN_LEGEND = 8

_INK = "#010203"
"""Placeholder for the page's text colour, so that charts follow its light or dark scheme."""
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's palette, which is safe for colour-blind people. Lines also differ in dashes."""
_DASHES = ("solid", "dashed", "dotted", "dashdot")


def write_report(summary: RunSummary, path: Path) -> None:
    """Writes a summary as one HTML file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    page = environment.get_template("report.html.j2").render(
        run=summary,
        warnings=warnings_of(summary),
        claim=CLAIM,
        headlines=_headlines(summary),
        comparisons=[
            (row, measure_of(row.score).error(row.score, summary.test_records))
            for row in ordered(summary.comparisons)
        ],
        measure=_measure(summary),
        against={
            row.name: against(summary.differences.get(row.name)) for row in summary.comparisons
        },
        curve=_learning_curve(summary),
        epsilon=_epsilon_curve(summary) if summary.privacy != "none" else None,
        sites=[(site, *privacy_of(site)) for site in summary.sites],
        labels=_label_rows(summary),
    )
    write(path, page.encode())


def _shown(value: object) -> object:
    """What a page shows of a value: no text of a data set turns the words beside it around."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _measure(summary: RunSummary) -> Measure:
    """The measure of all scores of a run."""
    return measure_of(summary.comparisons[0].score) if summary.comparisons else ACCURACY


def _headlines(summary: RunSummary) -> list[tuple[str, str, str]]:
    """(value, name, remark) of each headline figure."""
    federated = _row(summary, "federated")
    alone = _row(summary, "local-only")
    clear = sum(site.sent_clear_bytes for site in summary.sites)
    masked = sum(site.sent_masked_bytes for site in summary.sites)
    headlines = []
    measure = _measure(summary)
    if federated is not None:
        error = measure.error(federated, summary.test_records)
        value = f"{measure.show(federated)}{measure.unit}"
        headlines.append((value, f"federated {measure.name}", f"± {error:.1f} (standard error)"))
    if federated is not None and alone is not None:
        gain = measure.read_value(federated) - measure.read_value(alone)
        what = "points" if measure.unit else measure.name
        remark = "mean of the sites"
        headlines.append((f"{gain:+.1f}", f"{what} compared with each site alone", remark))
    spent = [site.epsilon for site in summary.sites if site.epsilon is not None]
    deltas = [site.delta for site in summary.sites if site.delta is not None]
    shared = [site.shared_epsilon for site in summary.sites if site.shared_epsilon is not None]
    if shared and deltas:
        remark = f"against everybody {max(spent):.2f}, delta {max(deltas):g}"
        headlines.append((f"{max(shared):.2f}", "epsilon, against readers of the sums", remark))
    elif spent and deltas:
        remark = f"largest of any site, delta {max(deltas):g}"
        headlines.append((f"{max(spent):.2f}", "epsilon, against anyone", remark))
    else:
        headlines.append(("∞", "epsilon", "no differential privacy"))
    headlines.append((size(clear), "left the sites in clear", f"{size(masked)} left masked"))
    return headlines


def _row(summary: RunSummary, name: str) -> Score | None:
    return next((row.score for row in summary.comparisons if row.name == name), None)


def _label_rows(summary: RunSummary) -> list[tuple[str, list[tuple[int, float]]]]:
    """For each label, the number of records at each site and the tint of the cell (0 to 1)."""
    labels = sorted({label for site in summary.sites for label in site.labels})
    counts = [[site.labels.get(label, 0) for site in summary.sites] for label in labels]
    shares = [
        [count / max(site.records, 1) for count, site in zip(row, summary.sites, strict=True)]
        for row in counts
    ]
    largest = max((share for row in shares for share in row), default=0.0) or 1.0
    return [
        (label, [(count, share / largest) for count, share in zip(row, row_shares, strict=True)])
        for label, row, row_shares in zip(labels, counts, shares, strict=True)
    ]


def _learning_curve(summary: RunSummary) -> Markup:
    measure = _measure(summary)
    figure, axes = _figure("round", ", ".join(filter(None, (measure.name, measure.unit.strip()))))
    rounds = [point.round for point in summary.curve]
    values = [measure.read_value(point.score) for point in summary.curve]
    errors = [measure.error(point.score, summary.test_records) for point in summary.curve]
    axes.fill_between(
        rounds,
        [value - error for value, error in zip(values, errors, strict=True)],
        [value + error for value, error in zip(values, errors, strict=True)],
        color=_COLOURS[0],
        alpha=0.2,
        linewidth=0,
    )
    axes.plot(rounds, values, marker="o", color=_COLOURS[0], label=_with_value("federated", values))
    others = [row for row in reversed(ordered(summary.comparisons)) if row.name != "federated"]
    for index, row in enumerate(others, start=1):
        value = measure.read_value(row.score)
        axes.axhline(
            value,
            color=_COLOURS[index],
            linestyle=_DASHES[index % len(_DASHES)],
            label=_with_value(_name(row), [value]),
        )
    axes.set_ylim(bottom=0)
    _legend_below(axes)
    return _svg(figure, "learning-curve", _curve_text(summary))


def _epsilon_curve(summary: RunSummary) -> Markup:
    against = "epsilon against everybody" if summary.privacy == "distributed" else "epsilon spent"
    figure, axes = _figure("round", against)
    rounds = [point.round for point in summary.curve]
    few = len(summary.sites) <= SITES_IN_LEGEND
    for index, site in enumerate(summary.sites):
        spent = [point.epsilon.get(site.name) for point in summary.curve]
        axes.plot(
            rounds,
            [math.nan if epsilon is None else epsilon for epsilon in spent],
            marker="." if few else None,
            color=_COLOURS[index % len(_COLOURS)] if few else _COLOURS[0],
            linestyle=_DASHES[index % len(_DASHES)] if few else "solid",
            alpha=1.0 if few else 0.4,
            label=site.name,
        )
    axes.set_ylim(bottom=0)
    if few:
        _legend_below(axes)
    largest = max((site.epsilon or 0.0 for site in summary.sites), default=0.0)
    return _svg(
        figure,
        "epsilon",
        f"Epsilon spent by each of {len(summary.sites)} sites after each round;"
        f" at the end at most {largest:.2f}.",
    )


def _curve_text(summary: RunSummary) -> str:
    """The learning curve in words, for readers who do not see it."""
    measure = _measure(summary)
    points = ", ".join(
        f"{measure.show(point.score)}{measure.unit} after round {point.round}"
        for point in summary.curve
    )
    others = ", ".join(
        f"{_name(row)} {measure.show(row.score)}{measure.unit}"
        for row in ordered(summary.comparisons)
        if row.name != "federated"
    )
    name = measure.name.capitalize()
    return f"{name} of the federated adapter: {points}. For comparison: {others or 'nothing'}."


def _name(row: Comparison) -> str:
    return f"{row.name} (mean)" if row.parts else row.name


def _with_value(name: str, values: Sequence[float]) -> str:
    return f"{name} {values[-1]:.1f}" if values else name


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    with mpl.rc_context(
        {
            "font.family": "sans-serif",
            "font.size": 10.0,
            "text.color": _INK,
            "axes.edgecolor": _INK,
            "axes.labelcolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = Figure(figsize=(5.4, 3.8))
        axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_INK, alpha=0.15)
    return figure, axes


def _legend_below(axes: Axes) -> None:
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, labelcolor=_INK
    )


def _svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an element of the page; screen readers read `description`."""
    file = io.StringIO()
    # With a salt, two charts on one page have different identifiers, and the file is
    # reproducible.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    text = file.getvalue()
    drawing = text[text.index("<svg") :].replace(_INK, "currentColor")
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    # Every chart numbers its groups in the same way, and nothing refers to them.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    drawing = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", drawing, count=5)
    label = Markup('<svg role="img" aria-label="{}"').format(description)
    return label + Markup(drawing.removeprefix("<svg"))  # noqa: S704  # drawn here, by matplotlib
