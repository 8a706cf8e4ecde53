"""What a run keeps of its events in `metrics.jsonl`."""

import json
from pathlib import Path

import pytest

from umbel_simulations.reporting import events
from umbel_simulations.reporting.recorder import Recorder, read_metrics
from umbel_simulations.reporting.results import Score

CLASSIFIER = Score(accuracy=0.7, macro_f1=0.6)
LANGUAGE_MODEL = Score(perplexity=30.0, perplexity_error=2.0, general_perplexity=40.0)


def released(score: Score) -> events.RoundReleased:
    return events.RoundReleased(
        seconds=1.5,
        round=1,
        attempt=1,
        survivors=["hospital-a"],
        epsilon={"hospital-a": 2.5},
        score=score,
    )


def written(path: Path, *happened: events.AnyEvent) -> list[dict[str, object]]:
    """The lines that a recorder keeps of these events."""
    recorder = Recorder(path, on_event=lambda event: None)
    for event in happened:
        recorder.emit(event)
    recorder.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_read_as_they_were_written_and_mere_progress_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    aborted = events.AttemptAborted(seconds=1.0, round=1, attempt=1, check="too-few-sites")
    step = events.SiteStep(seconds=1.0, site="hospital-a", round=1, step=1, steps=2)
    lines = written(path, aborted, step, released(CLASSIFIER), released(LANGUAGE_MODEL))
    assert [line["event"] for line in lines] == [
        "attempt-aborted",
        "round-released",
        "round-released",
    ]
    assert lines[1]["score"] == {"accuracy": 0.7, "macro_f1": 0.6}
    assert read_metrics(path) == [aborted, released(CLASSIFIER), released(LANGUAGE_MODEL)]


@pytest.mark.parametrize("score", [CLASSIFIER, LANGUAGE_MODEL])
def test_a_release_in_the_shape_of_version_0_1_is_read_alike(tmp_path: Path, score: Score) -> None:
    path = tmp_path / "metrics.jsonl"
    [line] = written(path, released(score))
    del line["score"]
    fields = {name: getattr(score, name) for name in Score.__struct_fields__}
    path.write_text(json.dumps({**line, **fields}) + "\n")
    assert read_metrics(path) == [released(score)]
