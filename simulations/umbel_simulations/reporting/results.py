"""The outcome of a run, as the table, the report and `summary.json` show it."""

import msgspec


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """The score of a classifier or a language model on the held-out public set."""

    accuracy: float | None = None
    macro_f1: float | None = None
    perplexity: float | None = None
    """exp of the mean, over all records, of a record's mean loss. None for a classifier, which has
    the two figures above."""
    perplexity_error: float | None = None
    """Standard error of the perplexity, from the standard deviation of the records' losses."""
    general_perplexity: float | None = None
    """Perplexity on text about something else: it rises as a model forgets. None without one."""


class Answers(msgspec.Struct, frozen=True):
    """The answers of several models to one question of the public set."""

    prompt: str
    reference: str
    found: dict[str, str]
    """Answers by the name of the model."""


class Comparison(msgspec.Struct, frozen=True):
    """One row of the final table."""

    name: str
    """base, majority, head-only, local-only, federated or pooled."""
    description: str
    score: Score
    parts: dict[str, Score] = {}
    """The scores that a mean is taken over: in `local-only`, one for each site."""


class Difference(msgspec.Struct, frozen=True):
    """A language model compared with the federated adapter, record by record of the public set.

    Records differ far more than models do. So this comparison finds differences that are smaller
    than the errors of the two perplexities.
    """

    share: float
    """Its perplexity divided by the federated one, minus 1. For `local-only` it comes from the mean
    of the sites' losses."""
    error: float
    """Standard error of the share."""


class CurvePoint(msgspec.Struct, frozen=True):
    """The federated adapter after a round; round 0 has the initial adapter."""

    round: int
    score: Score
    epsilon: dict[str, float | None]


class SiteResult(msgspec.Struct, frozen=True):
    """The outcome of one site."""

    name: str
    records: int
    labels: dict[str, int]
    """Number of records of each label; for a language model, of each group."""
    epsilon: float | None
    """Epsilon spent over the whole job, against anyone; null without differential privacy."""
    delta: float | None
    noise_multiplier: float | None
    sampling_rate: float
    sent_clear_bytes: int
    """Bytes of model or data values that left unmasked, as counted on the wire."""
    sent_masked_bytes: int
    """Bytes of masked vectors that left."""
    sent_protocol_bytes: int
    """Bytes of keys, encrypted shares and signatures that left."""
    received_bytes: int
    units: int | None = None
    """Number of units, such as patients; null where each record is its own unit."""
    shared_epsilon: float | None = None
    """Epsilon spent over the whole job, against readers of the sums; null unless sites share their
    noise."""


class RunSummary(msgspec.Struct, frozen=True):
    """The whole outcome of a run."""

    name: str
    scenario: str
    seed: int
    insecure_test_seed: int | None
    """If not null, noise and masks were predictable and nothing in this run is private."""
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
    """Standard error of the federated adapter's accuracy (a share) on this test set, or of its
    perplexity."""
    comparisons: list[Comparison]
    curve: list[CurvePoint]
    sites: list[SiteResult]
    aborted_attempts: int
    adapter_digest: str
    transcript_head: str
    seconds: dict[str, float]
    """Wall time of each phase."""
    versions: dict[str, str]
    """Versions of the packages that influence the result."""
    answers: list[Answers] = []
    """For a language model: some questions of the public set, and each model's answers."""
    counted: list[str] = []
    """What the sites counted on records that they hold out, with its noise: a line for each round
    of a plan with a federated evaluation."""
    held_back: list[int] = []
    """Rounds whose adapter the release gate held back."""
    differences: dict[str, Difference] = {}
    """For a language model: each comparison against the federated adapter."""
