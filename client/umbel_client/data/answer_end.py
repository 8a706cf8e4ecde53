"""Where an answer ends: by its template, its tokenizer and its model.

Only tokens that stand for themselves end an answer. A model may name others, such as a line feed,
which people write within answers too.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from umbel_common.errors import ModelError
from umbel_host.files.model_folder import (
    FileDigests,
    ends_of_config,
    ends_of_generation,
    read_texts,
)


@dataclass(frozen=True)
class AnswerEnd:
    """The end of an answer, as a template writes it."""

    text: str
    """What counts with the answer; empty: the template writes nothing that is seen."""
    before: str
    """The part of it before `token`, such as a quotation mark."""
    token: int | None
    """The token that ends the answer; None: it takes several, or shares one with other text."""


class AnswerEnds:
    """The ends of a model's answers."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, folder: Path, files: FileDigests | None
    ) -> None:
        """Reads nothing yet.

        Args:
            folder: the base model's, for its configuration.
            files: see `umbel_client.data.tokens.load_tokenizer`.
        """
        self._tokenizer = tokenizer
        self._folder = folder
        self._files = files
        self.behind = cache(self._behind)
        """The end of an answer, in what a template writes behind it: str -> AnswerEnd."""

    def _behind(self, closing: str) -> AnswerEnd:
        found = self._tokenizer(closing, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if token in self._own_tokens:
                return AnswerEnd(closing[:end].rstrip(), closing[:start].strip(), token)
        return AnswerEnd(closing.rstrip(), "", None)

    @cached_property
    def of_text(self) -> int | None:
        """The token that ends a text, if the tokenizer or the model has one."""
        end: object = self._tokenizer.eos_token_id
        return end if isinstance(end, int) else next(iter(self._by_config), None)

    @cached_property
    def in_records(self) -> frozenset[int]:
        """The tokens that end a record's answer, whatever its template writes."""
        known = () if self.of_text is None else (self.of_text,)
        return frozenset([*known, *self._by_config])

    @cached_property
    def of_model(self) -> frozenset[int]:
        """The tokens at which a model stops: also those of its settings of generation."""
        return self.in_records | self._own_tokens & {*ends_of_generation(self._folder)}

    def missing(self) -> ModelError:
        """The error about a model without a token that ends a text."""
        return ModelError(
            "the base model's tokenizer has no token that ends a text",
            file=self._folder,
            field="eos_token",
            found="no eos_token, and no special token that is the eos_token_id of config.json",
            accepted="an eos_token in tokenizer_config.json, or a chat template that ends its"
            " answers",
        )

    @cached_property
    def _own_tokens(self) -> frozenset[int]:
        """The tokens that stand for themselves, and for no text that people write."""
        tokenizer = self._tokenizer
        return frozenset([*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids])

    @cached_property
    def _by_config(self) -> list[int]:
        """The tokens that end a text by the model's configuration."""
        texts = read_texts(self._folder, self._files)
        return [one for one in ends_of_config(self._folder, texts) if one in self._own_tokens]
