"""`umbel-simulate`: many sites on one machine, with the code that a deployment runs."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from umbel_common.errors import StorageError
from umbel_host.entry import exit_code
from umbel_host.processes.lifecycle import hide_memory
from umbel_host.terminal import Screen, command_line, print_json

app = command_line(
    "umbel-simulate", "Simulate private federated fine-tuning, with many sites on this machine."
)

ScenarioName = Annotated[
    str, typer.Argument(help="Name of a shipped scenario, or path of a TOML file.")
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")]


@app.command()
def run(
    scenario: ScenarioName = "quickstart",
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run; default: the scenario's name, with a number if need be."
        ),
    ] = None,
    sites: Annotated[
        int | None, typer.Option(min=2, max=100, help="Number of sites; default: the scenario's.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Number of rounds; default: the scenario's."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**53 - 1,
            help="Public seed of the division of records and of the initial adapter; default: the"
            " scenario's.",
        ),
    ] = None,
    no_dp: Annotated[
        bool, typer.Option("--no-dp", help="Train without differential privacy.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only the summary, as JSON.")
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Run a scenario, compare its adapter with others, and write a report."""
    if name is not None and (not name.strip() or name == ".." or Path(name).name != name):
        raise typer.BadParameter("a name, without folders: see --runs", param_hint="--name")
    # Imported here, so that `list`, `--help` and errors in a scenario do not wait for torch.
    from umbel_host.files.output import require_place
    from umbel_simulations.scenario.file import find_scenario, override
    from umbel_simulations.scenario.run_folder import check_free, free_name

    chosen = override(find_scenario(scenario), sites=sites, rounds=rounds, seed=seed, no_dp=no_dp)
    folder = runs / (name if name is not None else free_name(runs, chosen))
    if not check_free(folder, chosen):
        require_place(folder / "adapter")

    from umbel_simulations.reporting.live import view_for
    from umbel_simulations.reporting.table import print_summary
    from umbel_simulations.runs.run import run_scenario

    console = Screen(quiet=quiet or as_json)
    with view_for(console) as view:
        summary = run_scenario(chosen, folder, view.on_event)
    if as_json:
        print_json(summary)
    else:
        print_summary(console, summary)
        console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
        console.print(f"adapter: {folder / 'adapter'}", soft_wrap=True)
        console.print(f"verify: umbel-simulate verify {shlex.quote(str(folder))}", soft_wrap=True)


@app.command()
def init(
    train: Annotated[
        list[Path],
        typer.Argument(help="Training records: one file to divide, or a file for each site."),
    ],
    test: Annotated[
        Path,
        typer.Option(help="Public test records; `umbel-client data split` makes such a file."),
    ],
    out: Annotated[Path, typer.Option(help="The new scenario.")] = Path("mine.toml"),
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the base model; default for labels: the demo's encoder."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the scenario; default: from the file's name.")
    ] = None,
    sites: Annotated[
        int | None, typer.Option(min=2, max=100, help="Number of sites; default: 3.")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Column that says whose a record is, such as a patient.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the texts to label.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the labels.")] = "label",
) -> None:
    """Look at your own records, and write a commented scenario that trains on them."""
    from umbel_host.files.durable import create
    from umbel_host.files.output import require_new_file
    from umbel_simulations.inputs.new_scenario import Wish, path_text, scenario_text
    from umbel_simulations.runs.setup import load_setup
    from umbel_simulations.scenario.file import parse_scenario

    require_new_file(out)
    wish = Wish(
        train=train,
        test=test,
        out=out,
        model=model,
        name=name,
        sites=sites,
        unit=unit,
        text_column=text_column,
        label_column=label_column,
    )
    text = scenario_text(wish)
    # What is written runs: records, model, plan and privacy fit together.
    setup = load_setup(parse_scenario(text, out))
    try:
        create(out, text.encode(), 0o644)
    except OSError as error:
        raise StorageError("a scenario cannot be written", file=out, found=error.strerror) from None
    console = Screen()
    for site, examples in setup.sites.items():
        console.print(f"{site}  {len(examples):,} records", soft_wrap=True)
    console.print(f"run it: umbel-simulate run {shlex.quote(path_text(out))}", soft_wrap=True)


