"""A plan is made from a draft and a model's folder, in a process of its own."""

import hashlib
from pathlib import Path

import pytest
from support import warm_python
from support.small_models import save_decoder

from umbel_client import drafting
from umbel_client.drafting import made
from umbel_client.planning.draft import read_plan
from umbel_common.errors import ConfigError, DataError, ModelError, PlanError
from umbel_common.plans.plan import CausalLm, LossGate
from umbel_common.plans.plan_file import is_not_tried, plan_from_json, plan_to_json
from umbel_common.plans.server_optimizer import Average, Schedule, ServerSgd
from umbel_host.files.model_digest import folder_digest

DRAFT = """
federation = "clinics"
job = "triage"
seed = 5

[model]
name = "tiny"
path = "{model}"

[task]
task = "classification"
labels = ["a", "b"]

[lora]
rank = 2
alpha = 4.0
target_modules = ["query"]
method = "ffa"

[training]
rounds = 2
local_steps = 1
expected_batch_size = 8
optimizer = {{ optimizer = "sgd", adapter_learning_rate = 0.1, head_learning_rate = 0.1 }}

[privacy]
mode = "local"
epsilon = 3.0
delta = 1e-4
clip_norm = 1.0

[aggregation]
threshold = 3
clip_range = 1.0
step = 1e-6
"""


@pytest.fixture
def draft(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "draft.toml"
    path.write_text(DRAFT.format(model=tiny_model))
    return path


def test_a_draft_becomes_a_plan_with_what_the_model_has(draft: Path, tiny_model: Path) -> None:
    plan = read_plan(draft)
    assert plan.model.digest == folder_digest(tiny_model)
    assert [tensor.shape for tensor in plan.lora.tensors if tensor.role == "lora_A"] == [
        (2, 16),
        (2, 16),
    ]


SERVER = """
[server]
optimizer = "sgd"
adapter_learning_rate = 0.5
head_learning_rate = 10.0

[server.schedule]
warmup_rounds = 1
decay = "cosine"
final = 0.1
"""


def test_a_draft_names_the_servers_optimizer(draft: Path) -> None:
    assert read_plan(draft).server == Average()
    draft.write_text(draft.read_text() + SERVER)
    assert read_plan(draft).server == ServerSgd(
        adapter_learning_rate=0.5,
        head_learning_rate=10.0,
        schedule=Schedule(warmup_rounds=1, decay="cosine", final=0.1),
    )
    draft.write_text(draft.read_text().replace("warmup_rounds = 1", "warmup_rounds = 2"))
    with pytest.raises(PlanError, match="warm-up"):
        read_plan(draft)
    draft.write_text(draft.read_text().replace("decay =", "decline ="))
    with pytest.raises(ConfigError, match="decline"):
        read_plan(draft)


def test_the_process_prints_the_plans_file_and_nothing_else(draft: Path) -> None:
    done = warm_python.run("-m", "umbel_client.drafting", draft)
    assert done.returncode == 0, done.stderr
    assert plan_from_json(done.stdout, draft) == (read_plan(draft), None)


def test_a_relative_path_starts_at_the_draft(draft: Path, tiny_model: Path) -> None:
    (draft.parent / "models").symlink_to(tiny_model.parent)
    text = draft.read_text().replace(str(tiny_model), f"models/{tiny_model.name}")
    draft.write_text(text)
    assert read_plan(draft).model.digest == folder_digest(tiny_model)


@pytest.mark.parametrize(
    ("old", "new", "kind", "code"),
    [
        ("rounds = 2", "runds = 2", ConfigError, 10),
        ('path = "/', 'path = "/nowhere/', ModelError, 12),
        ('["query"]', '["quarry"]', ModelError, 12),
        ('"sgd"', '"adagrad"', ConfigError, 10),
        (
            "[aggregation]",
            '[aggregation]\nweights = "examples"\nmax_weight = 9',
            PlanError,
            13,
        ),
    ],
)
def test_a_bad_draft_is_one_clear_error(
    draft: Path, old: str, new: str, kind: type[Exception], code: int
) -> None:
    text = draft.read_text()
    assert old in text
    draft.write_text(text.replace(old, new, 1))
    with pytest.raises(kind):
        read_plan(draft)
    done = warm_python.run("-m", "umbel_client.drafting", draft)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")


def test_a_draft_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        read_plan(tmp_path / "none.toml")


def causal_draft(folder: Path, model: Path, lora: str) -> Path:
    text = DRAFT.format(model=model)
    text = text.replace('task = "classification"\nlabels = ["a", "b"]', 'task = "causal-lm"')
    text = text.replace('target_modules = ["query"]', lora).replace(
        ", head_learning_rate = 0.1", ""
    )
    path = folder / "draft.toml"
    path.write_text(text)
    return path


def test_a_draft_for_a_language_model_may_name_all_linear_layers(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "llama")
    draft = causal_draft(
        tmp_path, model, 'target_modules = "all-linear"\nscaling = "rank-stabilised"'
    )
    plan = read_plan(draft)
    assert plan.task == CausalLm()
    assert set(plan.lora.target_modules) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert len(plan.lora.tensors) == 3 * 7 * 2
    assert {tensor.role for tensor in plan.lora.tensors} == {"lora_A", "lora_B"}
    assert plan.lora.scaling == "rank-stabilised"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("use_dora = true", "DoRA"),
        ("lora_dropout = 0.1", "batch and noise"),
        ('bias = "all"', "biases"),
        ('modules_to_save = ["embed_tokens"]', "embeddings, norms"),
    ],
)
def test_what_has_no_gradient_for_each_record_is_refused_with_the_reason(
    tmp_path: Path, setting: str, reason: str
) -> None:
    model = save_decoder(tmp_path / "llama")
    draft = causal_draft(tmp_path, model, f'target_modules = ["q_proj"]\n{setting}')
    with pytest.raises(PlanError, match=reason) as caught:
        read_plan(draft)
    assert caught.value.field == f"lora.{setting.split()[0]}"


