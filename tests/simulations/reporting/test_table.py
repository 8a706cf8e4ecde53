"""The final tables: every figure is there, and an insecure run does not look private."""

import io

import msgspec
import pytest
from rich.console import Console

from umbel_simulations.reporting.results import Comparison, RunSummary, Score, SiteResult
from umbel_simulations.reporting.table import ordered, print_summary, warnings_of


def site(name: str, **parts: object) -> SiteResult:
    fields: dict[str, object] = {
        "name": name,
        "records": 4973,
        "labels": {"07 eye": 4973},
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
        "name": "run",
        "scenario": "quickstart",
        "seed": 7,
        "insecure_test_seed": None,
        "model": "encoder",
        "data": "notes [bold]x[/bold].jsonl",
        "test_records": 1500,
        "method": "ffa",
        "privacy": "local",
        "rounds": 6,
        "local_steps": 5,
        "trained_parameters": 19_603,
        "standard_error": 0.0117,
        "comparisons": [
            Comparison(
                name="federated", description="the sum [i]of[/i] all", score=Score(0.715, 0.69)
            ),
            Comparison(name="majority", description="always one", score=Score(0.059, 0.006)),
            Comparison(name="pooled", description="in one place", score=Score(0.718, 0.70)),
            Comparison(name="local-only", description="alone", score=Score(0.512, 0.48)),
        ],
        "curve": [],
        "sites": [site("hospital-a"), site("hospital-b", records=812)],
        "aborted_attempts": 0,
        "adapter_digest": "ab" * 32,
        "transcript_head": "cd" * 32,
        "seconds": {"total": 170.0},
        "versions": {"umbel": "0.1.0"},
    }
    return RunSummary(**{**fields, **parts})  # type: ignore[arg-type]  # fields by name


def printed(outcome: RunSummary, width: int = 100, *, colour: bool = False) -> str:
    file = io.StringIO()
    print_summary(Console(file=file, width=width, force_terminal=colour), outcome)
    return file.getvalue()


def row(text: str, name: str) -> list[str]:
    """The words of the line that starts with `name`."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


@pytest.mark.parametrize("width", [80, 120])
def test_every_comparison_has_its_scores_in_percent(width: int) -> None:
    text = printed(summary(), width)
    assert row(text, "federated")[:3] == ["federated", "71.5", "69.0"]
    assert row(text, "local-only")[:3] == ["local-only", "51.2", "48.0"]
    assert "standard error of an accuracy: 1.2 points" in text
    assert "no standard error can be given" in printed(summary(standard_error=0.0), width)


@pytest.mark.parametrize("width", [80, 120])
def test_every_site_has_its_privacy_and_its_bytes(width: int) -> None:
    text = printed(summary(), width)
    assert row(text, "hospital-b") == (
        ["hospital-b", "812", "7.98", "1e-05", "0.730", "470", "kB", "40.1", "kB", "0", "B"]
    )
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_comparisons_come_from_the_least_to_the_most() -> None:
    names = [comparison.name for comparison in ordered(summary().comparisons)]
    assert names == ["majority", "local-only", "federated", "pooled"]


def test_a_private_run_has_no_banner() -> None:
    assert warnings_of(summary()) == []
    assert "INSECURE" not in printed(summary())


def test_a_predictable_run_has_a_red_banner_before_its_figures() -> None:
    text = printed(summary(insecure_test_seed=3), colour=True)
    assert text.index("INSECURE: insecure_test_seed = 3") < text.index("71.5")
    assert "41m" in text.partition("INSECURE")[0]


def test_a_run_without_noise_has_a_banner_and_no_finite_epsilon() -> None:
    alone = site("hospital-a", epsilon=None, delta=None, noise_multiplier=None)
    text = printed(summary(privacy="none", sites=[alone]))
    assert "NO DIFFERENTIAL PRIVACY" in text
    assert row(text, "hospital-a")[2:5] == ["∞", "–", "–"]


def test_bytes_in_clear_stand_out() -> None:
    leaking = summary(sites=[site("hospital-a", sent_clear_bytes=1234)])
    assert row(printed(leaking), "hospital-a")[-2:] == ["1.23", "kB"]
    assert "\x1b[1;31m1.23 kB" in printed(leaking, colour=True)


def test_names_from_data_are_shown_and_not_interpreted() -> None:
    text = printed(summary())
    assert "notes [bold]x[/bold].jsonl" in text
    assert "the sum [i]of[/i] all" in text


@pytest.mark.parametrize(
    ("aborted", "words"), [(1, "1 aborted attempt\n"), (2, "2 aborted attempts\n")]
)
def test_aborted_attempts_are_told(aborted: int, words: str) -> None:
    text = printed(msgspec.structs.replace(summary(), aborted_attempts=aborted))
    assert words in text
    assert "aborted" not in printed(summary())
