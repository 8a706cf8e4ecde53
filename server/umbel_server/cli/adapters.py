"""`umbel-server adapters`: the adapters that jobs released."""

import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from umbel_common.adapters.vector import Vector
from umbel_common.errors import JobUnknown, ModelError, StorageError
from umbel_common.plans.figures import ClassificationFigures, loss_text
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.plans.statements import RELEASE_VERSIONS, Release
from umbel_common.trust.identity import Signed, open_signed
from umbel_host.files.keys import read_identity
from umbel_host.files.model_digest import folder_files, model_digest
from umbel_host.files.model_folder import TOKENIZER_FILES, read_texts, text_digest
from umbel_host.files.output import require_new
from umbel_host.terminal import Screen, print_json, say, table
from umbel_server.cli.options import SERVER_TOML, Config, Json
from umbel_server.operator.config import ServerConfig, load_config
from umbel_server.storage.journal import Evaluated, Journal
from umbel_server.storage.registry import Registry, write_folder

adapters = typer.Typer(help="Released adapters: list, export.", no_args_is_help=True)


@adapters.command("list")
def list_command(config: Config = SERVER_TOML, as_json: Json = False) -> None:
    """List every release of every job."""
    settings = load_config(config)
    with closing(_open_journal(settings)) as journal:
        jobs = journal.jobs()
        figures = {job: {one.round: one for one in journal.evaluations(job)} for job in jobs}
        releases = {job: _releases(journal, settings, job) for job in jobs}
    if as_json:
        listed = ((job, one) for job in jobs for one in releases[job])
        print_json([_release_json(one, figures[job].get(one.round)) for job, one in listed])
        return
    scored = any(figures.values())
    rows = table("job", "round", "sites", *(("loss", "score") if scored else ()), "adapter")
    for job in jobs:
        for release in releases[job]:
            found = figures[job].get(release.round)
            rows.add_row(
                job,
                str(release.round),
                str(len(release.survivors)),
                *(_score(found) if scored else ()),
                release.adapter.hex(),
            )
    console = Screen()
    console.print(rows if rows.rows else "No adapter was released yet.")


@adapters.command()
def export(
    job: Annotated[str, typer.Argument(help="Name of the job.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    round_number: Annotated[
        int | None,
        typer.Option(
            "--round", help="Number of a round; default: the job's final one, or its latest so far."
        ),
    ] = None,
    config: Config = SERVER_TOML,
) -> None:
    """Copy a released adapter into a PEFT folder, after checking it against its release."""
    settings = load_config(config)
    require_new(out)
    plan, release, vector = find_release(settings, job, round_number)
    tokenizer = tokenizer_files(settings, plan)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        # The digest names the vector alone. All else follows from the plan.
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(partial, plan, vector)
        for name, text in tokenizer.items():
            (partial / name).write_bytes(text)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError("an adapter cannot be exported", file=out, found=error) from None
    say(f"{job}, round {release.round}: {out}")
    if not tokenizer:
        say("The tokenizer is not in it: it is in the base model's folder.")


def find_release(
    settings: ServerConfig, job: str, round_number: int | None
) -> tuple[TrainingPlan, Release, Vector]:
    """An adapter that a job released, checked against its release.

    Args:
        round_number: None: the job's final round, or its latest so far.

    Raises:
        JobUnknown: there is no such job, or it did not release this round.
        StorageError: the adapter is missing or damaged.
    """
    operator = read_identity(Path(settings.identity)).public_key
    with closing(_open_journal(settings)) as journal:
        signed = journal.plan(job)
        if signed is None:
            known = ", ".join(journal.jobs())
            raise JobUnknown("no job of this name", field=job, accepted=known or "none yet")
        plan = open_signed(signed, PLAN_VERSIONS, operator, "operator")
        releases = {release.round: release for release in _releases(journal, settings, job)}
        final = journal.final_round(job)
    last = max(releases) if final is None else final
    wanted = last if round_number is None else round_number
    if wanted not in releases:
        raise JobUnknown(
            "a round of this job was not released",
            field=f"{job}, round {wanted}",
            accepted=f"rounds 0 to {max(releases)}",
        )
    registry = Registry(Path(settings.state) / "registry")
    release = releases[wanted]
    return plan, release, registry.load(plan, release.adapter)


def tokenizer_files(settings: ServerConfig, plan: TrainingPlan) -> dict[str, bytes]:
    """The tokenizer's files, if the operator evaluates with exactly the plan's base model."""
    if settings.evaluation is None:
        return {}
    folder = Path(settings.evaluation.model)
    try:
        texts = read_texts(folder)
        files = folder_files(folder)
    except ModelError:
        return {}
    read = {name: text_digest(text) for name, text in texts.items()}
    if model_digest({**files, **read}) != plan.model.digest:
        return {}
    return {name: texts[name] for name in TOKENIZER_FILES if name in texts}


def _release_json(release: Release, found: Evaluated | None) -> dict[str, object]:
    return {
        "job": release.job,
        "round": release.round,
        "sites": list(release.survivors),
        "adapter": release.adapter.hex(),
        "evaluation": None if found is None else msgspec.to_builtins(found.evaluation),
        "held_back": found is not None and found.held_back,
    }


def _score(found: Evaluated | None) -> tuple[str, str]:
    """Returns the loss of a round's adapter, and the figure that people ask for first."""
    if found is None:
        return "", ""
    loss, figures = loss_text(found.evaluation.mean_loss), found.evaluation.figures
    if found.held_back:
        return loss, "held back"
    if isinstance(figures, ClassificationFigures):
        return loss, f"accuracy {figures.accuracy:.1%}"
    return loss, f"perplexity {loss_text(figures.perplexity)}"


def _open_journal(settings: ServerConfig) -> Journal:
    return Journal(Path(settings.state) / "journal.sqlite")


def _releases(journal: Journal, settings: ServerConfig, job: str) -> list[Release]:
    key = read_identity(Path(settings.identity)).public_key
    signed: list[Signed] = journal.releases(job)
    return [open_signed(one, RELEASE_VERSIONS, key, "operator") for one in signed]
