"""Records of a causal language model, in the four usual formats.

| format | columns | read as |
|---|---|---|
| `messages` | `messages`: `role` and `content` of each | a conversation, the answer last |
| `prompt-completion` | `prompt`, `completion` | the user's turn, and the answer |
| `instruction` | `instruction`, `output`, perhaps `input` | the user's turn, and the answer |
| `text` | `text` | a passage |

`prompt` and `completion` may be lists of messages as well; in CSV a cell of `messages` holds JSON.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from umbel_client.data.rows import Row, Table
from umbel_client.data.tables import columns_text, near_columns, require_columns
from umbel_common.canonical import Value
from umbel_common.errors import DataError
from umbel_common.plans.alike import shown
from umbel_common.plans.figures import Format
from umbel_common.plans.plan import CausalLm
from umbel_common.single_keys import has_twice

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that a format needs; `input` may be beside `instruction`."""


class Turn(Value, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(Value, frozen=True):
    """Turns; the last one is the assistant's, the answer."""

    turns: tuple[Turn, ...]


class Passage(Value, frozen=True):
    """A text that no template renders, or that is already rendered."""

    text: str


LmRecord: TypeAlias = Conversation | Passage

Question: TypeAlias = Sequence[Turn] | Passage
"""What a model answers: the turns up to an answer; or a text, up to its answer or to continue."""


def read_conversations(
    path: Path, table: Table, task: CausalLm, record_format: Format
) -> list[LmRecord]:
    """Reads every row as a record.

    Raises:
        DataError: the columns belong to no format or to several; a row is of another format than
            the file, has an empty answer, or is one that the plan's template cannot render.
    """
    chosen = format_of(path, table) if record_format == "auto" else record_format
    try:
        require_columns(path, table, *COLUMNS[chosen])
    except DataError as error:
        error.accepted = f"for data.format {chosen}: {', '.join(COLUMNS[chosen])}"
        error.remedy = "rename a column of the file, or set data.format"
        raise
    records: list[LmRecord] = []
    for number, row in table.numbered():
        place = _Place(path, number)
        record = _READERS[chosen](place, row)
        check_template(record, task, number, path)
        records.append(record)
    return records


class _Place:
    """A row of a file, for errors."""

    def __init__(self, path: Path, row: int) -> None:
        self._path = path
        self._row = row

    def error(self, what: str, column: str, found: object, accepted: str) -> DataError:
        return DataError(
            f"row {self._row} {what}",
            file=self._path,
            field=f"{column}, row {self._row}",
            found=found,
            accepted=accepted,
        )

    def text(self, row: Row, column: str, *, what: str = "has no text") -> str:
        """Returns a column's text, which must not be empty."""
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            found = "an empty text" if isinstance(value, str) else type(value).__name__
            raise self.error(what, column, found, "a text that is not empty")
        return value


def format_of(path: Path, table: Table, *, strict: bool = True) -> Format:
    """The format that a file's columns say.

    Args:
        strict: rows of another format than the first are an error; else the first row decides.

    Raises:
        DataError: the columns belong to no format or to several, or a row has another format than
            the first.
    """
    found: list[Format] = [
        name for name, needed in COLUMNS.items() if set(needed) <= set(table.columns)
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(
            "the columns of a data file are those of no format",
            file=path,
            found=columns_text(table.columns),
            accepted="; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items()),
            remedy=f"{_near(table)}rename columns of the file; in a CSV file, line 1 names them",
        )
    if any(all(_has(row, name) for row in table.rows) for name in found):
        raise DataError(
            "the columns of a data file are those of several formats",
            file=path,
            field="data.format",
            found=", ".join(found),
            accepted="exactly one of them",
            remedy="set data.format in client.toml",
        )
    if not strict and table.rows:
        for name in found:
            if _has(table.rows[0], name):
                return name
    raise _mixed(path, table, found)


def _near(table: Table) -> str:
    wanted = dict.fromkeys((*(column for needed in COLUMNS.values() for column in needed), "label"))
    near = [
        f"{shown(name)} comes near {column}"
        for column in wanted
        for name in near_columns(column, table.columns)
    ]
    return "".join(f"{words}; " for words in near)


def _has(row: Row, name: Format) -> bool:
    # A column that only other rows have is empty here: null in Parquet, an empty cell in CSV.
    return all(row.get(column) not in (None, "") for column in COLUMNS[name])


def _mixed(path: Path, table: Table, known: list[Format]) -> DataError:
    first: list[Format] = [name for name in known if _has(table.rows[0], name)]
    number, row = next(
        (n, row) for n, row in table.numbered() if not first or not _has(row, first[0])
    )
    found = [name for name in known if _has(row, name)]
    what = "is of another format than the rows before it" if first else "is of no format"
    return DataError(
        f"row {number} {what}",
        file=path,
        field=f"row {number}",
        found=", ".join(found) or "no format",
        accepted=first[0] if first else ", ".join(known),
        remedy="keep one format in a file",
    )


def _messages(place: _Place, row: Row) -> LmRecord:
    turns = _turns(place, row.get("messages"), "messages")
    if not turns or turns[-1].role != "assistant":
        found = turns[-1].role if turns else "no turn"
        raise place.error("does not end with an answer", "messages", found, "a turn of assistant")
    return _conversation(place, turns, "messages")


def _prompt_completion(place: _Place, row: Row) -> LmRecord:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = (
            *_turns(place, prompt, "prompt"),
            *_turns(place, completion, "completion"),
        )
        if turns[-1].role != "assistant":
            raise place.error(
                "does not end with an answer", "completion", turns[-1].role, "a turn of assistant"
            )
        return _conversation(place, turns, "completion")
    question = place.text(row, "prompt", what="has an empty prompt")
    answer = place.text(row, "completion", what="has an empty completion")
    return _pair(question, answer)


def _instruction(place: _Place, row: Row) -> LmRecord:
    question = _instructed(place, row)
    answer = place.text(row, "output", what="has an empty output")
    return Conversation((question, Turn("assistant", answer)))


def _instructed(place: _Place, row: Row) -> Turn:
    question = place.text(row, "instruction", what="has no instruction")
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise place.error("has no text", "input", type(more).__name__, "a text")
    return Turn("user", f"{question}\n\n{more}" if more and more.strip() else question)


def _passage(place: _Place, row: Row) -> Passage:
    return Passage(text=place.text(row, "text"))


_READERS: dict[Format, Callable[[_Place, Row], LmRecord]] = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "instruction": _instruction,
    "text": _passage,
}


def _turns(place: _Place, value: object, column: str) -> tuple[Turn, ...]:
    """A list of messages; a text in its place is the one turn of its side, or JSON in CSV."""
    if isinstance(value, str) and column == "messages":
        try:
            value = _decoded(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise place.error(
                "has malformed messages", column, error, "a list of role and content"
            ) from None
    elif isinstance(value, str):
        role = "assistant" if column == "completion" else "user"
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise place.error(
            "has no messages", column, type(value).__name__, "a list of role and content"
        )
    # Parquet fills columns that only other rows have with null.
    plain = [
        {key: part for key, part in turn.items() if part is not None}
        if isinstance(turn, dict)
        else turn
        for turn in value
    ]
    try:
        return msgspec.convert(plain, tuple[Turn, ...])
    except msgspec.ValidationError as error:
        found = str(error).replace("`$[", "`[")
        accepted = "role (system, user or assistant) and content, both texts"
        raise place.error("has a malformed message", column, found, accepted) from None


def _decoded(text: str) -> object:
    """Messages that are JSON in a CSV file.

    Raises:
        msgspec.DecodeError: they are no JSON, or one has a key twice.
    """
    value = msgspec.json.decode(text)
    turns = value if isinstance(value, list) else [value]
    keys = sum(len(turn) for turn in turns if isinstance(turn, dict))
    if has_twice(text, keys):
        raise msgspec.DecodeError("a message that has a key twice")
    return value


def _conversation(place: _Place, turns: tuple[Turn, ...], column: str) -> Conversation:
    empty = next((number for number, turn in enumerate(turns) if not turn.content.strip()), None)
    if empty is not None:
        what = "has an empty answer" if empty == len(turns) - 1 else "has an empty message"
        raise place.error(what, column, f"message {empty + 1}", "texts that are not empty")
    if len(turns) == 1:
        raise place.error("has nothing to answer", column, "one message", "at least two")
    return Conversation(turns)


def _pair(question: str, answer: str) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)))