@app.command()
def federation(
    scenario: ScenarioName = "federation",
    folder: Annotated[
        Path, typer.Option(help="Folder of the federation; it must be new or empty.")
    ] = Path("federation"),
) -> None:
    """Run a scenario as real processes: a server and its sites, with certificates and approvals."""
    from umbel_host.files.output import require_place
    from umbel_simulations.scenario.file import find_scenario

    chosen = find_scenario(scenario)
    require_place(folder / "adapter")

    from umbel_simulations.backends.processes import run_federation

    console = Screen()
    adapter = run_federation(
        chosen,
        folder.absolute(),
        lambda text: console.print(text, soft_wrap=True),
    )
    console.print(f"adapter: {adapter}", soft_wrap=True)


@app.command("list")
def list_command() -> None:
    """List the shipped scenarios."""
    from umbel_simulations.scenario.file import list_scenarios

    table = Table("scenario", "sites", "rounds", "description")
    for scenario in list_scenarios():
        table.add_row(
            scenario.name,
            str(scenario.sites.count),
            str(scenario.training.rounds),
            scenario.description,
        )
    Screen().print(table)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
) -> None:
    """Verify the signatures, transcript and adapter of a run from its files alone."""
    from umbel_simulations.runs.verify import verify_run

    job = verify_run(folder)
    console = Screen()
    console.print(f"verified: {folder}", soft_wrap=True)
    console.print(
        f"  {len(job.releases) - 1} rounds released, {job.aborted_attempts} attempts aborted,"
        f" delivered to {', '.join(job.delivered) or 'nobody'}"
    )
    if job.untold_attempts:
        console.print(f"  {job.untold_attempts} attempts are in no entry", soft_wrap=True)
    if job.final_round != job.plan.training.rounds:
        console.print(
            f"  the plan has {job.plan.training.rounds} rounds, and the job ended with the adapter"
            f" of round {job.final_round}",
            soft_wrap=True,
        )
    for release in job.releases[1:]:
        held_back = ", held back" if release.round in job.held_back else ""
        console.print(
            f"  round {release.round}: {len(release.survivors)} sites,"
            f" adapter {release.adapter.hex()[:16]}{held_back}"
        )
    for what in job.believed:
        console.print(f"  not recomputed: {what}", soft_wrap=True)
    if job.not_recomputed:
        rounds = ", ".join(map(str, job.not_recomputed))
        console.print(
            f"  not made again from their sums, which are not all at hand: rounds {rounds}",
            soft_wrap=True,
        )
    console.print(f"  transcript head {job.head.hex()}", soft_wrap=True)


@app.command()
def audit(
    scenario: ScenarioName = "quickstart",
    canaries: Annotated[
        int,
        typer.Option(min=10, help="Number of records, then of patients, that the attack guesses."),
    ] = 1000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only the results, as JSON.")
    ] = False,
) -> None:
    """Attack one site's training, and compare the epsilon that the attack shows with the claim.

    The audit runs twice: with privacy per record, and with privacy per patient. In distributed mode
    the attack reads sums, once against the claim to their readers, and once, with the noise of this
    site alone, against the claim to everybody.
    """
    from umbel_simulations.audit.one_run import as_table, audit_scenario, check
    from umbel_simulations.scenario.file import find_scenario

    console = Screen(quiet=as_json)
    with console.status("") as status:
        results = audit_scenario(
            find_scenario(scenario),
            canaries,
            os.urandom,
            lambda unit, against, step, steps: status.update(
                f"per {unit}, against {against}: {step} of {steps}"
            ),
        )
    if as_json:
        print_json(results)
    else:
        console.print(as_table(results))
    check(results)


def run_command() -> int:
    """Runs the command of the command line; returns the exit code."""
    hide_memory()
    return exit_code(app, interrupted="interrupted: the same command resumes the run")
