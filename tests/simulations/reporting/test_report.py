"""The report is complete, needs no network, and shows names from data as plain text."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from umbel_simulations.reporting.report import CLAIM, write_report
from umbel_simulations.reporting.results import (
    Comparison,
    CurvePoint,
    RunSummary,
    Score,
    SiteResult,
)

PRIVACY = Path(__file__).parents[3] / "docs" / "privacy.md"
VOID = {"meta", "br", "link", "img", "input", "hr"}
SITES: tuple[str, ...] = ("hospital-a", "hospital-b")


class Page(HTMLParser):
    """The elements of a page, in order, with what each table's rows and the page's text say."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text = " ".join(f"{self.text} {data}".split())
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def site(name: str, **parts: object) -> SiteResult:
    fields: dict[str, object] = {
        "name": name,
        "records": 1000,
        "labels": {"07 eye": 900, "08 ear": 100},
        "epsilon": 7.98,
        "delta": 1e-5,
        "noise_multiplier": 0.73,
        "sampling_rate": 0.0965,
        "sent_clear_bytes": 0,
        "sent_masked_bytes": 470_472,
        "sent_protocol_bytes": 40_113,
        "received_bytes": 3_000_000,
    }
    return SiteResult(**{**fields, **parts})  # type: ignore[arg-type]  # fields by name


def summary(**parts: object) -> RunSummary:
    fields: dict[str, object] = {
        "name": "my-run",
        "scenario": "quickstart",
        "seed": 7,
        "insecure_test_seed": None,
        "model": "encoder",
        "data": "ICD-10-CM",
        "test_records": 1500,
        "method": "ffa",
        "privacy": "local",
        "rounds": 2,
        "local_steps": 5,
        "trained_parameters": 19_603,
        "standard_error": 0.0117,
        "comparisons": [
            Comparison(name="majority", description="always one", score=Score(0.059, 0.006)),
            Comparison(name="federated", description="the sum", score=Score(0.715, 0.69)),
            Comparison(
                name="local-only",
                description="alone",
                score=Score(0.512, 0.48),
                parts={"hospital-a": Score(0.517, 0.5), "hospital-b": Score(0.507, 0.46)},
            ),
        ],
        "curve": [
            CurvePoint(round=0, score=Score(0.053, 0.01), epsilon=dict.fromkeys(SITES, 0.0)),
            CurvePoint(round=1, score=Score(0.61, 0.58), epsilon=dict.fromkeys(SITES, 6.1)),
            CurvePoint(round=2, score=Score(0.715, 0.69), epsilon=dict.fromkeys(SITES, 7.98)),
        ],
        "sites": [site("hospital-a"), site("hospital-b", labels={"08 ear": 1000}, epsilon=7.5)],
        "aborted_attempts": 1,
        "adapter_digest": "ab" * 32,
        "transcript_head": "cd" * 32,
        "seconds": {"federation": 48.1, "total": 170.0},
        "versions": {"umbel": "0.1.0", "torch": "2.13.0"},
    }
    return RunSummary(**{**fields, **parts})  # type: ignore[arg-type]  # fields by name


def unprivate(**parts: object) -> RunSummary:
    """A run without differential privacy."""
    nothing = dict.fromkeys(SITES)
    return summary(
        privacy="none",
        curve=[CurvePoint(round=0, score=Score(0.1, 0.1), epsilon=nothing)],
        sites=[site(name, epsilon=None, delta=None, noise_multiplier=None) for name in SITES],
        **parts,
    )


