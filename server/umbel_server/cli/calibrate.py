"""`umbel-server calibrate`: propose the numbers of a draft, and say what epsilon buys."""

import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from umbel_common.errors import ConfigError, IdentityError
from umbel_common.plans.requests import Bought, Calibration, CalibrationRequest, TuningRequest
from umbel_common.trust import identity
from umbel_host.files.output import require_new_file
from umbel_host.files.text_file import write_new_text
from umbel_host.installation import install
from umbel_host.processes.supervisor import belong_to_parent, our_module
from umbel_host.terminal import Screen, print_json, print_lines, table
from umbel_server.cli.options import SERVER_TOML, Config, Json
from umbel_server.cli.plan import python_for
from umbel_server.operator.config import load_config, load_roster


def calibrate(
    draft: Annotated[
        Path,
        typer.Argument(
            help="The draft of a plan, a TOML file; training, privacy, aggregation and server may"
            " be left out."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new draft, in the same folder.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="A file with PUBLIC records of the plan's task, to search learning rates with."
        ),
    ] = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="An epsilon to compare; may be repeated. Default: 1, 3 and 8."),
    ] = None,
    public_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="Public size of a site, instead of the roster's; may be repeated.",
        ),
    ] = None,
    sites: Annotated[
        int | None,
        typer.Option(min=2, max=100, help="Number of sites, without a roster; with --records."),
    ] = None,
    records: Annotated[
        int | None,
        typer.Option(min=1, help="Records of all these sites together, divided equally."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="local or distributed. Default: by the rules."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=10_000, help="Number of rounds.")] = None,
    colluding: Annotated[
        int,
        typer.Option(
            min=0,
            max=99,
            help="How many sites each site assumes to collude (colluding_sites in its policy).",
        ),
    ] = 1,
    dropouts: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=99,
            help="How many sites a sum may lack. Default: one in five, and one at least.",
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of trials of the search with --data.")
    ] = 8,
    text_column: Annotated[str, typer.Option(help="Column with the texts.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the labels.")] = "label",
    config: Config = SERVER_TOML,
    as_json: Json = False,
) -> None:
    """Propose mode, rounds, batch, noise and learning rates for a draft.

    The sites' sizes come from the roster, or from options. A table says what each epsilon buys
    in each mode. With --data, learning rates are searched on PUBLIC records under the noise of the
    proposed plan; otherwise they follow the rules of docs/operator.md. No private record is read.
    """
    require_new_file(out)
    if out.absolute().parent != draft.absolute().parent:
        raise ConfigError(
            "a draft's relative paths start at its folder, so the new one belongs there too",
            field="--out",
            found=out,
            accepted=f"a file in {draft.absolute().parent}",
        )
    fields = {
        "draft": str(draft.absolute()),
        "sizes": _sizes(config, public_size or [], sites, records),
        "colluding": colluding,
        "dropouts": dropouts,
        "mode": mode,
        "rounds": rounds,
        **({"epsilons": epsilon} if epsilon else {}),
    }
    try:
        request = msgspec.convert(fields, CalibrationRequest)
    except msgspec.ValidationError as error:
        raise typer.BadParameter(str(error).replace("`$.", "`")) from None
    found = _proposed(python_for(config), request)
    console = Screen()
    if not as_json:
        _show(console, found)
    searched = data is not None and _can_search()
    if data is not None and searched:
        _search(found, data, out, trials, text_column, label_column, quiet=as_json)
    else:
        write_new_text(out, found.draft)
    if as_json:
        document = msgspec.to_builtins(found)
        print_json({**document, "draft": str(out), "searched": searched})
        return
    if data is not None and not searched:
        console.print(
            "\nLearning rates are those of the rules: the search on public records needs packages"
            f"\nthat are not installed here ({install('server', 'tune')}).",
            soft_wrap=True,
        )
    console.print(f"\ndraft: {out}", soft_wrap=True)


