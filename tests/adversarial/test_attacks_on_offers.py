"""A server that asks about records with what costs nothing: offers, and rounds that fail.

Each attack runs twice: as the code is, and with the fix taken out (`looking_first`, `drawn_again`),
where it must reach its goal.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from adversarial.federation import KeptObserver
from support.small_language_model import TEMPLATE, causal_plan, save_llama
from transformers import AutoTokenizer

from umbel_client.data.conversations import Conversation, Turn
from umbel_client.data.hold_out import _position, hold_out
from umbel_client.data.records import Misfit, refuse
from umbel_client.data.site_data import SiteData
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import Register
from umbel_client.models.adapted_model import AdaptedModel
from umbel_client.site.config import ClientConfig, ModelConfig, load_config
from umbel_client.site.pinned_roster import Pinned
from umbel_client.tasks import prepared
from umbel_client.tasks.physical_batches import BatchLimit
from umbel_client.trainer import handler, opening
from umbel_client.trainer.handler import Trainer
from umbel_client.trainer.local_job import FAILED, LocalJob
from umbel_client.training.round import LocalTrainer
from umbel_common.adapters.vector import adapter_digest, initial_vector, to_bytes
from umbel_common.errors import DataError, LedgerError, ModelError, StorageError
from umbel_common.plans.plan import CausalLm, FederatedEvaluation, LocalPrivacy, TrainingPlan
from umbel_common.plans.statements import Release, RoundHeader
from umbel_common.protocol.wire import (
    OfferReply,
    OfferRequest,
    Refusal,
    Reply,
    Request,
    TrainRequest,
    open_reply,
    request_digest,
    seal_request,
    size_limit,
)
from umbel_common.trust.identity import Identity, Member, Roster, sign
from umbel_host.files.model_digest import folder_digest

SITE = "site-00"
OPERATOR = Identity(bytes(31) + b"\x01")
IDENTITIES = {f"site-{number:02}": Identity(bytes(31) + bytes([2 + number])) for number in range(3)}
ROSTER = Roster(
    federation="f",
    operator=OPERATOR.public_key,
    members=tuple(Member(name=n, public_key=i.public_key) for n, i in IDENTITIES.items()),
)
Row = dict[str, Any]
ORDINARY: list[Row] = [
    {"prompt": f"w{number % 7} w2", "completion": "w3 w4"} for number in range(12)
]


def turns(*contents: str) -> Row:
    roles = ("user", "assistant") if len(contents) == 2 else ("system", "user", "assistant")
    return {
        "messages": [
            {"role": role, "content": text} for role, text in zip(roles, contents, strict=True)
        ]
    }


CONVERSATIONS = [turns(row["prompt"], row["completion"]) for row in ORDINARY]
SECRET = "w13"
NEIGHBOURS: dict[str, tuple[list[Row], Row]] = {
    "a long record": (ORDINARY, {"prompt": "w1", "completion": "w3 " * 40}),
    "a long prompt": (ORDINARY, {"prompt": "w1 " * 29, "completion": "w3"}),
    "a system turn": (CONVERSATIONS, turns("w1", "w2", "w3")),
    "a word on which the template fails": (ORDINARY, {"prompt": SECRET, "completion": "w3"}),
    "a token that the model does not know": (ORDINARY, {"prompt": "<more>", "completion": "w3"}),
}
"""Two neighbouring data sets each: the records, and one more."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template fails on a word, and whose tokenizer has a token too many."""
    folder = save_llama(tmp_path_factory.mktemp("telling") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if '" + SECRET + "' in message['content'] %}"
        "{{ message['content'] + 1 }}{% endif %}{% endfor %}" + TEMPLATE
    )
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(model: Path) -> TrainingPlan:
    aggregation = msgspec.structs.replace(causal_plan(model).aggregation, threshold=3)
    # Every record in every batch: the accountant answers that at once.
    training = msgspec.structs.replace(causal_plan(model).training, expected_batch_size=12)
    privacy = LocalPrivacy(epsilon=8.0, delta=1e-4, clip_norm=1.0)
    return causal_plan(model, privacy=privacy, aggregation=aggregation, training=training)