def html_of(tmp_path: Path, outcome: RunSummary) -> str:
    write_report(outcome, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def page_of(tmp_path: Path, outcome: RunSummary) -> Page:
    return Page(html_of(tmp_path, outcome))


def test_the_page_is_well_formed_and_small(tmp_path: Path) -> None:
    html = html_of(tmp_path, summary())
    page = Page(html)
    assert page.open == []
    assert html.startswith("<!doctype html>")
    assert len(html.encode()) < 200_000
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    html = html_of(tmp_path, summary())
    page = Page(html)
    assert "://" not in html
    assert "url(" not in html.replace("url(#", "")
    assert "@import" not in html
    loading = {"script", "link", "iframe", "img", "object", "embed", "image", "foreignobject"}
    assert not loading & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def test_every_reference_inside_a_chart_leads_somewhere(tmp_path: Path) -> None:
    html = html_of(tmp_path, summary())
    identifiers = set(re.findall(r'\bid="([^"]+)"', html))
    references = set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', html))
    assert references
    assert references <= identifiers


def test_the_same_summary_gives_the_same_bytes(tmp_path: Path) -> None:
    assert html_of(tmp_path, summary()) == html_of(tmp_path, summary())


def test_the_headlines_are_the_runs(tmp_path: Path) -> None:
    text = page_of(tmp_path, summary()).text
    assert "71.5 % federated accuracy ± 1.2 (standard error)" in text
    assert "+20.3 points compared with each site alone mean of the sites" in text
    assert "7.98 epsilon, against anyone largest of any site, delta 1e-05" in text
    assert "0 B left the sites in clear 941 kB left masked" in text


def test_comparisons_stand_in_order_with_their_standard_errors(tmp_path: Path) -> None:
    rows = page_of(tmp_path, summary()).rows
    names = [row[0] for row in rows if row[0] in ("majority", "local-only", "federated")]
    assert names == ["majority", "local-only", "federated"]
    # sqrt(0.512 * 0.488 / 1500) = 0.0129
    alone = next(row for row in rows if row[0] == "local-only")
    assert alone[1:3] == ["51.2 ± 1.3", "48.0"]
    text = page_of(tmp_path, summary()).text
    assert "hospital-a 51.7, hospital-b 50.7" in text


def test_each_site_has_its_privacy_and_bytes(tmp_path: Path) -> None:
    rows = page_of(tmp_path, summary()).rows
    privacy = ["7.98", "1e-05", "0.730", "0.0965"]
    assert ["hospital-a", "1,000", *privacy, "470 kB", "40.1 kB", "0 B", "3 MB"] in rows


def test_where_sites_share_their_noise_both_totals_stand_together(tmp_path: Path) -> None:
    sites = [site(name, epsilon=23.3, shared_epsilon=7.5) for name in SITES]
    page = page_of(tmp_path, summary(privacy="distributed", sites=sites))
    assert "7.50 epsilon, against readers of the sums against everybody 23.30" in page.text
    heads = next(row for row in page.rows if row[0] == "site")
    assert heads[2:4] == ["epsilon, readers of the sums", "epsilon, everybody"]
    rows = [row for row in page.rows if row[0] in SITES and len(row) == len(heads)]
    assert [row[2:4] for row in rows] == [["7.50", "23.30"]] * 2
    assert "It rests on these sites" in page.text
    assert "It rests on these sites" not in page_of(tmp_path, summary()).text


def test_bytes_in_clear_are_marked(tmp_path: Path) -> None:
    leaking = summary(sites=[site("hospital-a", sent_clear_bytes=5), site("hospital-b")])
    marked = [cell for cell in page_of(tmp_path, leaking).all("td") if cell.get("class") == "bad"]
    assert len(marked) == 1
    none = [cell for cell in page_of(tmp_path, summary()).all("td") if cell.get("class") == "bad"]
    assert none == []


def test_the_labels_of_each_site_are_counted_and_tinted(tmp_path: Path) -> None:
    page = page_of(tmp_path, summary())
    assert ["07 eye", "900", "0"] in page.rows
    assert ["08 ear", "100", "1,000"] in page.rows
    tints = [cell["style"] for cell in page.all("td") if "style" in cell]
    assert tints == ["--share: 0.900", "--share: 0.000", "--share: 0.100", "--share: 1.000"]


def test_charts_are_told_in_words_to_those_who_cannot_see_them(tmp_path: Path) -> None:
    charts = page_of(tmp_path, summary()).all("svg")
    assert [chart["role"] for chart in charts] == ["img", "img"]
    curve, epsilon = (chart["aria-label"] or "" for chart in charts)
    assert "5.3 % after round 0, 61.0 % after round 1, 71.5 % after round 2" in curve
    assert "local-only (mean) 51.2 %" in curve
    assert "at most 7.98" in epsilon


def test_charts_follow_the_colour_scheme_of_the_page(tmp_path: Path) -> None:
    html = html_of(tmp_path, summary())
    charts = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "currentColor" in charts
    assert "#010203" not in html
    # Matplotlib's own black or white would vanish in one of the schemes.
    texts = re.findall(r"<text[^>]*>", charts)
    assert texts
    assert all("currentColor" in text for text in texts)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_the_learning_curve_draws_every_comparison(tmp_path: Path) -> None:
    html = html_of(tmp_path, summary())
    for legend in ("federated 71.5", "majority 5.9", "local-only (mean) 51.2"):
        assert f">{legend}<" in html


def test_many_sites_get_one_line_each_and_no_legend(tmp_path: Path) -> None:
    names = [f"site-{number:02}" for number in range(30)]
    outcome = summary(
        sites=[site(name) for name in names],
        curve=[
            CurvePoint(round=number, score=Score(0.5, 0.5), epsilon=dict.fromkeys(names, 1.0))
            for number in range(3)
        ],
    )
    html = html_of(tmp_path, outcome)
    assert html.count(">site-07<") == 2  # a row of the sites' table, a column of the labels' table
    assert len(html.encode()) < 1_500_000


def test_the_claim_is_that_of_the_page_on_privacy_word_for_word(tmp_path: Path) -> None:
    page = page_of(tmp_path, summary())
    [quote] = re.findall(r"^## The claim\n\n((?:> .*\n)+)", PRIVACY.read_text(), re.MULTILINE)
    claim = " ".join(line.removeprefix("> ") for line in quote.splitlines())
    assert claim == CLAIM
    assert claim in page.text
    assert "The claim does not hold" not in page.text
    assert not [p for p in page.all("p") if p.get("role") == "alert"]


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (summary(insecure_test_seed=3), "INSECURE: insecure_test_seed = 3"),
        (unprivate(), "NO DIFFERENTIAL PRIVACY"),
    ],
)
def test_a_run_that_is_not_private_says_so_in_red(
    tmp_path: Path, outcome: RunSummary, words: str
) -> None:
    page = page_of(tmp_path, outcome)
    assert words in page.text
    alerts = [p for p in page.all("p") if p.get("role") == "alert"]
    assert [alert["class"] for alert in alerts] == ["alarm"]
    assert "The claim does not hold for this run" in page.text


