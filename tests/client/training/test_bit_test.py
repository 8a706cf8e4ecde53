"""A record's bits in any company: what mixes records by one bit is found, and is not used."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_models import plan_for, save_decoder

from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.tasks.shapes import PADDED_LENGTHS, BatchLimit, padded_lengths
from umbel_client.training import bit_test
from umbel_client.training import self_test as whole_test
from umbel_client.training.bit_test import check_round, prove_shapes
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification, Task

CLASSIFICATION = Classification(labels=("a", "b", "c"), max_tokens=40)


def loaded(folder: Path, task: Task = CLASSIFICATION, **lora: object) -> AdaptedModel:
    model = AdaptedModel.load(folder, plan_for(folder, task, dict(lora)))
    random = np.random.default_rng(3)
    model.set_vector(random.normal(0, 0.3, model.plan.lora.size).astype(np.float32))
    model.select(1)
    return model


def first_layer(model: AdaptedModel) -> torch.nn.Module:
    layer: torch.nn.Module = model.base.encoder.layer[0]  # type: ignore[union-attr, index]  # BERT
    return layer


@pytest.mark.parametrize("layers", [None, (1,)], ids=["whole model", "prefix cache"])
@pytest.mark.parametrize("most", [1, 6, 23, 64])
def test_a_sound_model_is_used_in_its_largest_shape_at_least(
    tiny_model: Path, layers: tuple[int, ...] | None, most: int
) -> None:
    """On some processors one row alone goes through another kernel."""
    model, limit = loaded(tiny_model, layers=layers), BatchLimit(most)
    prove_shapes(model, limit, entropy=os.urandom)
    check_round(model, limit, entropy=os.urandom)
    assert set(limit.choices) <= {1, 2, 4, 8, 16, 32, most}
    assert limit.records == most


def test_a_sound_language_model_is_used_in_its_largest_shape_at_least(tmp_path: Path) -> None:
    limit = BatchLimit(4)
    prove_shapes(
        loaded(save_decoder(tmp_path / "m"), CausalLm(max_tokens=40)), limit, entropy=os.urandom
    )
    assert limit.records in limit.choices


@pytest.mark.parametrize("layers", [None, (1,)], ids=["whole model", "prefix cache"])
def test_a_layer_that_takes_rounding_from_other_records_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...] | None
) -> None:
    """A tolerance, as the comparison with a record alone has, does not find it."""
    model = loaded(tiny_model, layers=layers)
    first_layer(model).register_forward_hook(
        lambda _layer, _inputs, output: output + 1e-6 * output.mean(0, keepdim=True)
    )
    with pytest.raises(ModelError, match="bits depend on the records beside it"):
        whole_test.self_test(model, 1.0, BatchLimit(4), entropy=os.urandom)
    with pytest.raises(ModelError, match="bits depend on the records beside it"):
        check_round(model, BatchLimit(4), entropy=os.urandom)
    monkeypatch.setattr(whole_test, "prove_shapes", lambda *_, **__: None)
    whole_test.self_test(model, 1.0, BatchLimit(4), entropy=os.urandom)


@pytest.mark.parametrize("most", [2, 3, 4, 5, 6])
def test_an_adapter_under_which_a_row_has_other_bits_is_refused(
    tiny_model: Path, most: int
) -> None:
    """In few rows, too, no record may come back to the row that it had before."""
    model, length = loaded(tiny_model), 40

    def last_row(_layer: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        if output.shape[:2] != (most, length):
            return output
        return torch.cat([output[:-1], output[-1:] * (1 + 1e-6)])

    first_layer(model).register_forward_hook(last_row)
    with pytest.raises(ModelError, match="bits depend on the records beside it"):
        check_round(model, BatchLimit(most), entropy=os.urandom)


@pytest.mark.parametrize("count", [4, 8])
def test_each_record_is_compared_with_itself_in_another_row_beside_others(count: int) -> None:
    for rows in range(2, 129):
        for at_once in {rows if rows < count else rows // 2, max(1, rows // 2)}:
            former = bit_test._arranged(rows, count, at_once)
            moved = bit_test._moved(rows, count, at_once)
            for one, other in ((former, moved), (moved, former)):
                assert sorted(index for group, _ in one for index in group) == list(range(count))
                assert all(len(set(places) & set(range(rows))) == len(g) for g, places in one)
                assert not bit_test._rows_of(one) & bit_test._rows_of(other)
            alone = [{(i, *sorted(g)) for g, _ in one for i in g} for one in (former, moved)]
            # Where a group fills all rows, no others are there: another group has to be.
            assert all(len(group) < rows for group, _ in moved) or not alone[0] & alone[1]


@pytest.mark.parametrize("test", [prove_shapes, check_round])
def test_a_path_that_is_taken_where_no_row_has_padding_is_found(
    tiny_model: Path, test: Callable[..., None]
) -> None:
    model, full = loaded(tiny_model), False

    def look(_base: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal full
        full = bool(kwargs["attention_mask"].all())

    model.base.register_forward_pre_hook(look, with_kwargs=True)
    first_layer(model).register_forward_hook(
        lambda _layer, _inputs, output: output * (1 + 1e-6) if full else output
    )
    with pytest.raises(ModelError, match="bits depend on the records beside it"):
        test(model, BatchLimit(4), entropy=os.urandom)


def test_a_number_of_rows_with_other_bits_is_not_used(tiny_model: Path) -> None:
    model, limit = loaded(tiny_model), BatchLimit(8)

    def other_kernel(_layer: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        # One row alone has, too, a kernel of its own on some processors.
        return output * (1 + 1e-6) if len(output) in (1, 4) else output

    first_layer(model).register_forward_hook(other_kernel)
    prove_shapes(model, limit, entropy=os.urandom)
    assert limit.choices == (2, 8)
    assert [limit.rows(records) for records in (1, 2, 3, 8)] == [2, 2, 8, 8]
    check_round(model, limit, entropy=os.urandom)
    # After memory ran out, too, only what was proven is used.
    assert limit.smaller(7) == 2
    limit.lower(2)
    assert limit.choices == (2,)


def test_a_kernel_that_differs_on_some_records_is_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding hides the difference for the others."""
    model = loaded(tiny_model)

    def other_kernel(_layer: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        some = (1000 * output[:, :1, :1] % 1 < 0.3).to(output.dtype)
        return output * (1 + 1e-6 * some) if len(output) == 1 else output

    first_layer(model).register_forward_hook(other_kernel)
    limit = BatchLimit(8)
    prove_shapes(model, limit, entropy=bytes)
    assert 1 not in limit.choices
    # One record says nothing of the others.
    monkeypatch.setattr(bit_test, "_AT_THE_START", 1)
    found = set()
    for seed in range(8):
        limit = BatchLimit(8)
        prove_shapes(model, limit, entropy=lambda size, seed=seed: bytes([seed]) * size)
        found.add(1 in limit.choices)
    assert found == {False, True}


def test_a_number_of_rows_that_differs_under_a_rounds_adapter_is_not_used_any_more(
    tiny_model: Path,
) -> None:
    """Under the adapter of the start, its bits were the same by chance."""
    model, limit = loaded(tiny_model), BatchLimit(8)
    start = model.vector()

    def other_kernel(_layer: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        shows = len(output) == 2 and not np.array_equal(model.vector(), start)
        return output * (1 + 1e-6) if shows else output

    first_layer(model).register_forward_hook(other_kernel)
    prove_shapes(model, limit, entropy=os.urandom)
    before = set(limit.choices)
    assert 2 in before
    check_round(model, limit, entropy=os.urandom)
    assert set(limit.choices) == before
    model.set_vector(2 * start)
    check_round(model, limit, entropy=os.urandom)
    assert 2 not in limit.choices
    assert limit.records in limit.choices


def test_what_is_kept_of_frozen_layers_comes_from_one_shape(tiny_model: Path) -> None:
    limit = BatchLimit(8)
    assert limit.largest().choices == (8,)
    assert limit.choices == (1, 2, 4, 8)


def test_rows_that_fill_a_shape_add_nothing(tiny_model: Path) -> None:
    """Two records in eight rows give the bits of two records in two."""
    model, limit = loaded(tiny_model), BatchLimit(8)
    limit.keep([])
    assert limit.choices == (8,)
    assert limit.rows(2) == 8
    prove_shapes(model, limit, entropy=os.urandom)
    assert limit.choices == (8,)


def test_a_records_padded_length_follows_from_its_own_length() -> None:
    lengths = np.arange(2000)
    padded = padded_lengths(lengths, None)
    assert (padded >= lengths).all()
    # Half as much again is the most, and it rises with the length.
    assert (padded[17:] < 1.5 * lengths[17:]).all()
    assert (np.diff(padded) >= 0).all()
    assert set(padded) <= set(PADDED_LENGTHS.tolist())
    assert padded_lengths(np.array([1, 39, 40]), 40).tolist() == [16, 40, 40]
    for length in (0, 5, 70):
        alone = padded_lengths(np.array([length]), 100)[0]
        assert padded_lengths(np.array([3, length, 100]), 100)[1] == alone
