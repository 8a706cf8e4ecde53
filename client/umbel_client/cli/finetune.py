"""`umbel-client train|evaluate|classify|generate|export`: fine-tuning without a federation.

Torch and Transformers are imported inside the commands: other commands should not wait for them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from umbel_client.cli.options import CLIENT_TOML, Config, Device, Json
from umbel_client.site.config import ClientConfig, load_local_config
from umbel_common.device import require_device
from umbel_common.errors import ConfigError, DataError, PlanError
from umbel_common.plans.figures import ClassificationFigures, Evaluation, figures_text
from umbel_common.plans.plan import (
    Adam,
    CausalLm,
    Classification,
    NoPrivacy,
    TrainingPlan,
)
from umbel_common.plans.plan_file import plan_from_json
from umbel_common.printable import one_line
from umbel_host.files.output import require_new
from umbel_host.files.text_file import read_text
from umbel_host.terminal import Screen, bar, json_text, print_json, say, table, working

if TYPE_CHECKING:
    from umbel_client.data.conversations import Question
    from umbel_client.models.adapted_model import AdaptedModel

Adapter = Annotated[
    str, typer.Option(help="An adapter's folder, or a job whose adapter this site received.")
]
_COLDEST = 0.001
"""Smallest temperature at which tokens are drawn."""
Base = Annotated[
    bool, typer.Option("--base", help="Leave the adapter out, to compare with the base model.")
]


def train(
    plan: Annotated[
        Path, typer.Option(help="The plan file to follow, as `umbel-server plan new` writes it.")
    ],
    out: Annotated[Path, typer.Option(help="The new folder for the adapter.")],
    local: Annotated[
        bool,
        typer.Option("--local", help="Train on this machine alone, as this command always does."),
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Records; default: data.path of client.toml.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Records that decide when to stop; use public ones if privacy matters."),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(min=1, help="Rounds without a smaller validation loss after which to stop."),
    ] = 2,
    without_privacy: Annotated[
        bool,
        typer.Option(
            "--without-privacy", help="Neither clip nor add noise, whatever the plan says."
        ),
    ] = False,
    device: Device = None,
    config: Config = CLIENT_TOML,
) -> None:
    """Train an adapter on this site's data alone: a baseline for what a federation gives.

    Nothing leaves this machine and no privacy budget is charged, so the adapter is as private as
    the data.
    """
    settings = _loaded(config, device)
    require_new(out)
    followed = _followed(plan, without_privacy)

    from umbel_client.data.records import columns_of, load_records
    from umbel_client.data.site_data import warnings_of
    from umbel_client.models.adapters.folder import write_adapter
    from umbel_client.training.local import Validation, fine_tune

    columns = columns_of(settings.data)
    records = load_records(data or Path(settings.data.path), followed.task, **columns)
    held_out = None
    if validation is not None:
        held_out = Validation(load_records(validation, followed.task, **columns), patience)
    console = Screen()
    public_size = settings.data.public_size if data is None else None
    labels = followed.task.labels if isinstance(followed.task, Classification) else ()
    for warning in warnings_of(records, public_size, labels):
        console.print(f"look: {warning}", soft_wrap=True)

    def on_round(done: int, loss: float | None) -> None:
        end = "" if loss is None else f", validation loss {loss:.4f}"
        console.print(f"round {done} of {followed.training.rounds}{end}")

    with bar() as shown:
        result = fine_tune(
            settings,
            followed,
            records,
            held_out,
            on_round,
            shown.stage,
            public_size=public_size,
            entropy=os.urandom,
        )
    write_adapter(out, followed, result.adapter, None, base_model=Path(settings.model.path))
    console.print(f"adapter of round {result.round}  {out}", soft_wrap=True)
    console.print("It is as private as the data: no ledger was charged for it.")


def _followed(path: Path, without_privacy: bool) -> TrainingPlan:
    plan, _ = plan_from_json(read_text(path, PlanError), path)
    if not without_privacy:
        return plan
    training = plan.training
    if isinstance(training.optimizer, Adam):
        # Without noise there is nothing to subtract from Adam's second moment.
        optimizer = msgspec.structs.replace(training.optimizer, unbiased=False)
        training = msgspec.structs.replace(training, optimizer=optimizer)
    return msgspec.structs.replace(plan, privacy=NoPrivacy(), training=training)


def classify(
    adapter: Adapter,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--input", help="A data file with texts, in the column data.text_column."),
    ] = None,
    base: Base = False,
    device: Device = None,
    config: Config = CLIENT_TOML,
) -> None:
    """Label texts with an adapter. Prints one JSON object a line, with label and probability."""
    settings = _loaded(config, device)

    from umbel_client.data.tokens import tokenise
    from umbel_client.evaluation.inference import classify_texts

    given = _given(text, file, "--text")
    texts = given if file is None else _column(file, settings.data.text_column)
    model = _adapted(settings, adapter, base)
    task = model.plan.task
    if not isinstance(task, Classification):
        raise _other_task(adapter, "umbel-client generate")
    tokens = tokenise(texts, Path(settings.model.path), task.max_tokens, model.files)
    for prediction in classify_texts(model, tokens):
        say(
            msgspec.json.encode(
                {"label": prediction.label, "probability": round(prediction.probability, 4)}
            ).decode()
        )


def evaluate(
    adapter: Adapter,
    data: Annotated[
        Path | None, typer.Option(help="Held-out records; default: data.path of client.toml.")
    ] = None,
    general: Annotated[
        Path | None,
        typer.Option(
            help="For a language model: texts outside the domain, in a column `text`; their"
            " perplexity rises as the model forgets."
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(help="Column that names a record's group; each group gets an accuracy."),
    ] = None,
    answers: Annotated[
        int, typer.Option(min=0, help="For a language model: number of records that it answers.")
    ] = 50,
    base: Base = False,
    device: Device = None,
    as_json: Json = False,
    config: Config = CLIENT_TOML,
) -> None:
    """Score an adapter on this site's own held-out records. The scores stay on this machine."""
    settings = _loaded(config, device)

    from umbel_client.data.records import columns_of
    from umbel_client.evaluation.score import options_for, score
    from umbel_client.models.adapters.folder import read_adapter
    from umbel_client.models.site_model import load_site_model
    from umbel_common.adapters.vector import initial_vector

    plan, vector = read_adapter(_folder_of(settings, adapter))
    options = options_for(
        plan.task,
        columns=columns_of(settings.data),
        general=general,
        groups=groups,
        answers=answers,
    )
    model = load_site_model(settings.model, plan, trains=False)
    model.set_vector(initial_vector(plan) if base else vector)
    with working("scoring"):
        found = score(model, Path(settings.model.path), data or Path(settings.data.path), options)
    if as_json:
        print_json(found)
    else:
        say(f"{found.records:,} records: {figures_text(found)}")
        _print_groups(found)