class Site:
    """A real site with the same keys in every world, so that its answers can be compared."""

    def __init__(self, folder: Path, model: Path, rows: Sequence[Row], data: str = "") -> None:
        folder.mkdir()
        self.data = folder / "data.jsonl"
        self.write(rows)
        (folder / "client.toml").write_text(
            f'site = "{SITE}"\nstate = "state"\nidentity = "identity.pem"\nroster = "roster.json"\n'
            f'[data]\npath = "data.jsonl"\npublic_size = 12\n{data}\n[model]\npath = "{model}"\n'
            f'[policy]\nmodels = ["{folder_digest(model).hex()}"]\ntasks = ["causal-lm"]\n'
            'approval = "none"\nmax_epsilon = 8.0\ntotal_epsilon = 10.0\nmax_delta = 1e-4\n'
            "federated_evaluation = true\n"
        )
        self.config = load_config(folder / "client.toml")
        self.start()

    def start(self) -> None:
        self.observer = KeptObserver()
        self.trainer = Trainer(
            self.config,
            Pinned(ROSTER, frozenset()),
            IDENTITIES[SITE],
            observer=self.observer,
            # Each world is a machine of its own.
            register=Register(self.data.parent / "ledgers"),
        )

    def ledger(self) -> Ledger:
        """The ledger of the job that is open."""
        assert self.trainer._job is not None
        return self.trainer._job._ledger

    def write(self, rows: Sequence[Row]) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def handle(self, request: Request) -> bytes:
        return self.trainer.handle(seal_request(OPERATOR, SITE, request))

    def ask(self, request: Request, limit: int) -> Reply:
        sealed = seal_request(OPERATOR, SITE, request)
        key = IDENTITIES[SITE].public_key
        return open_reply(
            key, SITE, self.trainer.handle(sealed), request_digest(sealed), limit=limit
        )

    def accepts(self, plan: TrainingPlan) -> bool:
        return isinstance(self.ask(offer(plan), size_limit(plan)), OfferReply)


def offer(plan: TrainingPlan) -> OfferRequest:
    return OfferRequest(plan=sign(OPERATOR, plan))


def asking(plan: TrainingPlan, **task: Any) -> TrainingPlan:
    """A plan under a name of its own, as a job has one plan."""
    fields = {"max_tokens": 64, **task}
    name = "-".join(f"{key}-{value}" for key, value in sorted(fields.items())).replace("_", "-")
    return msgspec.structs.replace(plan, job=name, task=CausalLm(**fields))


