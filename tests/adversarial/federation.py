"""An operator that can sign anything, sites that it plays, and real sites that it attacks."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from adversarial.puppet import Puppet
from adversarial.weaken import Protection, Stopped
from safetensors.numpy import load_file
from support.shared_noise_plans import shared_noise_plan

from umbel_client.data.records import load_records
from umbel_client.ledger.ledger import Ledger
from umbel_client.ledger.register import Register
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.site.config import load_config
from umbel_client.site.ipc import SharedEpsilon
from umbel_client.site.pinned_roster import Pinned
from umbel_client.trainer.handler import Trainer
from umbel_common.adapters.vector import (
    Vector,
    adapter_digest,
    initial_vector,
    merge,
    size_of,
    to_bytes,
)
from umbel_common.errors import UmbelError
from umbel_common.plans.plan import (
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Sgd,
    Training,
    TrainingPlan,
    TrainingPlan2,
)
from umbel_common.plans.statements import Release, RoundHeader, chained, with_sum
from umbel_common.protocol.wire import (
    FillRequest,
    OfferRequest,
    PrepareRequest,
    Refusal,
    Reply,
    Request,
    TrainRequest,
    open_reply,
    request_digest,
    seal_request,
    size_limit,
)
from umbel_common.secagg import coordinator
from umbel_common.secagg.encoding import RingVector
from umbel_common.secagg.messages import RevealedShare, preparation_of
from umbel_common.secagg.preparing import Prepared, Preparing
from umbel_common.trust.identity import Identity, Member, Roster, Signed, sign
from umbel_common.trust.roster_file import roster_to_json
from umbel_host.files.keys import write_identity
from umbel_host.files.model_digest import folder_digest
from umbel_server.aggregation.attempt import Attempt, AttemptOutcome, Evidence


def believe(trainer: Trainer, roster: Roster) -> None:
    """Has a site believe a roster that its people did not pin."""
    pinned = dataclasses.replace(trainer._site.pinned, roster=roster)
    trainer._site = dataclasses.replace(trainer._site, pinned=pinned)


CLIENT_TOML = """\
site = "{site}"
state = "state"
identity = "identity.pem"
roster = "roster.json"
physical_batch_size = 4

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
{policy}
"""


def moved(plan: TrainingPlan, change: float) -> Vector:
    """The initial adapter with `change` added to every number that a round trains."""
    size = size_of(plan.trained_tensors(1))
    return merge(initial_vector(plan), np.full(size, change, dtype=np.float32), plan, 1)


class KeptObserver:
    """Keeps the lines that a site would log."""

    def __init__(self) -> None:
        self.errors: list[UmbelError] = []
        self.steps = 0

    def preparing(self, what: str, done: int, total: int) -> None:
        assert done <= total

    def charged(
        self,
        round_number: int,
        epsilon: float | None,
        *,
        again: bool,
        shared: SharedEpsilon | None = None,
    ) -> None:
        assert epsilon is None or epsilon > 0

    def step(self, round_number: int, step: int, steps: int, records: float) -> None:
        self.steps += 1

    def finished(self, job: str, adapter: Path) -> None:
        assert adapter.is_dir()

    def refused(self, error: UmbelError) -> None:
        self.errors.append(error)


class Federation:
    """An operator that can sign anything, and real sites that it attacks."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        protection: Protection,
        count: int,
        policies: Mapping[str, str],
        **plan_parts: object,
    ) -> None:
        self.folder = folder
        self.model = model
        self.protection = protection
        self.operator = Identity.generate(os.urandom)
        self.identities = {
            f"site-{index:02}": Identity.generate(os.urandom) for index in range(count)
        }
        self.roster = self.make_roster(self.identities)
        self.plan = self.make_plan(**plan_parts)
        self.observers: dict[str, KeptObserver] = {}
        self.trainers: dict[str, Trainer] = {}
        self.puppets: dict[str, Puppet] = {}
        self.shown: dict[str, RoundHeader] = {}
        """Headers of sites that are shown another one than the attempt's."""
        self.releases: dict[bytes, tuple[Signed, Vector]] = {}
        """Releases by adapter digest, beside the initial one."""
        self.played_roster = self.roster
        self.prepares = False
        """Whether each attempt is prepared before it begins."""
        self.prepared: dict[bytes, Prepared] = {}
        """What was prepared, by the context of the preparation."""
        for number, site in enumerate(self.identities):
            self._write_site(site, number, policies.get(site, policies.get("*", "")))
            self.start(site)

    def make_roster(self, identities: Mapping[str, Identity]) -> Roster:
        """A roster of this federation with these sites."""
        return Roster(
            federation="clinics",
            operator=self.operator.public_key,
            members=tuple(
                Member(name=name, public_key=identities[name].public_key)
                for name in sorted(identities)
            ),
        )

    def play(self, *names: str, own_keys: bool = False) -> None:
        """Makes the server play these sites, with their own keys (they collude) or with others."""
        for name in names:
            identity = self.identities[name] if own_keys else Identity.generate(os.urandom)
            self.puppets[name] = Puppet(name, identity, self.plan)
        identities = {
            **self.identities,
            **{name: puppet.identity for name, puppet in self.puppets.items()},
        }
        self.played_roster = self.make_roster(identities)

    def make_plan(self, **parts: object) -> TrainingPlan:
        """A valid plan; keyword arguments replace its parts. With `sharing`, a plan of distributed
        mode (`shared_noise_plan`)."""
        # Few lengths and few rows: each site tests every shape that it may compute in.
        task = Classification(labels=("a", "b"), max_tokens=16)
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
                # Every record in every batch: the accountant answers that at once.
                expected_batch_size=40,
                optimizer=Sgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
            ),
            "privacy": LocalPrivacy(epsilon=8.0, delta=1e-4, clip_norm=1.0),
            "aggregation": Aggregation(threshold=3, clip_range=1.0, step=1e-6),
        }
        sharing: Any = parts.pop("sharing", None)
        plan = TrainingPlan(**{**fields, **parts})
        return plan if sharing is None else shared_noise_plan(plan, **sharing)

    def start(
        self,
        site: str,
        roster: Roster | None = None,
        revoked: frozenset[bytes] = frozenset(),
        former: tuple[Roster, ...] = (),
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Starts a site's trainer, or starts it again from the files on its disk."""
        if site in self.trainers:
            self.trainers[site].close()
        self.observers[site] = KeptObserver()
        self.trainers[site] = Trainer(
            load_config(self.folder / site / "client.toml"),
            Pinned(roster or self.roster, revoked, former),
            self.identities[site],
            observer=self.observers[site],
            # Each federation is a machine that never saw another. A test has one of its own
            # anyway (tests/conftest.py), which the commands of a site see too.
            register=None
            if "UMBEL_HOME_OF_TESTS" in os.environ
            else Register(self.folder / "ledgers"),
            clock=clock,
        )

    def revoke(self, site: str, identity: Identity) -> None:
        """Restarts a site with a key on its list of revoked keys."""
        self.start(site, revoked=frozenset({identity.public_key}))

    def send(self, site: str, request: Request, operator: Identity | None = None) -> Reply:
        """Sends a request, sealed by the operator or by somebody else; returns the opened reply."""
        return self._handled(site, seal_request(operator or self.operator, site, request))

    def deliver(self, site: str, sealed: bytes) -> Any:
        """The answer of a site to these bytes.

        Raises:
            Stopped: the site refuses; `check` says by which check.
        """
        return self._unless_refused(self._handled(site, sealed))

    def ask(self, site: str, request: Any) -> Any:
        """The answer of a site, or of its puppet.

        Raises:
            Stopped: the site refuses; `check` says by which check.
        """
        if site in self.puppets:
            return self.puppets[site].answer(request, self.played_roster)
        return self._unless_refused(self.send(site, self._as_shown(site, request)))

    def _handled(self, site: str, sealed: bytes) -> Reply:
        with self.protection.at_a_site():
            reply = self.trainers[site].handle(sealed)
        key = self.identities[site].public_key
        return open_reply(key, site, reply, request_digest(sealed), limit=size_limit(self.plan))

    def _unless_refused(self, reply: Reply) -> Reply:
        if isinstance(reply, Refusal):
            raise Stopped(reply.check)
        return reply

    def _as_shown(self, site: str, request: Any) -> Any:
        header = self.shown.get(site)
        match request:
            case TrainRequest() if header is not None:
                return self.train_request(header)
            case PrepareRequest() if header is not None:
                return PrepareRequest(preparation=preparation_of(header))
            case FillRequest() if header is not None:
                context = preparation_of(header).context()
                return msgspec.structs.replace(request, context=context)
            case _ if header is not None:
                return msgspec.structs.replace(request, context=header.context())
        return request

    def refusal(self, site: str, request: Request, operator: Identity | None = None) -> str:
        """The check by which the site refuses; fails if it does not."""
        reply = self.send(site, request, operator)
        assert isinstance(reply, Refusal), reply
        return reply.check

    def offer(self, plan: TrainingPlan | None = None, *sites: str) -> None:
        """Makes every site (or these) accept a plan."""
        plan = plan or self.plan
        for site in sites or tuple(self.identities):
            self.ask(site, OfferRequest(plan=sign(self.operator, plan)))

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
        release = Release(**{**fields, **parts})
        if isinstance(self.plan, TrainingPlan2):
            release = with_sum(release, bytes(32))
        return sign(self.operator, release), vector

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
        header = RoundHeader(**{**fields, **parts})
        return chained(header, bytes(32)) if isinstance(self.plan, TrainingPlan2) else header

    def train_request(
        self, header: RoundHeader | None = None, release: tuple[Signed, Vector] | None = None
    ) -> TrainRequest:
        """The request that opens an attempt at a site."""
        header = header or self.header()
        signed, vector = release or self.releases.get(header.adapter) or self.release()
        return TrainRequest(
            header=sign(self.operator, header),
            release=signed,
            adapter=to_bytes(vector),
        )

    def showing(self, header: RoundHeader, last: Any) -> TrainRequest:
        """The request that opens an attempt at a site and shows it its last advert."""
        return msgspec.structs.replace(self.train_request(header), last=last)

    def attempt(self, header: RoundHeader | None = None) -> Attempt:
        """An attempt as the server would run it, waiting for its first replies."""
        header = header or self.header()
        length = size_of(self.plan.trained_tensors(header.round)) + 1
        machine = coordinator.open_attempt(
            header,
            self.played_roster,
            self.plan.aggregation.threshold,
            32,
            length,
            prepared=self.prepare(header)
            if self.prepares
            else self.prepared.get(preparation_of(header).context()),
        )
        return Attempt(header, self.train_request(header), machine, {}, Evidence())

    def prepare(self, header: RoundHeader) -> Prepared:
        """The keys and shares of the whole cohort for an attempt that is to come.

        Raises:
            Stopped: a site refuses.
        """
        preparation = preparation_of(header)
        keys: Any = Preparing(preparation, self.played_roster)
        for site in header.cohort:
            keys = keys.receive(site, self.ask(site, PrepareRequest(preparation=preparation)).keys)
        shares = keys.close()
        request = FillRequest(context=preparation.context(), keys=shares.signed)
        for site in header.cohort:
            shares = shares.receive(site, self.ask(site, request).shares)
        prepared: Prepared = shares.close()
        self.prepared[preparation.context()] = prepared
        return prepared

    def drive(self, attempt: Attempt, until: str | None = None, silent: str | None = None) -> Any:
        """Drives an attempt until the stage `until` is about to be asked, or to the end.

        Args:
            silent: a site that does not answer.

        Raises:
            Stopped: a site refuses.
        """
        state: Attempt | AttemptOutcome = attempt
        while isinstance(state, Attempt) and state.stage != until:
            asked = {site: state.requests()[site] for site in state.requests() if site != silent}
            state = self.take(state, {site: self.ask(site, asked[site]) for site in asked})
        return state

    def take(self, attempt: Attempt, replies: Mapping[str, Reply]) -> Any:
        """Closes a stage with these replies, of any context."""
        context = attempt.header.context()
        for site, reply in replies.items():
            if hasattr(reply, "context"):
                reply = msgspec.structs.replace(reply, context=context)
            attempt = attempt.receive(site, reply)
        assert not attempt.refusals, attempt.refusals
        return attempt.advance()

    def vectors(self, attempt: Attempt) -> tuple[dict[str, bytes], Attempt]:
        """The masked vector of every site, and the attempt after that stage."""
        replies = {site: self.ask(site, ask) for site, ask in attempt.requests().items()}
        return {site: reply.vector for site, reply in replies.items()}, self.take(attempt, replies)

    def reveal(self, attempt: Attempt) -> dict[str, tuple[RevealedShare, ...]]:
        """The shares that each site reveals in the last stage."""
        return {site: self.ask(site, ask).shares for site, ask in attempt.requests().items()}

    def delta(self, site: str, round_number: int = 1) -> Vector:
        """The delta that the site trained and keeps on its disk."""
        folder = self.folder / site / "state" / "deltas" / self.plan.job
        delta: Vector = load_file(folder / f"{round_number:05}.safetensors")["delta"]
        return delta

    def is_sum_of(self, total: RingVector, *sites: str, round_number: int = 1) -> bool:
        """Whether a ring vector is the sum of the weights and deltas of these sites and no other.

        Each site rounds at random, by less than one step.
        """
        values = total.view(np.int32)
        expected = sum(
            np.clip(self.delta(site, round_number), -1, 1).astype(np.float64) for site in sites
        )
        error = values[1:] * self.plan.aggregation.step - expected
        return bool(
            values[0] == len(sites)
            and np.abs(error).max() <= 1.001 * len(sites) * self.plan.aggregation.step
        )

    def believe(self, site: str, roster: Roster) -> None:
        """Makes a site believe a roster from the server, as if it had pinned none."""
        if "pinned-roster" in self.protection.removed:
            believe(self.trainers[site], roster)

    def note_journal(self, site: str) -> None:
        """Keeps a copy of a site's journal."""
        self.trainers[site].close()
        noted = self.folder / f"{site}-journal"
        shutil.copytree(self.folder / site / "state", noted, dirs_exist_ok=True)
        self.start(site)

    def crash(self, site: str) -> None:
        """Restarts a site; without a durable journal, it starts from the copy kept last."""
        self.trainers[site].close()
        if "durable-journal" in self.protection.removed:
            shutil.copy(
                self.folder / f"{site}-journal" / "session.sqlite", self.folder / site / "state"
            )
        self.start(site)

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
        """The digest that names the site's ledger."""
        return load_records(self.folder / site / "data.jsonl", self.plan.task).digest()

    def _write_site(self, site: str, number: int, policy: str) -> None:
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
        if "approval" not in policy:
            policy += '\napproval = "none"'
        (folder / "client.toml").write_text(
            CLIENT_TOML.format(site=site, model=self.model, digest=digest, policy=policy)
        )
