"""What is asked of the process that looks for hyper-parameters on public records."""

from typing import Annotated

import msgspec

from umbel_common.canonical import Value
from umbel_common.plans.figures import AnswerCount, AnswerTokens, BatchSize, Format
from umbel_common.plans.plan import Count


class TuningRequest(Value, frozen=True):
    """As JSON. Paths are absolute."""

    draft: str
    """A plan's draft, TOML."""
    data: str
    """File with public records of the plan's task."""
    out: str
    """The draft with the best values, which must not exist."""
    study: str
    """SQLite file with the trials: another call goes on with them."""
    trials: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    """In all, those of earlier calls included."""
    public_size: Count | None = None
    """Of a site, which sets the noise; None: as many as the training records."""
    sites: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    """How many are played: their deltas are averaged, and with them their noise."""
    validation_share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.2
    """Of the records, for the loss that is made small."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0
    """Of the search, the division of the records, and the noise."""
    text_column: str = "text"
    label_column: str = "label"
    format: Format = "auto"
    """Where in the file the records are; as in a site's client.toml."""


class HoldoutColumns(Value, frozen=True):
    """Where in the holdout's file the records are; as in a site's client.toml."""

    text_column: str = "text"
    label_column: str = "label"
    format: Format = "auto"


class EvaluationRequest(Value, frozen=True):
    """What the evaluating process is asked, as JSON. Paths are absolute."""

    plan: str
    """A plan file's text."""
    adapter: str
    """File with the adapter's flat vector, float32 little-endian."""
    model: str
    """Folder of the base model."""
    holdout: str
    """File with public records that no site trains on."""
    before: str | None = None
    """File with the vector of the adapter before, for the drift."""
    general: str | None = None
    """File with texts that are not of the domain."""
    groups: str | None = None
    """The holdout's column that says which group a record is of."""
    columns: HoldoutColumns = HoldoutColumns()
    answers: AnswerCount = 50
    """Records that a language model is let answer, from the beginning of the holdout."""
    answer_tokens: AnswerTokens = 64
    """The longest answer."""
    batch_size: BatchSize = 32
    device: str = "cpu"