def hostile_plans(plan: TrainingPlan, lengths: Sequence[int] = (16, 64)) -> Iterator[TrainingPlan]:
    """Each combination of what a plan may say about how records are read, and an evaluation."""
    for tokens, template, loss_on, too_long in product(
        lengths, ("chat", "plain"), ("answer", "all"), ("refuse", "truncate")
    ):
        yield asking(plan, max_tokens=tokens, template=template, loss_on=loss_on, too_long=too_long)
    yield msgspec.structs.replace(
        asking(plan, max_tokens=63),
        evaluation=FederatedEvaluation(noise_multiplier=1e6, max_records=100),
    )


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads one model for all offers, and tests it not at all: neither sees a record."""
    models: list[AdaptedModel] = []
    load = opening.load_site_model

    def once(config: ModelConfig, plan: TrainingPlan, **options: Any) -> AdaptedModel:
        if not models:
            models.append(load(config, plan, **options))
        models[0].plan = plan
        return models[0]

    monkeypatch.setattr(opening, "load_site_model", once)
    for name in ("self_test", "largest_record_test"):
        monkeypatch.setattr(opening, name, lambda *_, **__: None)
    monkeypatch.setattr(opening, "choose_batch_limit", lambda *_: BatchLimit(4))


@contextmanager
def looking_first(*, misfit: Misfit = refuse) -> Iterator[None]:
    """Takes the fix out: a site reads and prepares its records before it answers an offer."""

    def opened(config: ClientConfig, plan: TrainingPlan, *rest: Any, **options: Any) -> LocalJob:
        roster, _ = rest
        found = opening.open_job(config, plan, roster, SiteData.load(config), **options)
        try:
            parts = [found._records]
            if plan.evaluation is not None:
                parts = list(hold_out(found._records, config.data.evaluation_share))
            for part in parts:
                if not len(part):
                    raise DataError("too few records to train on some and score on others")
                found._prepare(part, misfit)
        except BaseException:
            found.close()
            raise
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "open_job", opened)
        yield


@pytest.fixture
def worlds(tmp_path: Path, model: Path) -> Iterator[Callable[..., Site]]:
    """Starts sites with other records, each in a folder of its own."""
    sites: list[Site] = []

    def start(rows: Sequence[Row], data: str = "") -> Site:
        sites.append(Site(tmp_path / str(len(sites)), model, rows, data))
        return sites[-1]

    yield start
    for site in sites:
        site.trainer.close()


def differing(sites: Sequence[Site], plans: Sequence[TrainingPlan]) -> Iterator[str]:
    """Yields the jobs for which the sites do not answer with the same sealed bytes."""
    for plan in plans:
        if len({site.handle(offer(plan)) for site in sites}) > 1:
            yield plan.job


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_two_neighbouring_data_sets_answer_every_offer_with_the_same_bytes(
    worlds: Callable[..., Site], plan: TrainingPlan, name: str
) -> None:
    rows, more = NEIGHBOURS[name]
    plans = list(hostile_plans(plan))
    assert list(differing([worlds(rows), worlds([*rows, more])], plans)) == []
    with looking_first():
        assert any(differing([worlds(rows), worlds([*rows, more])], plans))


@pytest.mark.usefixtures("loaded_once")
def test_whether_any_record_is_held_out_is_no_answer(
    worlds: Callable[..., Site], plan: TrainingPlan
) -> None:
    def is_held(row: Row) -> bool:
        turns = Turn("user", row["prompt"]), Turn("assistant", row["completion"])
        return _position(msgspec.json.encode(Conversation(turns))) < 0.1

    found = [{"prompt": f"x{number}", "completion": "w2"} for number in range(500)]
    rows = [row for row in found if not is_held(row)][:12]
    more = next(row for row in found if is_held(row))
    plans = list(hostile_plans(plan))[-1:]
    assert list(differing([worlds(rows), worlds([*rows, more])], plans)) == []
    with looking_first():
        assert any(differing([worlds(rows), worlds([*rows, more])], plans))


@pytest.mark.usefixtures("loaded_once")
def test_a_file_that_changes_under_a_running_site_changes_no_answer(
    worlds: Callable[..., Site], plan: TrainingPlan
) -> None:
    rows, more = NEIGHBOURS["a long record"]
    plans = list(hostile_plans(plan))

    def changed(site: Site) -> list[bytes]:
        answers = []
        for number, one in enumerate(plans):
            match number % 4:
                case 0:
                    site.write([*rows, more])
                case 1:
                    site.data.write_text("no records")
                case 2:
                    site.data.unlink()
                case _:
                    site.write(rows)
            answers.append(site.handle(offer(one)))
        return answers

    still = worlds(rows)
    same = [still.handle(offer(one)) for one in plans]
    assert changed(worlds(rows)) == same
    with looking_first(misfit=lambda _: None):
        assert changed(worlds(rows)) != same


@pytest.mark.usefixtures("loaded_once")
def test_a_server_that_bisects_finds_no_length(
    worlds: Callable[..., Site], plan: TrainingPlan
) -> None:
    def bisected(site: Site) -> int:
        low, high = 4, 64
        while low < high:
            middle = (low + high) // 2
            if site.accepts(asking(plan, max_tokens=middle, template="plain")):
                high = middle
            else:
                low = middle + 1
        return low

    secret = {"prompt": "w1 " * 29, "completion": "w3"}
    assert bisected(worlds([*ORDINARY, secret])) == 4
    with looking_first():
        # Its prompt, its answer, and the token that ends a text.
        assert bisected(worlds([*ORDINARY, secret])) == 29 + 1 + 1


class Untouchable(tuple[Any, ...]):
    """Records that may be counted, and not looked at."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a record was looked at")

    def __iter__(self) -> Any:
        raise AssertionError("a record was looked at")


