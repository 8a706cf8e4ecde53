"""How good an adapter is on public records: what is asked of the process that can run a model, and
what it answers. The server asks it, without the packages that a model takes.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from umbel_common.canonical import Value

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Format: TypeAlias = Literal["auto", "messages", "prompt-completion", "instruction", "text"]
"""In which columns a causal language model's records are; `auto`: what the columns say."""
AnswerCount = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
AnswerTokens = Annotated[int, msgspec.Meta(ge=1, le=4096)]
BatchSize = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Loss: TypeAlias = float | None
"""In nats; None: not a finite number, as of an adapter that diverged."""


class GroupAccuracy(Value, frozen=True):
    """The accuracy on the records of one group, such as those of one age or one ward."""

    group: str
    records: int
    accuracy: Share


class ClassificationFigures(Value, frozen=True, tag_field="task", tag="classification"):
    """Of a classification."""

    accuracy: Share
    macro_f1: Share
    """F1 averaged over the labels that occur; a label that is never predicted counts as 0."""
    groups: tuple[GroupAccuracy, ...] = ()
    """In the order of their names; empty: no column says which group a record is of."""


class CausalFigures(Value, frozen=True, tag_field="task", tag="causal-lm"):
    """Of a causal language model."""

    perplexity: Loss
    """exp(mean loss): of the tokens that the plan trains on."""
    general_perplexity: Loss = None
    """Of all tokens of a text that is not of the domain: it rises as a model forgets. None: there
    is no such text, or it is no finite number."""
    answers: int = 0
    """Records that the model was let answer, greedily."""
    exact_match: Share | None = None
    """Share of the answers that are the reference, but for white space around them."""
    rouge_l: Share | None = None
    """Mean F-measure of ROUGE-L (Lin 2004) over the answers."""


class Evaluation(Value, frozen=True):
    """One adapter on one public holdout."""

    records: int
    mean_loss: Loss
    """Cross entropy: over the records of a classification, over the tokens that count of a language
    model."""
    figures: ClassificationFigures | CausalFigures
    drift: float | None = None
    """Euclidean norm of what the adapter changed by, over the norm of the one before; None: there
    is none before, or it is zero."""


class GateResult(Value, frozen=True):
    """What a plan's release gate found of the adapter that a round gave."""

    before: Loss
    """Mean loss on the public holdout of the adapter that the round started from."""
    after: Loss
    """That of the adapter that the round gave."""
    bound: float
    """Largest increase with which the adapter is released."""
    metric: Literal["mean-loss"] = "mean-loss"

    def passed(self) -> bool:
        """Whether the adapter is released; else its predecessor is, once more."""
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
    """The figures in one line."""
    parts = [f"loss {loss_text(evaluation.mean_loss)}"]
    match evaluation.figures:
        case ClassificationFigures() as figures:
            parts += [f"accuracy {figures.accuracy:.1%}", f"macro F1 {figures.macro_f1:.3f}"]
            parts += [f"{group.group} {group.accuracy:.1%}" for group in figures.groups]
        case CausalFigures() as figures:
            parts.append(f"perplexity {loss_text(figures.perplexity)}")
            if figures.general_perplexity is not None:
                parts.append(f"general {loss_text(figures.general_perplexity)}")
            if figures.exact_match is not None and figures.rouge_l is not None:
                parts.append(f"exact {figures.exact_match:.1%}, ROUGE-L {figures.rouge_l:.3f}")
    if evaluation.drift is not None:
        parts.append(f"drift {evaluation.drift:.3g}")
    return ", ".join(parts)