def _print_groups(found: Evaluation) -> None:
    """Prints the accuracy of each group, the worst first, if there are groups."""
    if not isinstance(found.figures, ClassificationFigures) or not found.figures.groups:
        return
    rows = table("group", "records", "accuracy", folding=("group",), right=("records", "accuracy"))
    for one in sorted(found.figures.groups, key=lambda group: group.accuracy):
        rows.add_row(one_line(one.group), f"{one.records:,}", f"{one.accuracy:.1%}")
    say("")
    Screen().print(rows)


def generate(
    adapter: Adapter,
    prompt: Annotated[list[str] | None, typer.Option(help="A question; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="A data file with questions, with or without answers: prompts, messages,"
            " instructions or texts.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=131_072,
            help="Longest answer, in tokens. It ends with the model's context in any case.",
        ),
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, max=5.0, help="How random answers are; 0: the likeliest token each time."
        ),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**63 - 1,
            help="Seed of random answers; without a temperature it has no effect.",
        ),
    ] = 0,
    base: Base = False,
    device: Device = None,
    config: Config = CLIENT_TOML,
) -> None:
    """Answer questions with an adapter. Prints one JSON object a line, with prompt and answer."""
    settings = _loaded(config, device)

    from umbel_client.data.chat import Chat
    from umbel_client.data.conversations import Question, Turn, read_questions
    from umbel_client.data.tables import read_table
    from umbel_client.evaluation.inference import Sampling, answer_prompts

    given = _given(prompt, file, "--prompt")
    # Below, a logit divided by it may be infinite.
    if temperature != 0 and not temperature >= _COLDEST:
        raise typer.BadParameter(f"0, or {_COLDEST} to 5", param_hint="--temperature")
    table = None if file is None else read_table(file)
    model = _adapted(settings, adapter, base)
    task = model.plan.task
    if not isinstance(task, CausalLm):
        raise _other_task(adapter, "umbel-client classify")
    questions: list[Question] = [(Turn("user", one),) for one in given]
    if file is not None and table is not None:
        questions = read_questions(file, table, task, settings.data.format)
    chat = Chat.load(Path(settings.model.path), task, model.files)
    said = answer_prompts(model, chat, questions, Sampling(max_new_tokens, temperature, seed))
    for question, answer in zip(questions, said, strict=True):
        say(json_text({"prompt": _as_asked(question), "answer": answer}, indent=-1))


