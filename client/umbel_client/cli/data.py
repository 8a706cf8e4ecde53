"""`umbel-client data check|split|stats`: a site's own records, without a federation.

Torch and Transformers are imported inside the commands: other commands should not wait for them.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from umbel_client.cli.options import CLIENT_TOML, Json
from umbel_client.site.config import ClientConfig, DataConfig, load_local_config
from umbel_common.errors import DataError, PlanError
from umbel_common.plans.alike import seen, shown
from umbel_common.plans.plan_file import plan_from_json, task_text
from umbel_host.files.output import require_new
from umbel_host.files.text_file import read_text
from umbel_host.terminal import Screen, bar, print_json, print_lines, say

if TYPE_CHECKING:
    from umbel_client.curation.report import Cut, DataReport, Spread


data = typer.Typer(
    help="Look at this site's own records: check, split, stats. These commands print counts, labels"
    " and row numbers, never a text; all of it is as private as the records. They do not look for"
    " names or numbers of persons.",
    no_args_is_help=True,
)

Config = Annotated[
    Path | None,
    typer.Option(help="This site's client.toml; default: the one in this folder, if there is one."),
]
File = Annotated[Path | None, typer.Argument(help="Records; default: data.path of client.toml.")]
Model = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the base model, whose tokenizer counts tokens; default: model.path of"
        " client.toml."
    ),
]
Unit = Annotated[
    str | None,
    typer.Option(
        "--unit", help="Column that says to which unit, such as a patient, a record belongs."
    ),
]
_MOST_ERRORS = 100
_SHOWN = 10


@data.command()
def check(
    file: File = None,
    plan: Annotated[Path | None, typer.Option(help="A plan that the records must fit.")] = None,
    model: Model = None,
    unit: Unit = None,
    every: Annotated[
        bool, typer.Option("--all", help=f"Name every row that is wrong, up to {_MOST_ERRORS}.")
    ] = False,
    config: Config = None,
) -> None:
    """Check that every row is a record and, if you give a plan, that none is too long for it."""
    from umbel_client.curation.examples import read_examples, row_errors
    from umbel_client.curation.lengths import count_tokens, require_fit
    from umbel_client.curation.report import report

    site = _Site(config, file, unit)
    agreed = None if plan is None else plan_from_json(read_text(plan, PlanError), plan)[0]
    task = None if agreed is None else agreed.task
    if every:
        errors = row_errors(site.file, site.data, task, site.labels)
        _refuse_rows(site.file, islice(errors, _MOST_ERRORS))
    examples = read_examples(site.file, site.data, task, site.labels)
    folder = model or site.model
    lines = [] if agreed is None else [("plan", f"{agreed.job}: {task_text(agreed.task)}")]
    lengths = None
    if task is not None and folder is not None:
        lengths = count_tokens(examples, folder, task)
        cut = require_fit(examples, lengths, folder, task)
        lines.append(("too long", f"{_records(cut)} cut after {task.max_tokens} tokens"))
    elif task is not None:
        lines.append(("too long", "not counted: give --model, or a client.toml"))
    found = report(examples, lengths, data=site.data, public_size=site.public_size)
    most = site.data.max_records_per_unit
    past = _past(examples.units, most)
    if past:
        lines.append(("left out", f"{_records(past)} past {most} of a unit"))
    print_lines(Screen(), [*_lines(found), *lines, ("", "every row is a record")])


@data.command()
def stats(
    file: File = None,
    model: Model = None,
    unit: Unit = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Count records, units, labels, tokens, and the records that a plan's max_tokens would cut."""
    from umbel_client.curation.examples import read_examples
    from umbel_client.curation.lengths import count_tokens
    from umbel_client.curation.report import report

    site = _Site(config, file, unit)
    folder, lengths = model or site.model, None
    with bar() as shown_bar:
        shown_bar.stage("reading records")
        examples = read_examples(site.file, site.data, None, site.labels)
        if folder is not None:
            follow = shown_bar.follow("counting tokens")
            lengths = count_tokens(examples, folder, on_progress=follow)
        shown_bar.stage("looking for repeated records")
        found = report(examples, lengths, data=site.data, public_size=site.public_size)
    if as_json:
        print_json(found)
        return
    cuts = [_cut_line(cut) for cut in found.cuts or ()]
    print_lines(Screen(), [*_lines(found), *cuts])


