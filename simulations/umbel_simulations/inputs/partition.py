"""Divides one training set among the sites, and writes the part of each site."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
from numpy.typing import NDArray

from umbel_client.data.conversations import Turn
from umbel_common.errors import DataError
from umbel_simulations.inputs.sources import Example
from umbel_simulations.scenario.run_folder import write
from umbel_simulations.scenario.scenario import Sites

DRAWS = 1000
"""The most Dirichlet partitions that are drawn to find one where every site has enough records."""


def partition(examples: Sequence[Example], sites: Sites, seed: int) -> dict[str, list[Example]]:
    """Gives every example to exactly one site. The same seed gives the same partition.

    Args:
        examples: the training set; a partition by column divides it by `group`.
        sites: how many there are, and how they differ.
        seed: public seed of the partition.

    Raises:
        DataError: a site would have fewer than `minimum_records`.
    """
    generator = np.random.default_rng(seed)
    # A unit's records stay together, where units are known.
    units = _units(examples, by_site=sites.partition == "files")
    first = [examples[unit[0]] for unit in units]
    if sites.partition == "iid":
        dealt = _iid(len(first), sites, generator)
    elif sites.partition == "dirichlet":
        dealt = _dirichlet(first, sites, generator)
    elif sites.partition == "files":
        dealt = [
            [index for index, example in enumerate(first) if example.group == site]
            for site in sites.all_names
        ]
    else:
        dealt = _by_group(first, sites)
    parts = [[index for unit in part for index in units[unit]] for part in dealt]
    for site, part in zip(sites.all_names, parts, strict=True):
        if len(part) < sites.minimum_records:
            raise _too_few(site, len(part), sites)
    return {
        site: [examples[index] for index in sorted(part)]
        for site, part in zip(sites.all_names, parts, strict=True)
    }


def _units(examples: Sequence[Example], *, by_site: bool) -> list[list[int]]:
    """The records of each unit.

    Args:
        by_site: a group is a site, and a name may be that of another unit at another site.
    """
    units: dict[object, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        site = example.group if by_site else ""
        units[(site, example.unit) if example.unit else index].append(index)
    return list(units.values())


def unit_count(examples: Sequence[Example]) -> int:
    """Number of units of one site's records; where units are not known, each record is one."""
    return len({example.unit or index for index, example in enumerate(examples)})


def write_site_data(
    folder: Path, examples: Sequence[Example], run: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes `data.jsonl` into a folder; see `site_data`.

    Args:
        run: further columns of the first record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "data.jsonl", site_data(examples, run))


def site_rows(examples: Sequence[Example]) -> list[dict[str, object]]:
    """Each record as a row of a site's file; all rows are of one format."""
    rows = [_row(example) for example in examples]
    if any("messages" in row for row in rows):
        rows = [_as_messages(example) for example in examples]
    return rows


def site_data(examples: Sequence[Example], run: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """A file of records, one JSON object a line.

    An object has `text` and `label`; for a language model `prompt` and `completion`, `messages`, or
    `text` alone; and `unit`, if it is known.
    """
    rows = site_rows(examples)
    for row, example in zip(rows, examples, strict=True):
        if example.unit:
            row["unit"] = example.unit
    rows[:1] = [{**row, **run} for row in rows[:1]]
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def _row(example: Example) -> dict[str, object]:
    if example.turns:
        return _as_messages(example)
    if example.answer:
        return {"prompt": example.text, "completion": example.answer}
    return {"text": example.text, **({"label": example.label} if example.label else {})}


def _as_messages(example: Example) -> dict[str, object]:
    pair = (Turn("user", example.text), Turn("assistant", example.answer))
    return {"messages": msgspec.to_builtins(example.turns or pair)}


def _iid(size: int, sites: Sites, generator: np.random.Generator) -> list[list[int]]:
    order = generator.permutation(size)
    return [part.tolist() for part in np.array_split(order, sites.count)]


def _dirichlet(
    examples: Sequence[Example], sites: Sites, generator: np.random.Generator
) -> list[list[int]]:
    """Draws until every site has enough records, as Li et al. (2022, section 4.1) do."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_label[example.label].append(index)
    labels = [np.array(by_label[label]) for label in sorted(by_label)]
    parts: list[list[int]] = []
    for _ in range(DRAWS):
        parts = [[] for _ in range(sites.count)]
        for indices in labels:
            for part, share in zip(parts, _shares(indices, sites, generator), strict=True):
                part.extend(share.tolist())
        if min(map(len, parts)) >= sites.minimum_records:
            break
    return parts


def _shares(
    indices: NDArray[np.int64], sites: Sites, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    shuffled = generator.permutation(indices)
    shares = generator.dirichlet(np.full(sites.count, sites.alpha))
    cuts = np.rint(np.cumsum(shares)[:-1] * len(shuffled)).astype(np.int64)
    return np.split(shuffled, cuts)


def _by_group(examples: Sequence[Example], sites: Sites) -> list[list[int]]:
    """Gives each group as a whole to one site: the largest first, to the site with the fewest."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.group].append(index)
    parts: list[list[int]] = [[] for _ in range(sites.count)]
    emptiest = [(0, site) for site in range(sites.count)]
    for group in sorted(groups, key=lambda name: (-len(groups[name]), name)):
        size, site = heapq.heappop(emptiest)
        parts[site].extend(groups[group])
        heapq.heappush(emptiest, (size + len(groups[group]), site))
    return parts


def _too_few(site: str, records: int, sites: Sites) -> DataError:
    return DataError(
        f"{site} would have too few records",
        field="sites",
        found=f'{records} records with partition = "{sites.partition}"',
        accepted=f"at least sites.minimum_records = {sites.minimum_records}",
        remedy="take fewer sites, more records, a smaller minimum_records or a larger alpha",
    )