def test_a_language_model_has_no_labels(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "llama")
    draft = causal_draft(tmp_path, model, 'target_modules = ["q_proj"]')
    draft.write_text(draft.read_text().replace("[lora]", 'labels = ["a", "b"]\n\n[lora]'))
    with pytest.raises(ConfigError, match="labels"):
        read_plan(draft)


def test_a_gates_holdout_is_named_by_the_digest_of_its_file(draft: Path) -> None:
    holdout = draft.parent / "public.jsonl"
    holdout.write_text('{"text": "w1", "label": "a"}\n')
    gate = '[release_gate]\nholdout = "public.jsonl"\nmax_loss_increase = 0.05\n'
    draft.write_text(draft.read_text() + gate)
    assert read_plan(draft).release_gate == LossGate(
        holdout=hashlib.sha256(holdout.read_bytes()).digest(), max_loss_increase=0.05
    )
    holdout.unlink()
    with pytest.raises(DataError, match=r"public\.jsonl"):
        read_plan(draft)
    holdout.mkdir()
    with pytest.raises(DataError, match="a folder"):
        read_plan(draft)


def test_a_plan_is_tried_with_the_model_that_it_names(
    draft: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = plan_to_json(read_plan(draft), not_tried=True)
    (tmp_path / "plan.json").write_text(text)
    tried = made(tmp_path / "plan.json", tiny_model)
    assert is_not_tried(text)
    assert not is_not_tried(tried)
    assert plan_from_json(tried, "tried")[0] == plan_from_json(text, "text")[0]
    with monkeypatch.context() as patch:
        patch.setattr(drafting, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match=r"evaluation\.python"):
            made(tmp_path / "plan.json", tiny_model)
    other = save_decoder(tmp_path / "other")
    with pytest.raises(ModelError, match="not the one that the plan names"):
        made(tmp_path / "plan.json", other)