@data.command()
def split(
    out: Annotated[Path, typer.Option(help="The new folder; only its owner can read it.")],
    by: Annotated[
        str,
        typer.Option(
            help="`record`, or the column that names the units: then no unit is in two parts."
        ),
    ],
    file: File = None,
    shares: Annotated[
        str,
        typer.Option(
            help="Shares of train, validation and test, with sum 1; 0 makes no such file."
        ),
    ] = "0.8,0.1,0.1",
    repeated: Annotated[
        Literal["together", "leave-out"],
        typer.Option(
            help="What to do with records that are the same: put them all into one part, with"
            " all of their units; or leave them out of validation and test if an earlier part has"
            " them."
        ),
    ] = "together",
    seed: Annotated[int, typer.Option(help="Decides which record is where.")] = 0,
    config: Config = None,
) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl, with no record in two of them."""
    from umbel_client.curation.examples import read_examples
    from umbel_client.curation.split import PARTS, split_examples, write_parts

    require_new(out)
    site = _Site(config, file, None if by == "record" else by)
    wanted = _shares(shares)
    if by == "record":
        site.data = msgspec.structs.replace(site.data, unit_column=None)
    examples = read_examples(site.file, site.data, None, site.labels)
    found = split_examples(examples, wanted, seed, leave_out=repeated == "leave-out")
    write_parts(out, examples, found.parts)
    units = examples.units
    lines = []
    for name, part in zip(PARTS, found.parts, strict=True):
        of_units = f", {len({units[row] for row in part}):,} units" if by != "record" else ""
        share = 100 * len(part) / len(examples)
        lines.append((name, f"{_records(len(part))}{of_units}, {share:.1f} %"))
    largest = max(map(len, found.groups))
    kept = f"{len(found.groups):,} that stay together, the largest of {_records(largest)}"
    lines.append(("groups", kept))
    if found.left_out:
        lines.append(("left out", f"{_records(found.left_out)} that an earlier part has"))
    print_lines(Screen(), [*lines, ("folder", str(out))])
    joined = len(found.groups) < len(set(units))
    if joined and largest > len(examples) * min(filter(None, wanted)):
        say("\nRepeated records make groups too large for these shares: see --repeated leave-out.")


class _Site:
    """What the command line and client.toml say."""

    def __init__(self, config: Path | None, file: Path | None, unit: str | None) -> None:
        settings: ClientConfig | None = None
        # Without both, the error names the file that would say where the records are.
        if config is not None or CLIENT_TOML.exists() or file is None:
            settings = load_local_config(config or CLIENT_TOML)
        found = settings.data if settings else DataConfig(path=str(file), public_size=1)
        self.data = found if unit is None else msgspec.structs.replace(found, unit_column=unit)
        self.file = file or Path(found.path)
        self.labels = settings.policy.labels if settings else ()
        # It is about the site's own records, not about another file that is looked at here.
        own = settings is not None and self.file.resolve() == Path(found.path).resolve()
        self.public_size = found.public_size if own else None
        self.model = Path(settings.model.path) if settings else None


def _refuse_rows(path: Path, errors: Iterable[DataError]) -> None:
    count = 0
    for error in errors:
        count += 1
        wanted = "" if error.accepted is None else f"; accepted: {error.accepted}"
        say(f"{error.message} ({error.field}): found {error.found}{wanted}", err=True)
    if count:
        more = " or more" if count == _MOST_ERRORS else ""
        raise DataError(f"rows of a data file are no records: {count}{more}", file=path)


def _shares(text: str) -> list[float]:
    try:
        found = [float(share) for share in text.split(",")]
    except ValueError:
        found = []
    right = len(found) == 3 and all(0 <= share <= 1 for share in found)
    if not right or abs(sum(found) - 1) > 1e-6:
        raise typer.BadParameter("three numbers with sum 1, as 0.8,0.1,0.1", param_hint="--shares")
    return found


def _past(units: list[int], most: int) -> int:
    return sum(max(0, count - most) for count in Counter(units).values())


def _lines(found: "DataReport") -> list[tuple[str, str]]:
    lines = [("file", found.file), ("format", found.format), ("records", f"{found.records:,}")]
    if found.units is not None and found.records_per_unit is not None:
        each = _spread(found.records_per_unit)
        lines.append(("units", f"{found.units:,}; records of each: {each}"))
    if found.labels is not None:
        counted = list(found.labels.items())
        names = ", ".join(f"{_name(name)} {count:,}" for name, count in counted[:_SHOWN])
        lines.append(("labels", names + _more(len(counted))))
    if found.tokens is not None:
        lines.append(("tokens", _spread(found.tokens)))
    lines.append(("repeated", _rows(found.repeated_rows)))
    if found.shared_by_units:
        lines.append(("", f"{found.shared_by_units:,} units have a record that another has too"))
    if found.contradictory_rows:
        lines.append(("", f"with another label: {_rows(found.contradictory_rows)}"))
    if found.alike_rows:
        alike = f"{_rows(found.alike_rows)}, but for case, width or form of characters"
        lines.append(("alike", alike))
    return lines + [
        ("look" if number == 0 else "", text) for number, text in enumerate(found.remarks)
    ]


def _name(label: str) -> str:
    """A label between quotes, if nobody could see what it is without them."""
    return label if seen(label) == label else shown(label)


def _cut_line(cut: "Cut") -> tuple[str, str]:
    lost = "" if not cut.unanswered else f", {cut.unanswered:,} of them to no answer"
    return f"at {cut.max_tokens}", f"{_records(cut.longer)} cut{lost}"


def _rows(rows: list[int]) -> str:
    if not rows:
        return "no record"
    shown = ", ".join(map(str, rows[:_SHOWN]))
    return f"{_records(len(rows))}: row{'s' if len(rows) > 1 else ''} {shown}{_more(len(rows))}"


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""


def _records(count: int) -> str:
    return f"{count:,} record{'' if count == 1 else 's'}"


def _spread(spread: "Spread") -> str:
    return (
        f"{spread.least:,} to {spread.most:,}, median {spread.median:,},"
        f" 95 % up to {spread.percentile_95:,}"
    )
