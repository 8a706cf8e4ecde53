"""The span check reads a site's tokens from its bare delta, and nothing from a private one."""

import os
from pathlib import Path

import numpy as np
import pytest
from support.small_models import plan_for, save_bert

from umbel_client.data.records import Record, Records
from umbel_common.plans.plan import Classification, LocalPrivacy, Sgd, Training, TrainingPlan
from umbel_simulations.audit.inversion import exposed, invert

WORDS = [f"w{index}" for index in range(595)]
TEXTS = ("w3 w141 w59 w26", "w535 w89 w79 w32", "w384 w62 w64 w338")
RANK = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(
        tmp_path_factory.mktemp("model"),
        WORDS,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        initializer_range=0.3,
    )


@pytest.fixture(scope="module")
def plan(folder: Path) -> TrainingPlan:
    plan = plan_for(
        folder,
        Classification(labels=("a", "b", "c")),
        {"alpha": 2.0, "target_modules": ("query",), "method": "ffa"},
        training=Training(
            rounds=3,
            local_steps=2,
            expected_batch_size=8,
            optimizer=Sgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
        ),
    )
    return exposed(plan, folder, RANK)


@pytest.fixture(scope="module")
def records() -> Records:
    """Twelve words between two special tokens: 14 inputs, below the rank."""
    return Records(
        records=tuple(Record(text=text, label=label) for label, text in enumerate(TEXTS)),
        source=bytes(32),
    )


def test_every_token_of_a_bare_delta_is_named_and_no_other(
    plan: TrainingPlan, folder: Path, records: Records
) -> None:
    result = invert(plan, folder, records, os.urandom, private=False)
    assert (result.epsilon, result.records, result.vocabulary) == (None, 3, 600)
    assert result.recovered == result.tokens == 14


def test_a_private_delta_names_tokens_no_better_than_chance(
    plan: TrainingPlan, folder: Path, records: Records
) -> None:
    games = [invert(plan, folder, records, os.urandom, private=True) for _ in range(10)]
    assert games[0].epsilon == 8.0
    assert games[0].chance == pytest.approx(14 / 600)
    # By chance 3.3 of 140 named tokens are right; 15 or more have probability 1e-6.
    assert sum(game.recovered for game in games) < 15


def test_a_batch_of_more_inputs_than_the_rank_hides_its_tokens(
    plan: TrainingPlan, folder: Path
) -> None:
    """The condition of the attack, and the reason why small adapters on large batches escape it."""
    random = np.random.default_rng(1)
    texts = [" ".join(random.choice(WORDS, 6)) for _ in range(20)]
    records = Records(
        records=tuple(Record(text=text, label=n % 3) for n, text in enumerate(texts)),
        source=bytes(32),
    )
    result = invert(plan, folder, records, os.urandom, private=False)
    assert result.recovered < 3 * result.chance * result.tokens


def test_the_exposed_plan_keeps_the_privacy_that_it_is_tried_with(plan: TrainingPlan) -> None:
    assert plan.privacy == LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0)
    assert plan.training.steps == 1
    assert (plan.lora.layers, plan.lora.rank) == ((0,), RANK)