def test_without_differential_privacy_there_is_no_epsilon_chart(tmp_path: Path) -> None:
    page = page_of(tmp_path, unprivate())
    assert len(page.all("svg")) == 1
    assert "∞ epsilon no differential privacy" in page.text


def test_names_and_labels_are_data_and_not_markup(tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script>'
    outcome = summary(
        name=attack,
        data=attack,
        model=f"a $x_{attack}$",
        sites=[site("hospital-a", labels={attack: 1000}), site("hospital-b")],
    )
    html = html_of(tmp_path, outcome)
    assert "<script" not in html
    page = Page(html)
    assert page.open == []
    assert [attack, "1,000", "0"] in page.rows
    assert page.text.count(attack) >= 3


def test_a_run_without_comparisons_still_has_a_report(tmp_path: Path) -> None:
    only = [Comparison(name="federated", description="the sum", score=Score(0.7, 0.6))]
    page = page_of(tmp_path, summary(comparisons=only))
    assert "points compared with" not in page.text
    assert "For comparison: nothing." in (page.all("svg")[0]["aria-label"] or "")


def test_the_facts_of_the_run_are_there(tmp_path: Path) -> None:
    text = page_of(tmp_path, summary()).text
    for fact in (
        "quickstart, public seed 7",
        "ffa, 19,603 trained parameters",
        "2 rounds of 5 local steps; 1 aborted attempt privacy",
        "federation 48.1, total 170.0",
        "umbel 0.1.0, torch 2.13.0",
        "ab" * 32,
        "cd" * 32,
    ):
        assert fact in text