def test_an_offer_looks_at_no_record(worlds: Callable[..., Site], plan: TrainingPlan) -> None:
    """With the real model and its tests: so its time is the same too."""
    site = worlds(ORDINARY)
    (name, records), *_ = site.trainer._data.read.items()
    hidden = msgspec.structs.replace(records, records=Untouchable(records.records))
    site.trainer._data = replace(site.trainer._data, read={name: hidden})
    assert site.accepts(plan)
    with looking_first(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteData, "load", lambda _: site.trainer._data)
        assert not site.accepts(asking(plan))
    assert "looked at" in site.observer.errors[-1].diagnostics()


@pytest.mark.parametrize("data", ["no records", '{"prompt": "w1"}\n', None])
def test_a_server_reads_one_code_whatever_is_wrong_with_the_data(
    tmp_path: Path, model: Path, plan: TrainingPlan, data: str | None
) -> None:
    site = Site(tmp_path / "site", model, ORDINARY)
    site.trainer.close()
    site.data.unlink()
    if data is not None:
        site.data.write_text(data)
    site.start()
    assert site.ask(offer(plan), size_limit(plan)) == Refusal(check="site-not-ready")
    (error,) = site.observer.errors
    assert isinstance(error, DataError)
    site.trainer.close()


def train_request(plan: TrainingPlan, attempt: int) -> TrainRequest:
    vector = initial_vector(plan)
    digest = adapter_digest(plan.digest(), vector)
    release = Release(
        federation="f",
        job=plan.job,
        plan=plan.digest(),
        round=0,
        attempt=0,
        context=bytes(32),
        adapter=digest,
        survivors=(),
        total_weight=0,
    )
    header = RoundHeader(
        federation="f",
        job=plan.job,
        round=1,
        attempt=attempt,
        plan=plan.digest(),
        roster=ROSTER.digest(),
        adapter=digest,
        cohort=tuple(IDENTITIES),
    )
    return TrainRequest(
        header=sign(OPERATOR, header), release=sign(OPERATOR, release), adapter=to_bytes(vector)
    )


def answers(site: Site, plan: TrainingPlan, attempts: int) -> list[str]:
    """What a server reads when it asks for round 1 again and again."""
    found = [site.ask(train_request(plan, n + 1), size_limit(plan)) for n in range(attempts)]
    return [reply.check if isinstance(reply, Refusal) else "trained" for reply in found]


@contextmanager
def drawn_again() -> Iterator[None]:
    """Takes the fix out: a round ends only with an error of the kind that was foreseen."""

    @contextmanager
    def final(self: LocalJob, number: int, but: Any = ()) -> Iterator[None]:
        try:
            yield
        except ModelError:
            self.record(number, FAILED)
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalJob, "_final", final)
        yield


FAILURES = [
    IndexError("index out of range in self"),
    RuntimeError("CUDA error: device-side assert triggered"),
    MemoryError(),
    DataError("row 3 is odd"),
    StorageError("no space left"),
    LedgerError("no"),
    ModelError("training diverged"),
]


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failed_round_is_not_drawn_again_whatever_failed(
    worlds: Callable[..., Site],
    plan: TrainingPlan,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
) -> None:
    """Whether it fails tells that a record is in the batch: each draw would be an answer."""
    draws: list[bool] = []
    train = LocalTrainer.round

    def unless_drawn(self: LocalTrainer, *arguments: Any, **options: Any) -> Any:
        draws.append(len(draws) % 3 != 2)
        if draws[-1]:
            raise failure
        return train(self, *arguments, **options)

    monkeypatch.setattr(LocalTrainer, "round", unless_drawn)
    site = worlds(ORDINARY)
    assert site.accepts(plan)
    assert answers(site, plan, 4) == ["site-fault"] * 4
    assert len(draws) == 1
    assert "is not repeated" in site.observer.errors[-1].diagnostics()
    (entry,) = site.ledger().history()
    assert entry.delta_digest == FAILED
    if isinstance(failure, ModelError):
        return
    draws.clear()
    site = worlds(ORDINARY)
    assert site.accepts(plan)
    with drawn_again():
        assert answers(site, plan, 3) == ["site-fault", "site-fault", "trained"]
    assert len(draws) == 3