def read_questions(
    path: Path, table: Table, task: CausalLm, record_format: Format
) -> list[Question]:
    """Reads every row up to its answer, which it may have or lack.

    Args:
        record_format: the format of the records; `auto`, or one that the file does not have: what
            the columns say, `prompt` before all others.

    Raises:
        DataError: no column holds questions; or a row has none, or one that the plan's template
            cannot render.
    """
    order: list[Format] = [record_format, "prompt-completion", *COLUMNS]
    asking: list[Format] = [
        name for name in order if name != "auto" and COLUMNS[name][0] in table.columns
    ]
    if not asking:
        raise DataError(
            "a data file has no questions",
            file=path,
            found=columns_text(table.columns),
            accepted=f"one of the columns {', '.join(needed[0] for needed in COLUMNS.values())}",
            remedy="rename a column of the file",
        )
    require_columns(path, table, COLUMNS[asking[0]][0])
    questions: list[Question] = []
    for number, row in table.numbered():
        asked = _ASKED[asking[0]](_Place(path, number), row)
        record: LmRecord
        if isinstance(asked, Passage):
            record = asked
        else:
            record = Conversation((*asked, Turn("assistant", "an answer")))
        check_template(record, task, number, path)
        questions.append(asked)
    return questions


def _asked_messages(place: _Place, row: Row) -> Question:
    turns = _turns(place, row.get("messages"), "messages")
    return _asked_turns(place, turns[:-1] if turns[-1].role == "assistant" else turns, "messages")