def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="The new folder.")],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Add the adapter to its base model, and write the whole model."
        ),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of a merged model.")
    ] = "float32",
    device: Annotated[
        str, typer.Option(help="Where a model is merged: cpu, cuda, cuda:1, mps, or auto.")
    ] = "cpu",
    config: Config = CLIENT_TOML,
) -> None:
    """Write an adapter as a PEFT folder, or merged into a model that Transformers and vLLM load."""
    settings = load_local_config(config)
    folder = _folder_of(settings, adapter)
    require_new(out)

    from umbel_client.models.adapters.folder import export_adapter
    from umbel_client.models.adapters.merge import merge_adapter
    from umbel_client.models.base.device import chosen_device

    if merge:
        place = chosen_device(device, field="--device")
        merge_adapter(folder, Path(settings.model.path), out, dtype=dtype, device=place)
    else:
        export_adapter(folder, out)
    say(f"{'model' if merge else 'adapter'}  {out}")


def _loaded(file: Path, device: str | None) -> ClientConfig:
    """The site's configuration, with the device of the command line if one is given."""
    config = load_local_config(file)
    if device is None:
        return config
    require_device(device, field="--device")
    model = msgspec.structs.replace(config.model, device=device, split="layers")
    return msgspec.structs.replace(config, model=model)


def _folder_of(config: ClientConfig, adapter: str) -> Path:
    received = config.state_folder.adapter(adapter)
    is_name = len(Path(adapter).parts) == 1
    return received if is_name and received.is_dir() else Path(adapter)


def _adapted(config: ClientConfig, adapter: str, base: bool) -> "AdaptedModel":
    import torch

    from umbel_client.models.adapters.folder import read_adapter
    from umbel_client.models.site_model import load_site_model
    from umbel_common.adapters.vector import initial_vector

    plan, vector = read_adapter(_folder_of(config, adapter))
    torch.set_num_threads(config.threads)
    model = load_site_model(config.model, plan, trains=False)
    model.set_vector(initial_vector(plan) if base else vector)
    return model


def _given(texts: Sequence[str] | None, file: Path | None, option: str) -> list[str]:
    """The texts of the command line, which are held to what those of a file are held to.

    Raises:
        DataError: names the text that is empty, or not UTF-8.
    """
    if (file is None) == (not texts):
        raise typer.BadParameter(f"give texts with {option}, or a file with --input")
    for number, text in enumerate(texts or (), start=1):
        # Python keeps bytes of the command line that are not UTF-8 as halves of characters.
        broken = any("\ud800" <= character <= "\udfff" for character in text)
        if broken or not text.strip():
            raise DataError(
                f"text {number} of the command line is no text",
                field=f"{option}, number {number}",
                found="a character that is not UTF-8" if broken else "an empty text",
                accepted="a text in UTF-8 that is not empty",
            )
    return list(texts or ())


def _column(file: Path, column: str) -> list[str]:
    """The texts of a column of a data file."""
    from umbel_client.data.tables import read_table, require_columns

    table = read_table(file)
    require_columns(file, table, column)
    texts = []
    for number, row in table.numbered():
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"row {number} has no text",
                file=file,
                field=f"{column}, row {number}",
                found="an empty text" if isinstance(value, str) else type(value).__name__,
                accepted="a text that is not empty",
            )
        texts.append(value)
    return texts


def _as_asked(question: "Question") -> object:
    """A question as its record has it: a text, or messages where it has several."""
    from umbel_client.data.conversations import Passage

    if isinstance(question, Passage):
        return question.text
    lone = len(question) == 1 and question[0].role == "user"
    return question[0].content if lone else question


def _other_task(adapter: str, command: str) -> ConfigError:
    return ConfigError(
        "an adapter is for another task",
        field="--adapter",
        found=adapter,
        remedy=f"use `{command}`",
    )


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    for command in (train, evaluate, classify, generate, export):
        app.command()(command)
