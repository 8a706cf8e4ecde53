"""Which model trains on which card: `make cards` writes docs/benchmarks/cards.json.

Bytes are measured on this machine's processor, on random models with one and two layers of the true
width; a model's are those of its layers, and of embedding and output layer by their shapes. Nothing
is measured on a GPU. Attention is PyTorch's `scaled_dot_product_attention`, as on a GPU.
"""

import gc
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_load import held_bytes, write_random
from support.small_models import plan_for

from umbel_client.dpsgd.batch_size import record_bytes
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.targets import all_linear
from umbel_client.models.base.placement import Quantisation
from umbel_common.plans.plan import CausalLm

TOKENS = 1024
RANK = 16
VOCABULARY = 1000
"""Of the models that are measured; what a vocabulary takes follows from its size."""
CARDS = (24, 48, 80, 141)
"""Memory in units of 10^9 bytes."""
USABLE = 0.9
"""Share of a card's memory: CUDA itself takes some, and some is lost between tensors. It is an
assumption."""


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, as its configuration says."""

    layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocabulary: int


SHAPES = {
    "1B (Llama 3.2)": Shape(16, 2048, 8192, 32, 8, 128_256),
    "3B (Llama 3.2)": Shape(28, 3072, 8192, 24, 8, 128_256),
    "7B (Llama 2)": Shape(32, 4096, 11_008, 32, 32, 32_000),
    "8B (Llama 3.1)": Shape(32, 4096, 14_336, 32, 8, 128_256),
    "14B (Qwen 2.5)": Shape(48, 5120, 13_824, 40, 8, 152_064),
    "32B (Qwen 2.5)": Shape(64, 5120, 27_648, 40, 8, 152_064),
    "70B (Llama 3.1)": Shape(80, 8192, 28_672, 64, 8, 128_256),
}


@dataclass(frozen=True)
class Measured:
    """Bytes of a model with some layers."""

    held: int
    """Parameters and buffers, without the adapter."""
    trained: int
    """Number of trained numbers."""
    record: int
    """What a record's forward pass keeps for its backward pass."""


def measured(
    shape: Shape, layers: int, quantisation: Quantisation, checkpointing: bool
) -> Measured:
    """Loads a random model of a shape, with this number of layers, as a site does."""
    sizes = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": TOKENS,
        "tie_word_embeddings": False,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_random(folder, sizes, shards=1)
        task = CausalLm(max_tokens=TOKENS)
        targets = all_linear(folder, task)
        plan = plan_for(folder, task, {"rank": RANK, "target_modules": targets})
        model = AdaptedModel.load(
            folder,
            plan,
            precision="bfloat16",
            quantisation=quantisation,
            checkpointing=checkpointing,
        )
    model.base.set_attn_implementation("sdpa")
    _, record, _ = record_bytes(model)
    trained = plan.lora.size
    return Measured(held_bytes(model) - 4 * trained, trained, record)


def whole(shape: Shape, quantisation: Quantisation, *, checkpointing: bool) -> Measured:
    """A whole model, from one with one layer and one with two."""
    one, two = (measured(shape, layers, quantisation, checkpointing) for layers in (1, 2))
    more = shape.layers - 1
    # Embeddings are held in float32, and the output layer in bfloat16.
    words = 6 * shape.hidden_size * (shape.vocabulary - VOCABULARY)
    return Measured(
        one.held + more * (two.held - one.held) + words,
        one.trained + more * (two.trained - one.trained),
        one.record + more * (two.record - one.record),
    )


def fitting(model: Measured, record: float) -> dict[str, int]:
    """The number of records that each card computes at once.

    Args:
        record: bytes of a record's activations.
    """
    # Parameter, gradient and clipped sum, and Adam's two moments, each in float32.
    fixed = model.held + 20 * model.trained
    each = record + 4 * model.trained
    return {str(card): max(0, int((USABLE * card * 1e9 - fixed) // each)) for card in CARDS}


def row(shape: Shape, plain: Measured, checkpointed: Measured) -> dict[str, Any]:
    """What is written of a model in one precision."""
    # In its backward pass, a layer's activations are there as well.
    least = checkpointed.record + plain.record / shape.layers
    return {
        "held": plain.held,
        "trained": plain.trained,
        "activations": plain.record,
        "activations_checkpointing": round(least),
        "records_at_once": fitting(plain, plain.record),
        "records_at_once_checkpointing": fitting(plain, least),
    }


def main(path: Path) -> None:
    """Measures, and writes `path` after each row."""
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    document = {
        "command": "make cards",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "rank": RANK,
        "usable": USABLE,
        "models": rows,
    }
    for name, shape in SHAPES.items():
        for quantisation in get_args(Quantisation):
            kind = "bfloat16" if quantisation == "none" else quantisation
            found = [whole(shape, quantisation, checkpointing=one) for one in (False, True)]
            rows.setdefault(name, {})[kind] = row(shape, *found)
            gc.collect()
            path.write_text(json.dumps(document, indent=2) + "\n")
            print(name, kind, rows[name][kind]["records_at_once_checkpointing"], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
