"""A model in which values decide how records are computed is refused, although its bits are equal
in the companies that are tried."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processors import skip_without_avx512
from support.small_models import DECODERS, FUSED, plan_for, save_decoder
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from umbel_client.data.tokens import Tokens
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base import skeleton
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit, Part
from umbel_client.training import bit_test, self_test
from umbel_client.training.blind_test import blind_test
from umbel_common.errors import ModelError
from umbel_common.plans.plan import CausalLm, Classification

TASK = CausalLm(max_tokens=16)


def loaded(folder: Path, **lora: object) -> AdaptedModel:
    model = AdaptedModel.load(folder, plan_for(folder, TASK, dict(lora)))
    model.select(1)
    return model


@pytest.mark.parametrize(("kind", "target"), [("mixtral", "q_proj"), ("jetmoe", "kv_proj")])
def test_a_mixture_of_experts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, target: str
) -> None:
    """How many rows an expert computes follows from all tokens of a batch. JetMoE counts them with
    an operation that reads nothing, and copies the counts to Python without an operation."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_local_experts": 4}
    if kind == "jetmoe":
        sizes |= {"kv_channels": 16, "num_key_value_heads": 4}
    folder = save_decoder(tmp_path / "m", kind, **sizes)
    model = loaded(folder, target_modules=(target,))
    with pytest.raises(ModelError, match="may depend on the records beside it"):
        self_test.self_test(model, 1.0, BatchLimit(4), entropy=os.urandom)
    # Without this test, others pass, and the record's bits follow from the others' words.
    monkeypatch.setattr(self_test, "blind_test", lambda _model: None)
    self_test.self_test(model, 1.0, BatchLimit(4), entropy=os.urandom)
    random = np.random.default_rng(0)
    words = [None, *random.integers(5, 250, 30)]
    found = {tuple(bits_beside(model, word)) for word in words}
    skip_without_avx512(unless=len(found) > 1)
    assert len(found) > 1


def bits_beside(model: AdaptedModel, word: int | None) -> list[bytes]:
    """The bits of a record whose three neighbours say one word again and again, or many words."""
    random = np.random.default_rng(1)
    ids = random.integers(5, 250, 64)
    if word is not None:
        ids[16:] = word
    tokens = Tokens(ids.astype(np.int32), np.arange(0, 65, 16), 0)
    data = PreparedData(tokens, ids.astype(np.int64), None)
    company = bit_test._Company(data, Part(np.arange(4), 16, 4), np.arange(1))
    return bit_test._gradient_bits(model, company)


TRIGGER = 29_000
"""A token whose hidden state has one large value; no made-up record has it."""


