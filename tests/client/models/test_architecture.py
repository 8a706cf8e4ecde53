"""What small models of many kinds know and read, and what they are blamed for."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    EsmConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MPNetConfig,
    OPTConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from umbel_client.models.base.architecture import (
    naming_architecture,
    positions_of,
    require_context,
    vocabulary_of,
)
from umbel_common.errors import DataError, ModelError
from umbel_common.plans.plan import Classification

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 34,
    "pad_token_id": 1,
}
ENCODERS: list[tuple[type[PreTrainedConfig], int]] = [
    (BertConfig, 34),
    (RobertaConfig, 32),
    (XLMRobertaConfig, 32),
    (MPNetConfig, 32),
    (EsmConfig, 32),
    (OPTConfig, 34),
]
"""Each kind, and the number of tokens that it reads: no more than that."""


@pytest.mark.parametrize(("kind", "positions"), ENCODERS)
def test_the_last_position_is_read_and_no_other(
    kind: type[PreTrainedConfig], positions: int
) -> None:
    model = AutoModel.from_config(kind(**SIZES)).eval()
    assert (positions_of(model), vocabulary_of(model)) == (positions, 40)
    model(input_ids=torch.full((1, positions), 39))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, positions + 1), 39))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 40))


def test_models_that_count_no_positions_read_any_number() -> None:
    for config in (
        MambaConfig(hidden_size=8, num_hidden_layers=1),
        T5Config(d_model=8, d_ff=8, num_layers=1),
    ):
        with torch.device("meta"):
            assert positions_of(AutoModel.from_config(config)) is None
    with torch.device("meta"):
        assert positions_of(AutoModel.from_config(GPT2Config(n_embd=8, n_head=2))) == 1024
        assert positions_of(AutoModel.from_config(LlamaConfig(**SIZES))) == 34


def test_a_plan_for_longer_texts_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(RobertaConfig(**SIZES))
    task = Classification(labels=("a", "b"), max_tokens=32)
    require_context(Path("model"), model, task)
    with pytest.raises(ModelError) as caught:
        require_context(Path("model"), model, Classification(labels=("a", "b"), max_tokens=33))
    assert caught.value.accepted == "at most 32"


@pytest.mark.parametrize("kind", [UnboundLocalError, ValueError, TypeError, RuntimeError, KeyError])
def test_whatever_an_architecture_raises_names_it(kind: type[Exception]) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(BertConfig(**SIZES))
    with pytest.raises(ModelError) as caught, naming_architecture(model):
        raise kind("no")
    assert caught.value.field == "BertModel"
    assert kind.__name__ in str(caught.value.found)
    with pytest.raises(DataError), naming_architecture(model):
        raise DataError("ours")
