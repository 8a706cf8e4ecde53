"""The outcome of a run: what the table, the report and `summary.json` show."""

import msgspec


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model on the held-out public set: a classifier, or a language model."""

    accuracy: float | None = None
    macro_f1: float | None = None
    perplexity: float | None = None
    """exp of the mean over records of their mean loss; None for a classifier, which has the two
    above."""
    perplexity_error: float | None = None
    """Standard error of the perplexity, from the spread of the records' losses."""
    general_perplexity: float | None = None
    """On text of no medicine: it rises as a model forgets."""


class Answers(msgspec.Struct, frozen=True):
    """What several models answer to one question of the public set."""

    prompt: str
    reference: str
    found: dict[str, str]
    """By the comparison whose model answered."""


class Comparison(msgspec.Struct, frozen=True):
    """One row of the final table."""

    name: str
    """base, majority, head-only, local-only, federated or pooled."""
    description: str
    score: Score
    parts: dict[str, Score] = {}
    """What a mean is taken over: one score for each site, in `local-only`."""


class Difference(msgspec.Struct, frozen=True):
    """A language model against the federated adapter, record by record of the public set.

    Records differ far more than models, so that this tells apart what the errors of two
    perplexities cannot.
    """

    share: float
    """By how much its perplexity is above the federated one, as a share of that; below: negative.
    Of `local-only`, from the mean of the sites' losses."""
    error: float
    """Standard error of the share."""


class CurvePoint(msgspec.Struct, frozen=True):
    """The federated adapter after a round; round 0 is the initial adapter."""

    round: int
    score: Score
    epsilon: dict[str, float | None]


class SiteResult(msgspec.Struct, frozen=True):
    """One site."""

    name: str
    records: int
    labels: dict[str, int]
    """Records of each label; of a language model, of each source."""
    epsilon: float | None
    """Spent over the whole job, against anyone; null without differential privacy."""
    delta: float | None
    noise_multiplier: float | None
    sampling_rate: float
    sent_clear_bytes: int
    """Bytes of model or data values that left unmasked: what the wire count found, not a claim."""
    sent_masked_bytes: int
    """Bytes of masked vectors that left."""
    sent_protocol_bytes: int
    """Keys, encrypted shares and signatures."""
    received_bytes: int


class RunSummary(msgspec.Struct, frozen=True):
    """Everything that a reader of a run wants to know."""

    name: str
    scenario: str
    seed: int
    insecure_test_seed: int | None
    """Not null: noise and masks were predictable; nothing here is private."""
    model: str
    data: str
    test_records: int
    method: str
    privacy: str
    """`local` or `none`."""
    rounds: int
    local_steps: int
    trained_parameters: int
    standard_error: float
    """Of the federated adapter's accuracy on a test set of this size, in units of accuracy; or of
    its perplexity."""
    comparisons: list[Comparison]
    curve: list[CurvePoint]
    sites: list[SiteResult]
    aborted_attempts: int
    adapter_digest: str
    transcript_head: str
    seconds: dict[str, float]
    """Wall time of each phase."""
    versions: dict[str, str]
    """Of the packages that shape the result."""
    answers: list[Answers] = []
    """Of a language model: some questions of the public set, and what each model answers."""
    differences: dict[str, Difference] = {}
    """Of a language model: each comparison against the federated adapter."""
