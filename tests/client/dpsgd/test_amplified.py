"""An adapter that amplifies rounding: a record moves the sum by the clip norm all the same."""

from pathlib import Path

import pytest
from support.amplifying import CASES, CLIPPING, measured

from umbel_client.models.base.precision import Precision

IN_EVERY_RUN = ("bert", "llama")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cached", [False, True], ids=["whole model", "prefix cache"])
@pytest.mark.parametrize(
    "case",
    [
        case if case in IN_EVERY_RUN else pytest.param(case, marks=pytest.mark.full)
        for case in CASES
    ],
)
def test_a_record_moves_the_sum_by_the_clip_norm_under_an_adapter_that_amplifies(
    tmp_path: Path, case: str, cached: bool, precision: Precision
) -> None:
    found = measured(tmp_path, case, cached=cached, precision=precision)
    assert found.after <= 1 + CLIPPING
    # In bfloat16, padding changes hardly any bit of so small a model. On MiniLM the attack fails.
    if precision == "float32" and case != "minilm":
        assert found.before > 5
