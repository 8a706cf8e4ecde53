"""How good an adapter is on public records: the figures, and the words that ask for them.

The server asks a process that has the packages for running a model; the server itself lacks them.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_common.canonical import Value

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Format: TypeAlias = Literal["auto", "messages", "prompt-completion", "instruction", "text"]
"""Layout of a causal language model's records; `auto`: recognised from the columns."""
AnswerCount = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
AnswerTokens = Annotated[int, msgspec.Meta(ge=1, le=4096)]
BatchSize = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Loss: TypeAlias = float | None
"""A loss in nats; None: not a finite number, because the adapter diverged."""


class GroupAccuracy(Value, frozen=True):
    """The accuracy on the records of one group, such as one age or one ward."""

    group: str
    records: int
    accuracy: Share


class ClassificationFigures(Value, frozen=True, tag_field="task", tag="classification"):
    """The figures of a classification."""

    accuracy: Share
    macro_f1: Share
    """F1 averaged over the labels that occur; a label that is never predicted counts as 0."""
    groups: tuple[GroupAccuracy, ...] = ()
    """Groups, sorted by name; empty: no column names a record's group."""


class CausalFigures(Value, frozen=True, tag_field="task", tag="causal-lm"):
    """The figures of a causal language model."""

    perplexity: Loss
    """exp(mean loss) over the tokens that the plan trains on."""
    general_perplexity: Loss = None
    """Perplexity over all tokens of a text outside the domain; it rises as a model forgets. None:
    there is no such text, or the perplexity is not finite."""
    answers: int = 0
    """Number of records that the model answered, by greedy decoding."""
    exact_match: Share | None = None
    """Share of the answers that equal the reference, apart from white space around them."""
    rouge_l: Share | None = None
    """Mean F-measure of ROUGE-L (Lin 2004) over the answers."""


class Evaluation(Value, frozen=True):
    """The figures of one adapter on one public holdout."""

    records: int
    mean_loss: Loss
    """Mean cross entropy: for a classification over its records, for a language model over the
    tokens that count."""
    figures: ClassificationFigures | CausalFigures
    drift: float | None = None
    """Euclidean norm of the change since the adapter before, over the norm of that adapter; None:
    no adapter came before, or its norm is zero."""


class GateResult(Value, frozen=True):
    """What a plan's release gate found about the adapter of a round."""

    before: Loss
    """Mean loss of the adapter that the round started from, on the public holdout."""
    after: Loss
    """Mean loss of the adapter that the round gave, on the same holdout."""
    bound: float
    """Largest increase of the mean loss with which the adapter is released."""
    metric: Literal["mean-loss"] = "mean-loss"

    def passed(self) -> bool:
        """Whether the adapter is released; if not, its predecessor is released once more."""
        if self.after is None:
            return False
        return self.before is None or self.after <= self.before + self.bound

    def __str__(self) -> str:
        return (
            f"{self.metric} {loss_text(self.after)} after {loss_text(self.before)},"
            f" at most {self.bound:g} more"
        )


def loss_text(loss: Loss) -> str:
    """A loss, or a perplexity, in a few characters."""
    return "not finite" if loss is None else f"{loss:.4g}"


def figures_text(evaluation: Evaluation) -> str:
    """The figures on one line."""
    parts = [f"loss {loss_text(evaluation.mean_loss)}"]
    match evaluation.figures:
        case ClassificationFigures() as figures:
            parts += [f"accuracy {figures.accuracy:.1%}", f"macro F1 {figures.macro_f1:.3f}"]
            if figures.groups:
                found = [group.accuracy for group in figures.groups]
                parts.append(f"{len(found)} groups from {min(found):.1%} to {max(found):.1%}")
        case CausalFigures() as figures:
            parts.append(f"perplexity {loss_text(figures.perplexity)}")
            if figures.general_perplexity is not None:
                parts.append(f"general {loss_text(figures.general_perplexity)}")
            if figures.exact_match is not None and figures.rouge_l is not None:
                parts.append(f"exact {figures.exact_match:.1%}, ROUGE-L {figures.rouge_l:.3f}")
    if evaluation.drift is not None:
        parts.append(f"drift {evaluation.drift:.3g}")
    return ", ".join(parts)