def _sizes(
    config: Path, given: list[str], sites: int | None, records: int | None
) -> tuple[int, ...]:
    """The public size of each site.

    Raises:
        ConfigError, IdentityError: a site is unknown, or has no size.
    """
    if sites is not None or records is not None:
        if sites is None or records is None or given:
            raise typer.BadParameter("give --sites and --records together, without --public-size")
        if records < sites:
            raise typer.BadParameter("--records is less than --sites")
        return tuple(records // sites + (number < records % sites) for number in range(sites))
    document = load_roster(load_config(config))
    dead = document.revoked()
    members = [one for one in document.roster.members if one.public_key not in dead]
    named = dict(_size(text) for text in given)
    unknown = sorted(named.keys() - {member.name for member in members})
    if unknown:
        raise IdentityError(
            "a site is not in the roster",
            field="--public-size",
            found=unknown[0],
            accepted=", ".join(member.name for member in members) or "nobody: no site was added",
        )
    sizes = {
        member.name: named.get(member.name, identity.public_size(member)) for member in members
    }
    missing = [name for name, size in sizes.items() if size is None]
    if missing or not sizes:
        raise ConfigError(
            "the public sizes of sites are missing",
            field="public_size",
            found=", ".join(missing) or "no site in the roster",
            remedy="ask the site's people, then: umbel-server sites size NAME --public-size N; or"
            " give --public-size NAME=N here, or --sites K --records N without a roster",
        )
    return tuple(size for size in sizes.values() if size is not None)


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.isdecimal() or not 0 < int(number) <= 10**9:
        raise typer.BadParameter(f"{text}: give NAME=N, such as hospital-a=5000")
    return name, int(number)


def _proposed(python: str, request: CalibrationRequest) -> Calibration:
    """What the process that proposes numbers answers; it prints its own errors."""
    done = subprocess.run(  # noqa: S603  # the operator's own Python
        our_module("umbel_client.calibrating", python=python),
        input=msgspec.json.encode(request),
        stdout=subprocess.PIPE,
        check=False,
        preexec_fn=belong_to_parent,
    )
    if done.returncode:
        raise typer.Exit(done.returncode)
    return msgspec.json.decode(done.stdout, type=Calibration)


def _can_search() -> bool:
    return all(find_spec(name) is not None for name in ("torch", "optuna", "tomlkit"))


def _search(
    found: Calibration,
    data: Path,
    out: Path,
    trials: int,
    text_column: str,
    label_column: str,
    *,
    quiet: bool,
) -> None:
    """Searches learning rates for the proposed draft, and writes the draft with the best ones."""
    folder = out.absolute().parent
    with (
        tempfile.TemporaryDirectory() as studies,
        # Relative paths of a draft start at its folder.
        tempfile.NamedTemporaryFile("w", dir=folder, prefix=".draft-", suffix=".toml") as file,
    ):
        file.write(found.draft)
        file.flush()
        request = TuningRequest(
            draft=file.name,
            data=str(data.absolute()),
            out=str(out.absolute()),
            study=str(Path(studies) / "study.sqlite"),
            trials=trials,
            public_size=max(1, found.records // found.sites),
            sites=found.sites,
            text_column=text_column,
            label_column=label_column,
        )
        done = subprocess.run(  # noqa: S603  # our own module
            our_module("umbel_client.tuning"),
            input=msgspec.json.encode(request),
            stdout=subprocess.DEVNULL if quiet else None,
            check=False,
            preexec_fn=belong_to_parent,
        )
    if done.returncode:
        raise typer.Exit(done.returncode)


def _show(console: Console, found: Calibration) -> None:
    shared = found.mode == "distributed"
    lines = [
        ("sites", f"{found.sites}, about {found.records:,} records"),
        ("mode", found.mode),
        ("rounds", str(found.rounds)),
        ("batch", f"{found.batch:,} on average, {'of all sites' if shared else 'at each site'}"),
    ]
    print_lines(console, lines)
    rows = table(
        *("epsilon", "mode", "may drop out", "honest", "noise", "noise of the mean"),
        *("readers", "everybody", "attempts", "sent", "received", ""),
    )
    for row in found.rows:
        rows.add_row(*_cells(row))
    console.print()
    console.print(rows)
    console.print()
    console.print("A site accepts the plan if its policy has, for instance:")
    console.print()
    print_lines(console, [(name, f"{value:.6g}") for name, value in found.policy.items()])
    if not found.accounted:
        console.print(
            "\nNoise and epsilon were not computed: that needs packages that are not installed\n"
            "here. Name a Python that has them in evaluation.python of server.toml\n"
            f"({install('client')}).",
            soft_wrap=True,
        )
        if shared:
            console.print(
                "\nmax_clip_range leaves the noise out. Where a batch has few records beside it, a"
                "\nsite needs more: its log says how much.",
                soft_wrap=True,
            )


def _cells(row: Bought) -> list[str]:
    return [
        f"{row.epsilon:g}",
        row.mode,
        str(row.dropouts),
        str(row.honest) if row.mode == "distributed" else "-",
        _figure(row.noise_multiplier),
        _figure(row.noise_of_mean),
        _figure(row.epsilon_readers),
        _figure(row.epsilon_everybody),
        "free"
        if row.mode == "local"
        else "-"
        if row.most_attempts is None
        else str(row.most_attempts),
        _bytes(row.bytes_sent),
        _bytes(row.bytes_received),
        "proposed" if row.proposed else "",
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _bytes(count: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