def _asked_prompt(place: _Place, row: Row) -> Question:
    if isinstance(row.get("prompt"), list):
        return _asked_turns(place, _turns(place, row["prompt"], "prompt"), "prompt")
    return (Turn("user", place.text(row, "prompt", what="has an empty prompt")),)


def _asked_turns(place: _Place, turns: tuple[Turn, ...], column: str) -> Question:
    empty = next((number for number, turn in enumerate(turns, 1) if not turn.content.strip()), None)
    if empty is not None:
        found, accepted = f"message {empty}", "texts that are not empty"
        raise place.error("has an empty message", column, found, accepted)
    if not turns:
        raise place.error(
            "has nothing to answer", column, "an answer alone", "a question before it"
        )
    return turns


_ASKED: dict[Format, Callable[[_Place, Row], Question]] = {
    "messages": _asked_messages,
    "prompt-completion": _asked_prompt,
    "instruction": lambda place, row: (_instructed(place, row),),
    "text": _passage,
}


def check_template(record: LmRecord, task: CausalLm, row: int, path: Path | None = None) -> None:
    """Refuses a record that the plan's template does not take.

    Args:
        row: the record's row in its file, for the error.
        path: the file.

    Raises:
        DataError: names the row.
    """
    if task.template == "chat":
        return
    if isinstance(record, Passage):
        column, what, found = "text", "has no answer of its own", "a text"
        accepted = (
            'with task.loss_on "answer": prompt and completion, or a text rendered by the chat'
            " template"
        )
        fits = task.loss_on == "all"
    else:
        roles = [turn.role for turn in record.turns]
        column, what, found = (
            "messages",
            "is a conversation, which takes a template",
            ", ".join(roles),
        )
        accepted = 'with task.template "plain": one prompt and its completion'
        fits = roles == ["user", "assistant"]
    if not fits:
        raise DataError(
            f"row {row} {what}",
            file=path,
            field=f"{column}, row {row}",
            found=found,
            accepted=accepted,
        )
