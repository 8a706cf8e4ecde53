"""`umbel-client budget state-spend`: charges what was spent and is not in the ledger."""

import re
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from umbel_client.cli.options import CLIENT_TOML, Config
from umbel_client.ledger.file import read_ledger
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import machine_register
from umbel_client.ledger.rows import Stated, StatedWithAttempts
from umbel_client.ledger.statement import stated_attempts, stated_rounds, statement_text
from umbel_client.site.config import load_config
from umbel_client.storage.journal import Journal
from umbel_common.canonical import decode_canonical
from umbel_common.errors import PlanError
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.trust.identity import Signed
from umbel_host.files.text_file import read_text
from umbel_host.terminal import Screen, print_lines


def _reached(values: list[str] | None) -> list[str]:
    for value in values or []:
        if not re.fullmatch(r"[a-z0-9-]+=[1-9][0-9]{0,4}", value):
            raise typer.BadParameter("JOB=ROUND, such as icd10=12")
    return values or []


def _counted(values: list[str] | None) -> list[str]:
    for value in values or []:
        if not re.fullmatch(r"[a-z0-9-]+=[0-9]{1,6}", value):
            raise typer.BadParameter("JOB=COUNT, such as icd10=14")
    return values or []


def state_spend(
    by: Annotated[str, typer.Option(help="Name of the person who states it.")],
    why: Annotated[str, typer.Option(help="What happened, and where the figures come from.")],
    rounds: Annotated[
        list[str] | None,
        typer.Option(
            callback=_reached,
            help="JOB=ROUND: the last round of a job that this site was asked for; may be"
            " repeated.",
        ),
    ] = None,
    attempts: Annotated[
        list[str] | None,
        typer.Option(
            callback=_counted,
            help="JOB=COUNT: for a job of distributed mode, how many attempts this site was asked"
            " for, over all rounds; may be repeated.",
        ),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Plan file of a job that the ledger does not know; may be repeated."),
    ] = None,
    nothing: Annotated[
        bool, typer.Option("--nothing", help="Nothing was spent that is not in the ledger.")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--everything", help="Nobody knows what was spent: from now on epsilon is infinite."
        ),
    ] = False,
    config: Config = CLIENT_TOML,
) -> None:
    """Charge the ledger with what was spent and is not in it. This cannot be undone."""
    if [bool(rounds), nothing, everything].count(True) != 1:
        raise typer.BadParameter("one of --rounds, --nothing and --everything")
    settings = load_config(config)
    path = settings.state_folder.ledger
    contents = read_ledger(path)
    reached, counts = _numbers(rounds), _numbers(attempts)
    given = [plan_from_json(read_text(file, PlanError), file)[0] for file in plan or []]
    plans = [*given, *_accepted(settings.state_folder.journal)]
    counted = stated_attempts(contents, reached, counts, plans)
    stated = Stated(
        rounds=stated_rounds(contents, reached, plans, settings.data.public_size),
        everything=everything,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        by=by,
        why=why,
    )
    if counted:
        stated = StatedWithAttempts(**msgspec.structs.asdict(stated), attempts=counted)
    with Ledger.open(path, contents.data_set, settings.data.unit_column) as ledger:
        ledger.charge_statement(stated)
        machine_register().settle(ledger)
        print_lines(
            Screen(),
            [
                ("ledger", str(path)),
                ("stated", statement_text(stated)),
                ("charged", _charged(stated, ledger)),
                ("head", ledger.head().hex()),
            ],
        )


def _numbers(values: list[str] | None) -> dict[str, int]:
    return {job: int(number) for job, _, number in (text.partition("=") for text in values or [])}


def _charged(stated: Stated, ledger: Ledger) -> str:
    rounds = f"{len(stated.rounds)} rounds more, {len(ledger.history())} in all"
    if not isinstance(stated, StatedWithAttempts):
        return rounds
    return f"{rounds}; {sum(one.attempts for one in stated.attempts)} attempts more"


def _accepted(path: Path) -> list[TrainingPlan]:
    if not path.exists():
        return []
    with closing(Journal(path)) as journal:
        return [_plan(signed) for signed in journal.plans()]


def _plan(signed: Signed) -> TrainingPlan:
    return decode_canonical(signed.statement, PLAN_VERSIONS)
