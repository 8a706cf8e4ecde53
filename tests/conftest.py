"""Shared by all tests: one thread a process, and small plans that need no model."""

import functools
import gc
import itertools
import os
import resource
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a test says of the CPU is true of the CPU: a GPU of this machine is not for tests.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a job that a shell put into the background. Programs that tests interrupt inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import msgspec
import pytest
import typer.testing
from support.homes import home, live_in, own_homes

from umbel_client.ledger.register import MACHINE
from umbel_common import errors
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Lora,
    Tensor,
    Training,
    TrainingPlan,
    TrainingPlan2,
    second_version,
)
from umbel_common.plans.server_optimizer import ServerOptimizer
from umbel_common.trust.identity import Identity, Member, Roster

_limit = resource.setrlimit


def _limit_but_core(kind: int, limits: tuple[int, int]) -> None:
    """A command that a test runs in this process would forbid core files to the tests after it, and
    not every root may raise that limit again."""
    if kind == resource.RLIMIT_CORE:
        limits = (limits[0], resource.getrlimit(kind)[1])
    _limit(kind, limits)


resource.setrlimit = _limit_but_core

own_homes()

# A program's commands are the same each time that a test calls one of them.
typer.testing._get_command = functools.cache(typer.testing._get_command)

hypothesis.settings.register_profile("ci", deadline=None)
# `make fuzz`: the targets of tests/fuzz then take the numbers of inputs that they name themselves.
hypothesis.settings.register_profile("fuzz", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

TENSORS = (
    Tensor(name="base_model.model.layer.query.lora_A.weight", shape=(2, 6), role="lora_A"),
    Tensor(name="base_model.model.layer.query.lora_B.weight", shape=(6, 2), role="lora_B"),
    Tensor(name="head.bias", shape=(3,), role="head"),
    Tensor(name="head.weight", shape=(3, 6), role="head"),
)

_NUMBERS = itertools.count()

LONGEST_FIRST = (
    "e2e/test_faults.py",
    "deploy/test_pods.py",
    "e2e/test_site_commands.py",
    "e2e/test_trainer_process.py",
    "client/planning/test_search.py",
    "adversarial/test_killed_site.py",
    "e2e/test_flower_transport.py",
    "e2e/test_slow_link.py",
    "e2e/test_proxies.py",
    "e2e/test_variants.py",
    "adversarial/test_killed_ledger.py",
    "e2e/test_flower_contract.py",
    "e2e/test_smoke_run.py",
    "adversarial/test_lying_server.py",
)
"""Files that take longest: a file begun last would be waited for by a worker with nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and leaves the order within each file."""
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from looking again and again at PyTorch's many objects."""
    gc.freeze()


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of home folders: of each test, of the fixtures of each file, and of all others."""
    assert not MACHINE.exists(), f"{MACHINE} is for the ledgers of real data: test elsewhere"
    folder = tmp_path_factory.mktemp("homes")
    live_in(folder / "fixtures")
    return folder


@pytest.fixture(scope="module", autouse=True)
def files_register(homes: Path) -> Iterator[None]:
    """Gives the fixtures of a file a register of ledgers of their own: another file's federation
    may have the same records."""
    with _home(homes):
        yield


@pytest.fixture(autouse=True)
def own_register(homes: Path) -> Iterator[None]:
    """Gives the test a register of ledgers of its own."""
    with _home(homes):
        yield


@contextmanager
def _home(homes: Path) -> Iterator[None]:
    before = home()
    live_in(homes / f"{next(_NUMBERS)}")
    yield
    live_in(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT of two layers with its tokenizer; its words are w0 to w34."""
    # Imported here: most tests need no torch.
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("model")
    config = BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=40,
        initializer_range=0.3,
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
    BertModel(config).save_pretrained(path)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(path)
    return path


@pytest.fixture
def make_plan() -> Callable[..., TrainingPlan]:
    """A valid plan of 45 parameters; keyword arguments replace its parts."""

    def make(**parts: object) -> TrainingPlan:
        fields: dict[str, object] = {
            "federation": "clinics",
            "job": "job",
            "model": BaseModel(name="tiny", digest=bytes(32)),
            "task": Classification(labels=("a", "b", "c")),
            "lora": Lora(
                rank=2,
                alpha=4.0,
                target_modules=("query",),
                layers=None,
                method="both",
                seed=7,
                tensors=TENSORS,
            ),
            "training": Training(
                rounds=3,
                local_steps=2,
                expected_batch_size=8,
                optimizer=Adam(adapter_learning_rate=1e-3, head_learning_rate=1e-2),
            ),
            "privacy": LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0),
            "aggregation": Aggregation(threshold=2, clip_range=1.0, step=1e-6),
        }
        return TrainingPlan(**{**fields, **parts})  # type: ignore[arg-type]  # fields by name

    return make


@pytest.fixture
def make_plan2(
    make_plan: Callable[..., TrainingPlan],
) -> Callable[..., TrainingPlan2]:
    """Like `make_plan`, in version 2: also with a `server` and a `method`."""

    def make(
        server: ServerOptimizer | None = None, method: str = "both", **parts: object
    ) -> TrainingPlan2:
        plan = make_plan(**parts)
        lora = msgspec.structs.replace(plan.lora, method=method)
        return second_version(msgspec.structs.replace(plan, lora=lora), server=server)

    return make


@pytest.fixture
def make_federation() -> Callable[[int], tuple[Identity, dict[str, Identity], Roster]]:
    """An operator, so many sites, and the roster that pins them."""

    def make(count: int) -> tuple[Identity, dict[str, Identity], Roster]:
        operator = Identity.generate(os.urandom)
        sites = {f"site-{index:02}": Identity.generate(os.urandom) for index in range(count)}
        members = tuple(
            Member(name=name, public_key=identity.public_key) for name, identity in sites.items()
        )
        return (
            operator,
            sites,
            Roster(federation="clinics", operator=operator.public_key, members=members),
        )

    return make


@pytest.fixture
def replace_everywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, object], None]:
    """Replaces a function of Umbel in every module that has imported it."""

    def replace(original: object, replacement: object) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("umbel_"):
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        monkeypatch.setattr(module, attribute, replacement)

    return replace


@pytest.fixture
def shared_proofs(replace_everywhere: Callable[[object, object], None]) -> None:
    """Lets the jobs of a process share one run of their tests for each model and plan."""
    # Imported here: most tests need no torch.
    from support.proofs import remembered_check_round, remembered_self_test

    from umbel_client.training.bit_test import check_round
    from umbel_client.training.self_test import self_test

    replace_everywhere(self_test, remembered_self_test)
    replace_everywhere(check_round, remembered_check_round)


@pytest.fixture
def without(replace_everywhere: Callable[[object, object], None]) -> Callable[..., None]:
    """Takes checks out of the protocol: `without("own-advert")`.

    An attack that a check stops must succeed without it, or the check proves nothing. Every refusal
    of the protocol goes through `errors.require`.
    """

    def take_out(*checks: str) -> None:
        def require(holds: bool, check: str, message: str, **details: object) -> None:
            if check not in checks:
                original(holds, check, message, **details)

        original = errors.require
        replace_everywhere(original, require)

    return take_out
