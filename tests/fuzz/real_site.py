"""A real trainer with journal, ledger and a tiny model on disk, under its operator."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from vectors.cases import Drawn
from vectors.values import IDENTITIES, OPERATOR, ROSTER, SITES

from umbel_client.ledger.register import Register
from umbel_client.models.adapters.lora import plan_lora
from umbel_client.site.config import ClientConfig
from umbel_client.site.ipc import SharedEpsilon
from umbel_client.site.pinned_roster import Pinned
from umbel_client.trainer.handler import Trainer
from umbel_common.adapters.vector import adapter_digest, initial_vector, size_of, to_bytes
from umbel_common.errors import UmbelError
from umbel_common.plans.plan import (
    Aggregation,
    BaseModel,
    Classification,
    LocalPrivacy,
    Sgd,
    Training,
    TrainingPlan,
)
from umbel_common.plans.statements import Release, RoundHeader
from umbel_common.protocol.wire import (
    ConfirmRequest,
    FinishRequest,
    MaskRequest,
    OfferRequest,
    OfferUnderRoster,
    Refusal,
    Reply,
    Request,
    ShareRequest,
    TrainFromLastRequest,
    TrainRequest,
    UnmaskRequest,
    open_reply,
    request_digest,
    seal_request,
    size_limit,
)
from umbel_common.secagg import coordinator, participant
from umbel_common.secagg.rules import Rules
from umbel_common.toml_values import parse_toml
from umbel_common.trust.identity import sign
from umbel_host.files.model_digest import folder_digest

SITE = "site-a"
PEERS = [site for site in SITES if site != SITE]
CONFIG = """\
site = "site-a"
state = "{folder}/state"
identity = "not read"
roster = "not read"
physical_batch_size = 4
[data]
path = "{folder}/data.jsonl"
public_size = 40
[model]
path = "{model}"
[policy]
approval = "none"
minimum_cohort = 2
models = ["{digest}"]
labels = ["a", "b"]
max_epsilon = 8.0
total_epsilon = 10.0
max_delta = 1e-4
max_local_steps = 2
colluding_sites = 0
"""


class KeptErrors:
    """An observer that keeps the last refusal."""

    def __init__(self) -> None:
        self.last: UmbelError | None = None

    def preparing(self, what: str, done: int, total: int) -> None:
        """Keeps nothing."""

    def charged(
        self,
        round_number: int,
        epsilon: float | None,
        *,
        again: bool,
        shared: SharedEpsilon | None = None,
    ) -> None:
        """Keeps nothing."""

    def step(self, round_number: int, step: int, steps: int, records: float) -> None:
        """Keeps nothing."""

    def finished(self, job: str, adapter: Path) -> None:
        """Keeps nothing."""

    def refused(self, error: UmbelError) -> None:
        """Keeps the refusal."""
        self.last = error


class RealSite:
    """The real site `site-a`; the others of the vectors' roster are played without training."""

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir()
        random = np.random.default_rng(1)
        rows = [
            {"text": " ".join(f"w{word}" for word in random.integers(0, 35, 5)), "label": label}
            for label in ("a", "b") * 20
        ]
        (folder / "data.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
        digest = folder_digest(model)
        text = CONFIG.format(folder=folder, model=model, digest=digest.hex())
        self.errors = KeptErrors()
        self.trainer = Trainer(
            parse_toml(text, ClientConfig, "client.toml"),
            Pinned(ROSTER, frozenset()),
            IDENTITIES[SITE],
            observer=self.errors,
            # A machine of its own: another site with the same records would share its ledger.
            register=Register(folder / "ledgers"),
        )
        self.plan = _plan(model, digest)
        self.adapter = initial_vector(self.plan)
        self.attempt = 0
        self.honest(OfferRequest(plan=sign(OPERATOR, self.plan)))

    def send(self, request: Request) -> Reply:
        """The reply to a request, after a check of its seal.

        Raises:
            RemoteProtocolError: the reply is not the site's.
        """
        self.errors.last = None
        sealed = seal_request(OPERATOR, SITE, request)
        return self.opened(self.trainer.handle(sealed), sealed)

    def opened(self, reply: bytes, sealed: bytes) -> Reply:
        """The site's reply to a sealed request."""
        key, asked = IDENTITIES[SITE].public_key, request_digest(sealed)
        return open_reply(key, SITE, reply, asked, limit=size_limit(self.plan))

    def honest(self, request: Request) -> Any:
        """The answer to an honest request."""
        reply = self.send(request)
        if isinstance(reply, Refusal):
            raise Refused(reply.check)
        return reply

    def next_attempt(self, stages: int) -> dict[str, Request]:
        """Opens an attempt, plays some stages honestly, and returns the honest requests so far, of
        which the last has not been sent.

        Raises:
            Refused: after what was sent before, the site takes part no more.
        """
        self.attempt += 1
        requests: dict[str, Request] = {
            "offer": OfferRequest(plan=sign(OPERATOR, self.plan)),
            "offer-under-roster": OfferUnderRoster(
                plan=sign(OPERATOR, self.plan), roster=ROSTER.digest()
            ),
            "finish": FinishRequest(release=self._release(2), adapter=to_bytes(self.adapter)),
        }
        header = self._header()
        context = header.context()
        requests["train-from-last"] = TrainFromLastRequest(
            header=sign(OPERATOR, header), release=self._release(0), onto=header.adapter, changed=()
        )
        requests["train"] = TrainRequest(
            header=sign(OPERATOR, header), release=self._release(0), adapter=to_bytes(self.adapter)
        )
        length = size_of(self.plan.trained_tensors(1)) + 1
        machine: Any = coordinator.open_attempt(header, ROSTER, 2, 32, length)
        peers = Peers(header, length)
        for stage, part in STAGES[:stages]:
            reply = self.honest(requests[stage])
            for site, answer in {SITE: getattr(reply, part), **peers.answers(machine)}.items():
                machine = machine.receive(site, answer)
            machine = machine.close()
            following = _request(machine, context)
            if following is not None:
                requests[following[0]] = following[1]
        return requests

    def _header(self) -> RoundHeader:
        return RoundHeader(
            federation="clinics",
            job=self.plan.job,
            round=1,
            attempt=self.attempt,
            plan=self.plan.digest(),
            roster=ROSTER.digest(),
            adapter=adapter_digest(self.plan.digest(), self.adapter),
            cohort=SITES,
        )

    def _release(self, number: int) -> Any:
        release = Release(
            federation="clinics",
            job=self.plan.job,
            plan=self.plan.digest(),
            round=number,
            attempt=0,
            context=bytes(32),
            adapter=adapter_digest(self.plan.digest(), self.adapter),
            survivors=(),
            total_weight=0,
        )
        return sign(OPERATOR, release)


class Refused(Exception):
    """The real site refused an honest request."""


STAGES = (
    ("train", "advert"),
    ("share", "shares"),
    ("mask", "vector"),
    ("confirm", "signature"),
    ("unmask", "shares"),
)
"""Stages, each with the field of its reply that the coordinator takes."""


class Peers:
    """The other two sites, which follow the protocol with vectors of zeros."""

    def __init__(self, header: RoundHeader, length: int) -> None:
        self._header = header
        self._length = length
        self._states: dict[str, Any] = {}
        self._entropy = Drawn(f"peers {header.attempt}")

    def answers(self, machine: Any) -> dict[str, Any]:
        """The answers of both sites in the present stage."""
        asked: Mapping[str, Any] = {}
        if not isinstance(machine, coordinator.Advertising):
            asked = machine.requests()
        sent = {}
        for site in PEERS:
            self._states[site], sent[site] = self._answer(site, asked.get(site))
        return sent

    def _answer(self, site: str, request: Any) -> tuple[Any, Any]:
        state = self._states.get(site)
        match state:
            case None:
                rules = Rules(threshold=2, colluding=0, minimum_cohort=2)
                return participant.advertise(
                    self._header, site, rules, IDENTITIES[site], bytes(32), self._entropy
                )
            case participant.Advertised():
                return state.receive(request, ROSTER, self._entropy)
            case participant.Shared():
                after, vector = state.receive(request, np.zeros(self._length, dtype="<u4"))
                return after, vector.tobytes()
            case participant.Masked():
                return state.receive(request, IDENTITIES[site])
            case participant.Confirmed():
                return state.receive(request, ROSTER)
            case _:
                raise AssertionError("the attempt is over for this site")


def _request(machine: Any, context: bytes) -> tuple[str, Request] | None:
    """The next stage, and what the real site is asked in it."""
    match machine:
        case coordinator.Sharing():
            return "share", ShareRequest(context=context, adverts=machine.requests()[SITE])
        case coordinator.Masking():
            return "mask", MaskRequest(context=context, shares=machine.requests()[SITE])
        case coordinator.Confirming():
            return "confirm", ConfirmRequest(context=context, survivors=machine.requests()[SITE])
        case coordinator.Unmasking():
            return "unmask", UnmaskRequest(context=context, signatures=machine.requests()[SITE])
        case _:
            return None


def _plan(model: Path, digest: bytes) -> TrainingPlan:
    task = Classification(labels=("a", "b"), max_tokens=32)
    return TrainingPlan(
        federation="clinics",
        job="job",
        model=BaseModel(name="tiny", digest=digest),
        task=task,
        lora=plan_lora(
            model,
            task,
            rank=2,
            alpha=4.0,
            target_modules=("query",),
            layers=None,
            method="ffa",
            seed=5,
        ),
        training=Training(
            rounds=2,
            local_steps=1,
            expected_batch_size=8,
            optimizer=Sgd(adapter_learning_rate=0.1, head_learning_rate=0.1),
        ),
        privacy=LocalPrivacy(epsilon=8.0, delta=1e-4, clip_norm=1.0),
        aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-6),
    )
