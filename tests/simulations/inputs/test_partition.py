"""Partitions are complete, repeatable, as skewed as requested, and have no empty site."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel_client.data.records import load_records
from umbel_common.errors import DataError
from umbel_common.plans.plan import Classification
from umbel_simulations.inputs.partition import partition, write_site_data
from umbel_simulations.inputs.sources import Example
from umbel_simulations.scenario.scenario import Sites

LABELS = ("eye", "heart", "lung")
EXAMPLES = [
    Example(text=f"text {number}", label=LABELS[number % 3], group=f"ward {number % 7}")
    for number in range(600)
]


def digest(parts: dict[str, list[Example]]) -> str:
    """A digest of which site has which records."""
    text = json.dumps({site: [example.text for example in part] for site, part in parts.items()})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def skew(parts: dict[str, list[Example]]) -> float:
    """Share of the most common label at a site, averaged over the sites."""
    return sum(
        max(Counter(example.label for example in part).values()) / len(part)
        for part in parts.values()
    ) / len(parts)


@given(
    count=st.integers(2, 7),
    kind=st.sampled_from(["iid", "dirichlet", "column"]),
    seed=st.integers(0, 2**53 - 1),
)
def test_every_example_is_at_exactly_one_site(count: int, kind: str, seed: int) -> None:
    column = "ward" if kind == "column" else None
    sites = msgspec.convert({"count": count, "partition": kind, "column": column}, Sites)
    parts = partition(EXAMPLES, sites, seed)
    assert tuple(parts) == sites.all_names
    texts = [example.text for part in parts.values() for example in part]
    assert sorted(texts) == sorted(example.text for example in EXAMPLES)


@pytest.mark.parametrize(
    ("kind", "expected"), [("iid", "01a99e13e9b1a785"), ("dirichlet", "c091276aa543891e")]
)
def test_a_seed_gives_the_same_partition_everywhere(kind: str, expected: str) -> None:
    sites = msgspec.convert({"count": 4, "partition": kind}, Sites)
    assert digest(partition(EXAMPLES, sites, 7)) == expected
    assert digest(partition(EXAMPLES, sites, 8)) != expected


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "column"])
def test_a_units_records_are_at_one_site(kind: str) -> None:
    examples = [
        msgspec.structs.replace(example, unit=f"p{number // 5}")
        for number, example in enumerate(EXAMPLES)
    ]
    column = "ward" if kind == "column" else None
    sites = msgspec.convert({"count": 4, "partition": kind, "column": column}, Sites)
    parts = partition(examples, sites, 7)
    units = [{example.unit for example in part} for part in parts.values()]
    assert sum(map(len, units)) == len(set().union(*units)) == 120
    assert sum(map(len, parts.values())) == 600


def test_iid_sites_have_equal_sizes_and_all_labels() -> None:
    parts = partition(EXAMPLES, Sites(count=4, partition="iid"), 7)
    assert {len(part) for part in parts.values()} == {150}
    assert skew(parts) < 0.45


def test_a_smaller_alpha_makes_sites_more_different() -> None:
    apart = partition(EXAMPLES, Sites(count=4, alpha=0.1), 7)
    alike = partition(EXAMPLES, Sites(count=4, alpha=1000.0), 7)
    assert skew(alike) < 0.4 < 0.6 < skew(apart)


def test_dirichlet_draws_again_until_every_site_has_enough() -> None:
    free = partition(EXAMPLES, Sites(count=6, alpha=0.1), 3)
    held = partition(EXAMPLES, Sites(count=6, alpha=0.1, minimum_records=50), 3)
    assert min(map(len, free.values())) < 50 <= min(map(len, held.values()))


def test_a_column_keeps_each_of_its_values_at_one_site() -> None:
    parts = partition(EXAMPLES, Sites(count=3, partition="column", column="ward"), 7)
    homes: dict[str, set[str]] = {}
    for site, part in parts.items():
        for example in part:
            homes.setdefault(example.group, set()).add(site)
    assert all(len(sites) == 1 for sites in homes.values())
    # Seven wards of 85 or 86 records at three sites: 3, 2 and 2 wards.
    assert sorted(len(part) // 85 for part in parts.values()) == [2, 2, 3]


@pytest.mark.parametrize(
    "sites",
    [
        Sites(count=8, partition="column", column="ward"),
        Sites(count=4, partition="iid", minimum_records=151),
        Sites(count=4, partition="dirichlet", minimum_records=151),
    ],
)
def test_a_site_with_too_few_records_is_an_error_that_names_it(sites: Sites) -> None:
    with pytest.raises(DataError) as caught:
        partition(EXAMPLES, sites, 7)
    assert caught.value.message.startswith("hospital-")
    assert str(sites.minimum_records) in str(caught.value.accepted)


def test_what_is_written_for_a_site_is_what_its_client_reads(tmp_path: Path) -> None:
    examples = [Example(text='Ötitis\n"media" </p>', label="ear"), Example(text="b", label="eye")]
    tmp_path /= "a folder that is not there yet"
    write_site_data(tmp_path, examples)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    records = load_records(tmp_path / "data.jsonl", Classification(labels=("ear", "eye")))
    assert records.texts == [example.text for example in examples]
    assert records.labels == [0, 1]
