import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel_client.data.units import Units

#                       0  1  2  3  4  5  6
UNITS = Units(np.array([0, 1, 0, 2, 1, 0, 3]))


def test_units_are_counted_and_know_their_records() -> None:
    assert len(UNITS) == 4
    assert UNITS.records_of(np.array([2, 0])).tolist() == [0, 2, 3, 5]
    assert UNITS.records_of(np.array([], dtype=np.int64)).tolist() == []


def test_a_part_numbers_its_own_units_from_zero() -> None:
    assert UNITS.numbered(np.array([4, 3, 1])).tolist() == [0, 1, 0]


def test_a_unit_larger_than_a_part_is_a_part_of_its_own() -> None:
    parts = [part.tolist() for part in UNITS.whole(np.arange(7), 2)]
    assert parts == [[0, 2, 5], [1, 4], [3, 6]]


@given(
    owners=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    size=st.integers(1, 10),
    seed=st.integers(0, 100),
)
def test_every_record_is_in_one_part_and_every_unit_too(
    owners: list[int], size: int, seed: int
) -> None:
    units = Units(np.array(owners))
    order = np.random.default_rng(seed).permutation(len(owners))
    parts = list(units.whole(order, size))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(owners)))
    owned = [set(units.of_record[part].tolist()) for part in parts]
    assert sum(map(len, owned)) == len(set(owners))
    for part, own in zip(parts, owned, strict=True):
        assert len(part) <= size or len(own) == 1


@pytest.mark.parametrize("records", [[6], [6, 0, 2, 5]])
def test_a_part_of_whole_units_may_leave_others_out(records: list[int]) -> None:
    parts = list(UNITS.whole(np.array(records), 10))
    assert [sorted(part.tolist()) for part in parts] == [sorted(records)]