@pytest.mark.usefixtures("loaded_once")
def test_a_full_disk_before_anything_is_drawn_leaves_the_round_as_it_was(
    worlds: Callable[..., Site], plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("the cache of frozen layers cannot be written")

    site = worlds(ORDINARY)
    assert site.accepts(plan)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "frozen_prefix", full)
        assert answers(site, plan, 1) == ["site-fault"]
    assert [entry.delta_digest for entry in site.ledger().history()] == [None]
    site.ask(train_request(plan, 2), size_limit(plan))
    (entry,) = site.ledger().history()
    assert entry.delta_digest not in (None, FAILED)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("settled", [False, True], ids=["forgotten", "settled"])
def test_another_offer_does_not_have_a_failed_round_drawn_again(
    worlds: Callable[..., Site],
    plan: TrainingPlan,
    monkeypatch: pytest.MonkeyPatch,
    settled: bool,
) -> None:
    """The ledger could not take the failure, and a job that is closed forgets it."""
    draws: list[bool] = []

    def failing(*_: Any, **__: Any) -> None:
        draws.append(True)
        raise RuntimeError("a record is in the batch")

    def full(*_: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(LocalTrainer, "round", failing)
    site = worlds(ORDINARY)
    assert site.accepts(plan)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record_delta", full)
        assert answers(site, plan, 1) == ["site-fault"]
        if settled:
            assert not site.accepts(asking(plan, max_tokens=16))
    with monkeypatch.context() as patch:
        if not settled:
            patch.setattr(LocalJob, "settle", lambda _: None)
        site.accepts(asking(plan, max_tokens=16))
    site.ask(train_request(plan, 2), size_limit(plan))
    assert len(draws) == (1 if settled else 2)
    (entry,) = site.ledger().history()
    assert entry.delta_digest == FAILED


def test_a_record_that_does_not_fit_changes_no_answer_of_a_round(
    worlds: Callable[..., Site], plan: TrainingPlan, caplog: pytest.LogCaptureFixture
) -> None:
    """With the real model: a token that it does not know used to end each round that drew it."""
    _, more = NEIGHBOURS["a token that the model does not know"]
    site = worlds([*ORDINARY, more, {"prompt": "w1 " * 40, "completion": "w3"}])
    assert site.accepts(plan)
    assert answers(site, plan, 2) == ["trained", "trained"]
    assert "1 of 14 records are left out, because each of them holds a token" in caplog.text
    assert "is longer than the plan allows: row 14" in caplog.text
    assert "<more>" not in caplog.text

    fitting = prepared.fitting_answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            prepared,
            "fitting_answers",
            lambda *arguments, vocabulary, **options: fitting(*arguments, **options),
        )
        site = worlds([*ORDINARY, more])
        assert site.accepts(plan)
        assert answers(site, plan, 1) == ["site-fault"]
    assert "IndexError" in site.observer.errors[-1].diagnostics()


@pytest.mark.full
def test_with_real_models_too_neighbours_answer_alike(
    worlds: Callable[..., Site], plan: TrainingPlan
) -> None:
    plans = list(hostile_plans(plan, (4, 16, 40, 64)))
    for rows, more in NEIGHBOURS.values():
        assert list(differing([worlds(rows), worlds([*rows, more])], plans)) == []
