"""A server that lies, and three real trainers: tiny model, real journals and ledgers on disk."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from umbel_client.config import load_config, write_identity
from umbel_client.data import load_records
from umbel_client.ledger import Ledger
from umbel_client.model import folder_digest, plan_lora
from umbel_client.trainer import Trainer
from umbel_common.adapter import Vector, adapter_digest, initial_vector, size_of, to_bytes
from umbel_common.errors import UmbelError
from umbel_common.identity import Identity, Member, Roster, Signed, sign
from umbel_common.plan import (
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Sgd,
    Training,
    TrainingPlan,
)
from umbel_common.roster_file import roster_to_json
from umbel_common.statements import Release, RoundHeader
from umbel_common.wire import (
    OfferReply,
    OfferRequest,
    Refusal,
    Reply,
    Request,
    TrainRequest,
    open_reply,
    seal_request,
    size_limit,
)
from umbel_server import round as rounds

CLIENT_TOML = """\
site = "{site}"
state = "state"
identity = "identity.pem"
roster = "roster.json"

[data]
path = "data.jsonl"
public_size = 40

[model]
path = "{model}"

[policy]
models = ["{digest}"]
labels = ["a", "b"]
max_epsilon = 8.0
total_epsilon = 10.0
max_delta = 1e-4
"""


class KeptObserver:
    """Keeps what a site would log."""

    def __init__(self) -> None:
        self.errors: list[UmbelError] = []
        self.steps = 0

    def preparing(self, what: str, done: int, total: int) -> None:
        assert done <= total

    def charged(self, round_number: int, epsilon: float | None) -> None:
        assert epsilon is None or epsilon > 0

    def step(self, round_number: int, step: int, steps: int) -> None:
        self.steps += 1

    def refused(self, error: UmbelError) -> None:
        self.errors.append(error)


class Federation:
    """An operator that can sign anything, and sites that believe only what they should."""

    def __init__(
        self, folder: Path, model: Path, operator: Identity, identities: dict[str, Identity]
    ) -> None:
        self.folder = folder
        self.model = model
        self.operator = operator
        self.identities = identities
        self.roster = Roster(
            federation="clinics",
            operator=operator.public_key,
            members=tuple(
                Member(name=name, public_key=identity.public_key)
                for name, identity in identities.items()
            ),
        )
        self.plan = self.make_plan()
        self.observers: dict[str, KeptObserver] = {}
        self.trainers: dict[str, Trainer] = {}
        for number, site in enumerate(identities):
            self._write_site(site, number)
            self.start(site)

    def make_plan(self, **parts: object) -> TrainingPlan:
        """A valid plan; keyword arguments replace its parts."""
        task = Classification(labels=("a", "b"))
        lora = plan_lora(
            self.model,
            task,
            rank=2,
            alpha=4.0,
            target_modules=("query",),
            layers=None,
            method="ffa",
            seed=5,
        )
        fields: dict[str, Any] = {
            "federation": "clinics",
            "job": "job",
            "model": BaseModel(name="tiny", digest=folder_digest(self.model)),
            "task": task,
            "lora": lora,
            "training": Training(
                rounds=2,
                local_steps=1,
                expected_batch_size=8,
                optimizer=Sgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
            ),
            "privacy": LocalPrivacy(epsilon=8.0, delta=1e-4, clip_norm=1.0),
            "aggregation": Aggregation(threshold=3, clip_range=1.0, step=1e-6),
        }
        return TrainingPlan(**{**fields, **parts})

    def start(self, site: str) -> None:
        """Starts a site's trainer, or starts it again from what is on its disk."""
        if site in self.trainers:
            self.trainers[site].close()
        self.observers[site] = KeptObserver()
        config = load_config(self.folder / site / "client.toml")
        self.trainers[site] = Trainer(
            config, self.roster, self.identities[site], observer=self.observers[site]
        )

    def send(self, site: str, request: Request, operator: Identity | None = None) -> Reply:
        """One request, sealed by the operator or by somebody else, and the opened reply."""
        sealed = seal_request(operator or self.operator, site, request)
        reply = self.trainers[site].handle(sealed)
        key = self.identities[site].public_key
        return open_reply(key, site, reply, limit=size_limit(self.plan))

    def refusal(self, site: str, request: Request, operator: Identity | None = None) -> str:
        """The check by which the site refuses; fails if it does not."""
        reply = self.send(site, request, operator)
        assert isinstance(reply, Refusal), reply
        return reply.check

    def offer(self, plan: TrainingPlan | None = None, *sites: str) -> None:
        """Has every site (or these) accept a plan."""
        plan = plan or self.plan
        for site in sites or tuple(self.identities):
            reply = self.send(site, OfferRequest(plan=sign(self.operator, plan)))
            assert isinstance(reply, OfferReply), self.observers[site].errors

    def release(self, vector: Vector | None = None, **parts: object) -> tuple[Signed, Vector]:
        """A signed release, release 0 by default, and its vector."""
        vector = initial_vector(self.plan) if vector is None else vector
        fields: dict[str, Any] = {
            "federation": "clinics",
            "job": self.plan.job,
            "plan": self.plan.digest(),
            "round": 0,
            "attempt": 0,
            "context": bytes(32),
            "adapter": adapter_digest(self.plan.digest(), vector),
            "survivors": (),
            "total_weight": 0,
        }
        return sign(self.operator, Release(**{**fields, **parts})), vector

    def header(self, **parts: object) -> RoundHeader:
        """A valid header of attempt 1 of round 1; keyword arguments replace its fields."""
        fields: dict[str, Any] = {
            "federation": "clinics",
            "job": self.plan.job,
            "round": 1,
            "attempt": 1,
            "plan": self.plan.digest(),
            "roster": self.roster.digest(),
            "adapter": adapter_digest(self.plan.digest(), initial_vector(self.plan)),
            "cohort": tuple(sorted(self.identities)),
        }
        return RoundHeader(**{**fields, **parts})

    def train_request(
        self, header: RoundHeader | None = None, release: tuple[Signed, Vector] | None = None
    ) -> TrainRequest:
        """What opens an attempt at a site."""
        signed, vector = release or self.release()
        return TrainRequest(
            header=sign(self.operator, header or self.header()),
            release=signed,
            adapter=to_bytes(vector),
        )

    def attempt(self, header: RoundHeader | None = None) -> rounds.Attempt:
        """An honest attempt, waiting for its first replies."""
        header = header or self.header()
        length = size_of(self.plan.trained_tensors(header.round)) + 1
        return rounds.start(header, self.roster, self.plan, self.train_request(header), length)

    def drive(
        self, attempt: rounds.Attempt, until: str | None = None
    ) -> rounds.Attempt | rounds.Outcome:
        """Goes on honestly until the stage `until` is about to be asked, or to the end."""
        state: rounds.Attempt | rounds.Outcome = attempt
        while isinstance(state, rounds.Attempt) and state.stage != until:
            for site, request in state.requests().items():
                state = state.receive(site, self.send(site, request))
            assert not state.refusals, {
                site: self.observers[site].errors for site in state.refusals
            }
            state = state.advance()
        return state

    def spent_rounds(self, site: str) -> int:
        """Rounds that the site's ledger has charged; read from a copy, since the file is in use."""
        copy = self.folder / "ledger-copy"
        copy.mkdir(exist_ok=True)
        for path in (self.folder / site / "state").glob("ledger.sqlite*"):
            if path.suffix != ".lock":
                shutil.copy(path, copy / path.name)
        if not (copy / "ledger.sqlite").exists():
            return 0
        with Ledger.open(copy / "ledger.sqlite", self.data_digest(site)) as ledger:
            return len(ledger.history())

    def data_digest(self, site: str) -> bytes:
        """What names the site's ledger."""
        return load_records(self.folder / site / "data.jsonl", self.plan.task).digest()

    def _write_site(self, site: str, number: int) -> None:
        folder = self.folder / site
        folder.mkdir()
        random = np.random.default_rng(number)
        rows = [
            {"text": " ".join(f"w{word}" for word in random.integers(0, 35, 5)), "label": label}
            for label in ("a", "b") * 20
        ]
        (folder / "data.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
        write_identity(folder / "identity.pem", self.identities[site])
        (folder / "roster.json").write_text(roster_to_json(self.roster))
        digest = folder_digest(self.model).hex()
        (folder / "client.toml").write_text(
            CLIENT_TOML.format(site=site, model=self.model, digest=digest)
        )


@pytest.fixture
def federation(tmp_path: Path, tiny_model: Path) -> Iterator[Federation]:
    """Three sites that have accepted nothing yet."""
    identities = {f"site-{index:02}": Identity.generate(os.urandom) for index in range(3)}
    made = Federation(tmp_path, tiny_model, Identity.generate(os.urandom), identities)
    yield made
    for trainer in made.trainers.values():
        trainer.close()
