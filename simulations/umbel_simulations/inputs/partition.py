"""Divides one training set among the sites, and writes the part of each site."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
from numpy.typing import NDArray

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
    if sites.partition == "iid":
        parts = _iid(len(examples), sites, generator)
    elif sites.partition == "dirichlet":
        parts = _dirichlet(examples, sites, generator)
    else:
        parts = _by_group(examples, sites)
    for site, part in zip(sites.all_names, parts, strict=True):
        if len(part) < sites.minimum_records:
            raise _too_few(site, len(part), sites)
    return {
        site: [examples[index] for index in sorted(part)]
        for site, part in zip(sites.all_names, parts, strict=True)
    }


def write_site_data(
    folder: Path, examples: Sequence[Example], run: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes `data.jsonl` into a folder, one JSON object a line.

    An object has `text` and `label`, or `prompt` and `completion` for a language model.

    Args:
        run: further columns of the first record.
    """
    rows = [
        {"prompt": example.text, "completion": example.answer}
        if example.answer
        else {"text": example.text, "label": example.label}
        for example in examples
    ]
    rows[:1] = [{**row, **run} for row in rows[:1]]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "data.jsonl", b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


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
