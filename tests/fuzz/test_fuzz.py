"""Any bytes give a value or a documented error. CI runs a short share of the inputs."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzz.engine import LONGEST, search
from fuzz.real_site import STAGES, RealSite
from fuzz.record import RECORD, full_run
from fuzz.target import Place, Target
from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
GUIDED = [target for target in TARGETS.values() if target.guided] if full_run() else []


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_only_the_documented_errors_come_out(
    target: Target, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = Place(folder=tmp_path, model=lambda: request.getfixturevalue("tiny_model"))
    with RECORD.row(target.name, "hypothesis") as tally:
        prove = target.make(place)
        count = target.inputs if full_run() else target.share
        search(target, prove, count, RECORD.seed, tally)
    assert tally.inputs >= count


def test_a_new_site_takes_over_when_attempt_numbers_end(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("first", "second"):
        site = RealSite(tmp_path / name, tiny_model)
        site.next_attempt(len(STAGES))
        site.trainer.close()


@pytest.mark.skipif(not full_run(), reason="coverage-guided search is for `make fuzz`")
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no wheel for this platform")
@pytest.mark.parametrize("target", GUIDED, ids=[target.name for target in GUIDED])
def test_coverage_guided_search_finds_no_other_error(target: Target, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fuzz.coverage_guided",
        target.name,
        f"-runs={target.guided}",
        f"-seed={RECORD.seed}",
        f"-max_len={LONGEST}",
        "-len_control=0",
        f"-artifact_prefix={tmp_path}/",
        "-print_final_stats=1",
    ]
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    with RECORD.row(target.name, "atheris") as tally:
        ended = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", ended.stderr)
        tally.inputs = int(executed[1]) if executed else 0
        reached = re.findall(r"\bcov: (\d+)", ended.stderr)
        tally.edges = int(reached[-1]) if reached else None
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert tally.inputs >= target.guided
