"""Report and tables of a language model: perplexity, forgetting, and answers side by side."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from umbel_simulations.reporting.report import write_report
from umbel_simulations.reporting.results import (
    Answers,
    Comparison,
    CurvePoint,
    Difference,
    RunSummary,
    Score,
    SiteResult,
)
from umbel_simulations.reporting.table import print_summary
from umbel_simulations.runs.scores import difference

ATTACK = "</td><script>alert(1)</script>"


def score(perplexity: float, general: float) -> Score:
    return Score(perplexity=perplexity, perplexity_error=0.8, general_perplexity=general)


def summary() -> RunSummary:
    sites = ("hospital-a", "hospital-b")
    return RunSummary(
        name="my-run",
        scenario="medical-qa",
        seed=7,
        insecure_test_seed=None,
        model="decoder",
        data="terms",
        test_records=300,
        method="ffa",
        privacy="local",
        rounds=1,
        local_steps=4,
        trained_parameters=12_288,
        standard_error=0.8,
        comparisons=[
            Comparison(name="base", description="as it was", score=score(21.9, 30.0)),
            Comparison(
                name="local-only",
                description="alone",
                score=score(14.1, 30.9),
                parts={"hospital-a": score(14.0, 30.8), "hospital-b": score(14.2, 31.0)},
            ),
            Comparison(name="federated", description="the sum", score=score(13.2, 30.4)),
        ],
        curve=[
            CurvePoint(round=0, score=score(21.9, 30.0), epsilon=dict.fromkeys(sites, 0.0)),
            CurvePoint(round=1, score=score(13.2, 30.4), epsilon=dict.fromkeys(sites, 7.9)),
        ],
        sites=[
            SiteResult(
                name=site,
                records=1000,
                labels={system: 1000},
                epsilon=7.9,
                delta=1e-5,
                noise_multiplier=0.6,
                sampling_rate=0.08,
                sent_clear_bytes=0,
                sent_masked_bytes=1000,
                sent_protocol_bytes=100,
                received_bytes=1000,
            )
            for site, system in zip(sites, ("Eye", "Ear"), strict=True)
        ],
        aborted_attempts=0,
        adapter_digest="ab" * 32,
        transcript_head="cd" * 32,
        seconds={"total": 600.0},
        versions={"umbel": "0.1.0"},
        answers=[
            Answers(
                prompt="What is <b>glaucoma</b>?",
                reference="A high pressure in the eye.",
                found={"base": ATTACK, "federated": "An abnormality of the eye."},
            )
        ],
        differences={
            "base": Difference(share=0.659, error=0.021),
            "local-only": Difference(share=0.068, error=0.004),
        },
    )


@pytest.fixture
def page(tmp_path: Path) -> str:
    write_report(summary(), tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def printed() -> str:
    file = io.StringIO()
    print_summary(Console(file=file, width=110), summary())
    return file.getvalue()


def test_the_page_is_about_perplexity_and_forgetting(page: str) -> None:
    assert "Perplexity over rounds" in page
    assert "<td>13.2 ± 0.8</td>\n<td>30.4</td>" in page
    assert "<td>+6.8 ± 0.4</td>" in page
    assert "Lower is better." in page
    assert "-0.9</strong> <span>perplexity compared with each site alone" in page
    assert "accuracy" not in page.lower()


def test_answers_stand_side_by_side_in_columns(page: str) -> None:
    start = page.index("h-answers")
    section = page[start : page.index("</section>", start)]
    headings = section[section.index("<thead>") : section.index("</thead>")]
    assert headings.index("reference") < headings.index("base") < headings.index("federated")
    assert section.count("<tr>") == 2
    assert '<td class="ours">An abnormality of the eye.</td>' in section


def test_prompts_and_answers_are_data_and_not_markup(page: str) -> None:
    assert "<script" not in page
    assert "<b>" not in page
    assert "What is &lt;b&gt;glaucoma" in page


def test_the_page_shows_which_site_has_which_sources(page: str) -> None:
    assert '<th scope="col">source</th>' in page
    assert '<th scope="row">Eye</th>' in page


def test_the_terminal_shows_how_far_each_model_is_from_the_federated_one() -> None:
    lines = [line.split() for line in printed().splitlines()]
    rows = {words[0]: words for words in reversed(lines) if words}
    assert rows["local-only"][:6] == ["local-only", "14.1", "30.9", "+6.8", "±", "0.4"]
    assert rows["federated"][:4] == ["federated", "13.2", "30.4", "–"]
    assert "What is <b>glaucoma</b>?" in printed()


def test_a_paired_difference_is_surer_than_what_it_is_between() -> None:
    random = np.random.default_rng(3)
    federated = random.normal(2.5, 0.8, 400)
    alone = federated + random.normal(0.07, 0.05, 400)
    found = difference(alone, federated)
    assert found.share == pytest.approx(np.exp((alone - federated).mean()) - 1)
    assert 0.002 < found.error < 0.004
    assert found.error < 0.1 * federated.std() / 20
    assert difference(federated, federated) == Difference(share=0.0, error=0.0)