def save_int8(path: Path) -> Path:
    """Saves a decoder of which some layers are quantised as in LLM.int8 (Dettmers et al. 2022).

    A column in which any row of a batch has a large value is computed in float16, for every row.
    """
    save_decoder(path, vocab_size=30_000, hidden_size=64, num_hidden_layers=1)
    weights = load_file(path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[TRIGGER] = 0
    embedding[TRIGGER, 3] = 50
    for name in ("gate_proj", "up_proj"):
        key = f"model.layers.0.mlp.{name}"
        weight = weights[f"{key}.weight"]
        largest = weight.abs().amax(1)
        weights[f"{key}.weight"] = (weight * 127 / largest[:, None]).round().to(torch.int8)
        weights[f"{key}.SCB"] = largest
        weights[f"{key}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": 7.0,
        "llm_int8_skip_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "lm_head"],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_layers_of_another_package_that_read_values_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = save_int8(tmp_path / "m")
    with pytest.raises(ModelError, match="asks for quantised layers"):
        plan_for(folder, TASK)
    with monkeypatch.context() as removed:
        removed.setattr(skeleton, "_require_unquantised", lambda *_: None)
        model = loaded(folder)
    with pytest.raises(ModelError, match="bitsandbytes::int8"):
        blind_test(model)
    # Without this test, others pass, and a record's bits follow from a word of another one.
    monkeypatch.setattr(self_test, "blind_test", lambda _model: None)
    self_test.self_test(model, 1.0, BatchLimit(4), entropy=os.urandom)
    assert bits_beside(model, 6) == bits_beside(model, 7) != bits_beside(model, TRIGGER)


def test_four_bit_layers_pass(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = save_decoder(tmp_path / "m")
    model = AdaptedModel.load(folder, plan_for(folder, TASK), quantisation="nf4")
    model.select(1)
    blind_test(model)


def test_frequencies_that_follow_the_longest_text_so_far_are_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = loaded(save_decoder(tmp_path / "m", rope_parameters=scaling))
    with pytest.raises(ModelError, match="_local_scalar_dense"):
        blind_test(model)


def test_a_layer_that_picks_rows_is_refused(tiny_model: Path) -> None:
    plan = plan_for(tiny_model, Classification(labels=("a", "b"), max_tokens=16))
    model = AdaptedModel.load(tiny_model, plan)
    blind_test(model)
    layer: torch.nn.Module = model.base.encoder.layer[0]  # type: ignore[union-attr, index]  # BERT

    def picks(_layer: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        chosen = output[..., 0] > 0
        output[chosen] = output[chosen] * 2
        return output

    layer.register_forward_hook(picks)
    with pytest.raises(ModelError, match="masked_select"):
        blind_test(model)


@pytest.fixture
def other_package() -> Iterator[None]:
    """A package with an operation that has the name of a permitted one."""
    library = torch.library.Library("umbel_tests", "FRAGMENT")
    library.define("gemm_4bit(Tensor x) -> Tensor")
    library.impl("gemm_4bit", torch.clone, "CompositeExplicitAutograd")
    yield
    library._destroy()


ENCODER = torch.nn.TransformerEncoder(
    torch.nn.TransformerEncoderLayer(16, 2, 8, batch_first=True), 1
).eval()
"""In evaluation, it leaves padding out of its products."""

READERS: dict[str, Callable[[torch.Tensor], object]] = {
    "tolist": lambda x: x.argmax(-1).tolist(),
    "numpy": lambda x: x.numpy(),
    "__array__": lambda x: np.asarray(x),
    "tensor_split": lambda x: x.tensor_split(x[0].argmax(-1)),
    "equal": lambda x: torch.equal(x[0], x[1]),
    "unique_consecutive": lambda x: torch.unique_consecutive(x.argmax(-1)),
    "repeat_interleave": lambda x: torch.repeat_interleave(x.argmax(-1).flatten()),
    "masked_scatter": lambda x: x.masked_scatter(x > 0, x),
    "_nested_tensor_from_mask": lambda x: ENCODER(x, src_key_padding_mask=x[..., 0] > 9),
    "_to_sparse": lambda x: x[0].relu().to_sparse() @ x[0].T,
    "_to_sparse_csr": lambda x: x[0].relu().to_sparse_csr() @ x[0].T,
    "masked_select": lambda x: torch.ops.aten._unsafe_index_put(x, [x > 0], x[0, 0, :1]),
    "umbel_tests::gemm_4bit": lambda x: torch.ops.umbel_tests.gemm_4bit(x),
}


@pytest.mark.parametrize("found", READERS)
def test_each_way_to_read_values_is_seen(tiny_model: Path, other_package: None, found: str) -> None:
    model = AdaptedModel.load(
        tiny_model, plan_for(tiny_model, Classification(labels=("a", "b"), max_tokens=16))
    )
    layer: torch.nn.Module = model.base.encoder.layer[0]  # type: ignore[union-attr, index]  # BERT

    def reads(_layer: object, _inputs: object, output: torch.Tensor) -> None:
        READERS[found](output)

    layer.register_forward_hook(reads)
    with pytest.raises(ModelError, match=rf"found: {found} \("):
        blind_test(model)


@pytest.mark.parametrize("kind", [*DECODERS, *FUSED])
def test_dense_decoders_pass(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {"gpt2": ("c_attn",), "phi3": ("qkv_proj",)}.get(kind, ("q_proj", "v_proj"))
    model = loaded(save_decoder(tmp_path / "m", kind), target_modules=targets)
    blind_test(model)
    if model.base.config._attn_implementation == "sdpa":
        # They read the mask where Transformers decides whether one is needed.
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa_mask)
        with pytest.raises(ModelError, match="_local_scalar_dense"):
            blind_test(model)
