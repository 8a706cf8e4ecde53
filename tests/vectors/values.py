"""One honest value of every signed statement and of every message."""

import msgspec
from vectors.cases import identity, sample

from umbel_common.canonical import Value
from umbel_common.plans.figures import GateResult
from umbel_common.plans.plan import (
    Adam,
    Aggregation,
    BaseModel,
    Classification,
    DistributedPrivacy,
    FederatedEvaluation,
    LocalPrivacy,
    Lora,
    NoOptimizer,
    NoPrivacy,
    ReleaseGate,
    Sgd,
    Tensor,
    Training,
    TrainingPlan,
    second_version,
)
from umbel_common.plans.server_optimizer import Schedule, ServerAdam, ServerSgd, ServerYogi
from umbel_common.plans.start import LabelNamesStart, ReleasedStart
from umbel_common.plans.statements import EarlyEnd, Release, RoundHeader, chained, with_sum
from umbel_common.protocol.transcript import (
    AttemptAborted,
    Entry,
    JobFinished,
    JobStarted,
    RoundReleased,
)
from umbel_common.protocol.wire import (
    ConfirmReply,
    ConfirmRequest,
    FillReply,
    FillRequest,
    FinishReply,
    FinishRequest,
    LastAdvert,
    MaskPreparedRequest,
    MaskReply,
    MaskRequest,
    OfferReply,
    OfferRequest,
    OfferUnderRoster,
    PrepareReply,
    PrepareRequest,
    Refusal,
    Reply,
    Request,
    ShareAgainRequest,
    ShareReply,
    ShareRequest,
    TogetherReply,
    TogetherRequest,
    TrainFromLastRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from umbel_common.secagg.messages import (
    EncryptedShare,
    KeyAdvert,
    PreparedKeys,
    RevealedShare,
    Survivors,
    SurvivorSignature,
    preparation_of,
)
from umbel_common.trust.identity import Approver, Member, Member2, Roster, Roster2, Signed, sign

SITES = ("site-a", "site-b", "site-c")
OPERATOR = identity("operator")
IDENTITIES = {site: identity(site) for site in SITES}

ROSTER = Roster(
    federation="clinics",
    operator=OPERATOR.public_key,
    members=tuple(
        Member(name=site, public_key=IDENTITIES[site].public_key, weight=index + 1)
        for index, site in enumerate(SITES)
    ),
)
ROSTER2 = Roster2(
    federation="clinics",
    operator=OPERATOR.public_key,
    members=tuple(
        Member2(
            name=site,
            public_key=IDENTITIES[site].public_key,
            weight=index + 1,
            public_size=None if index else 70_000,
        )
        for index, site in enumerate(SITES)
    ),
    approvers=(Approver(name="person-a", public_key=identity("person-a").public_key),),
    approvals=1,
)

PLAN = TrainingPlan(
    federation="clinics",
    job="diagnoses",
    model=BaseModel(name="tiny", digest=sample("model digest", 32)),
    task=Classification(labels=("benign", "malign ä")),
    lora=Lora(
        rank=2,
        alpha=4.0,
        target_modules=("query",),
        layers=(0, 300),
        method="alternate",
        seed=2**53 - 1,
        tensors=(
            Tensor(name="query.lora_A.weight", shape=(2, 300), role="lora_A"),
            Tensor(name="query.lora_B.weight", shape=(300, 2), role="lora_B"),
            Tensor(name="head.weight", shape=(2, 300), role="head"),
        ),
    ),
    training=Training(
        rounds=3,
        local_steps=2,
        expected_batch_size=70_000,
        optimizer=Adam(adapter_learning_rate=1e-3, head_learning_rate=1e-2),
    ),
    privacy=LocalPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0),
    aggregation=Aggregation(threshold=2, clip_range=1.0, step=1e-6),
)
OTHER_PLAN = TrainingPlan(
    federation="clinics",
    job="public-data",
    model=PLAN.model,
    task=PLAN.task,
    lora=Lora(
        rank=1,
        alpha=1.0,
        target_modules=(),
        layers=None,
        method="both",
        seed=0,
        tensors=PLAN.lora.tensors[2:],
    ),
    training=Training(
        rounds=1,
        local_steps=1,
        expected_batch_size=1,
        optimizer=Sgd(adapter_learning_rate=0.5, head_learning_rate=0.5, momentum=0.9),
    ),
    privacy=NoPrivacy(),
    aggregation=Aggregation(
        threshold=2, clip_range=1.0, step=1e-3, ring_bits=16, weights="size-class", max_weight=3
    ),
)
GATED_PLAN = msgspec.structs.replace(
    PLAN,
    release_gate=ReleaseGate(holdout=sample("holdout digest", 32), max_loss_increase=0.05),
)
PLAN2 = second_version(
    PLAN,
    server=ServerAdam(
        adapter_learning_rate=1e-3,
        head_learning_rate=0.25,
        schedule=Schedule(warmup_rounds=1, decay="cosine", final=0.125),
    ),
    start=LabelNamesStart(
        tensor=sample("start digest", 32), names=("no harm", "harm ä"), scale=10.0, tolerance=0.01
    ),
)
"""A plan of version 2 with a start and an optimizer of the server."""
GATED_PLAN2 = second_version(
    msgspec.structs.replace(
        GATED_PLAN, evaluation=FederatedEvaluation(noise_multiplier=4.0, max_records=500)
    ),
    server=ServerYogi(adapter_learning_rate=1e-3, beta1=0.5),
    start=ReleasedStart(
        adapter=sample("start digest", 32),
        plan=sample("earlier plan", 32),
        round=300,
        largest_norm=12.5,
    ),
)
SHARED_PLAN2 = second_version(
    msgspec.structs.replace(
        PLAN,
        lora=msgspec.structs.replace(PLAN.lora, method="fedsvd"),
        training=msgspec.structs.replace(PLAN.training, local_steps=1, optimizer=NoOptimizer()),
        privacy=DistributedPrivacy(
            epsilon=3.0,
            delta=1e-5,
            clip_norm=1.0,
            sampling_rate=0.09375,
            noise_bits=12,
            honest=2,
            least_survivors=3,
            most_attempts=300,
        ),
    ),
    server=ServerSgd(adapter_learning_rate=0.5, nesterov=True),
)

HEADER = RoundHeader(
    federation="clinics",
    job="diagnoses",
    round=1,
    attempt=1,
    plan=PLAN.digest(),
    roster=ROSTER.digest(),
    adapter=sample("adapter digest", 32),
    cohort=SITES,
)
CONTEXT = HEADER.context()
RELEASE = Release(
    federation="clinics",
    job="diagnoses",
    plan=PLAN.digest(),
    round=1,
    attempt=1,
    context=CONTEXT,
    adapter=sample("next adapter digest", 32),
    survivors=SITES[:2],
    total_weight=2,
)
HEADER2 = chained(
    msgspec.structs.replace(HEADER, plan=PLAN2.digest()), sample("transcript head", 32)
)
RELEASE2 = with_sum(
    msgspec.structs.replace(RELEASE, plan=PLAN2.digest(), context=HEADER2.context()),
    sample("sum digest", 32),
)
ADVERT = KeyAdvert(
    context=CONTEXT,
    site="site-a",
    cipher_key=sample("cipher key", 32),
    mask_key=sample("mask key", 32),
    seed_commitment=sample("commitment", 32),
    ledger_head=sample("ledger head", 32),
)
PREPARATION = preparation_of(HEADER)
PREPARED_KEYS = PreparedKeys(
    context=PREPARATION.context(),
    site="site-a",
    cipher_key=sample("cipher key", 32),
    mask_key=sample("mask key", 32),
)
EARLY_END = EarlyEnd(federation="clinics", job="diagnoses", plan=PLAN.digest(), round=1)
SURVIVORS = Survivors(context=CONTEXT, sites=SITES[:2])


def signed_by_operator(statement: Value) -> Signed:
    """A statement of the operator."""
    return sign(OPERATOR, statement)


SIGNED_KEYS = sign(IDENTITIES["site-a"], PREPARED_KEYS)
SIGNED_ADVERT = sign(IDENTITIES["site-a"], ADVERT)
CONFIRMATION = SurvivorSignature(site="site-a", signed=sign(IDENTITIES["site-a"], SURVIVORS))
SHARE = EncryptedShare(sender="site-b", recipient="site-a", ciphertext=sample("ciphertext", 92))

STATEMENTS: dict[str, tuple[str, Value]] = {
    "a plan": ("operator", PLAN),
    "a plan without privacy": ("operator", OTHER_PLAN),
    "a plan with a release gate": ("operator", GATED_PLAN),
    "a plan of version 2": ("operator", PLAN2),
    "a plan of version 2 with every part": ("operator", GATED_PLAN2),
    "a plan with shared noise": ("operator", SHARED_PLAN2),
    "a round header": ("operator", HEADER),
    "a round header of version 2": ("operator", HEADER2),
    "a release": ("operator", RELEASE),
    "a release of version 2": ("operator", RELEASE2),
    "an early end": ("operator", EARLY_END),
    "a key advert": ("site-a", ADVERT),
    "prepared keys": ("site-a", PREPARED_KEYS),
    "a survivor set": ("site-a", SURVIVORS),
    "the start of a job": (
        "operator",
        Entry(
            index=0,
            previous=bytes(32),
            event=JobStarted(
                plan=signed_by_operator(PLAN),
                roster=ROSTER.digest(),
                release=signed_by_operator(RELEASE),
            ),
        ),
    ),
    "a released round": (
        "operator",
        Entry(
            index=300,
            previous=sample("previous", 32),
            event=RoundReleased(
                header=signed_by_operator(HEADER),
                adverts=(SIGNED_ADVERT,),
                confirmations=(CONFIRMATION,),
                release=signed_by_operator(RELEASE),
            ),
        ),
    ),
    "a round that was held back": (
        "operator",
        Entry(
            index=301,
            previous=sample("previous", 32),
            event=RoundReleased(
                header=signed_by_operator(HEADER),
                adverts=(SIGNED_ADVERT,),
                confirmations=(CONFIRMATION,),
                release=signed_by_operator(
                    msgspec.structs.replace(RELEASE, adapter=HEADER.adapter)
                ),
                gate=GateResult(before=0.75, after=None, bound=0.05),
            ),
        ),
    ),
    "an aborted attempt": (
        "operator",
        Entry(
            index=70_000,
            previous=sample("previous", 32),
            event=AttemptAborted(
                header=signed_by_operator(HEADER),
                check="too-few-vectors",
                refusals=(("site-a", "budget"),),
            ),
        ),
    ),
    "the end of a job": (
        "operator",
        Entry(
            index=2**32,
            previous=sample("previous", 32),
            event=JobFinished(release=RELEASE.adapter, delivered=SITES),
        ),
    ),
    "the early end of a job": (
        "operator",
        Entry(
            index=2**32,
            previous=sample("previous", 32),
            event=JobFinished(
                release=RELEASE.adapter,
                delivered=SITES,
                early_end=signed_by_operator(EARLY_END),
            ),
        ),
    ),
}
"""Statements by name, each with its signer."""

REQUESTS: tuple[Request, ...] = (
    OfferRequest(plan=signed_by_operator(PLAN)),
    TrainRequest(
        header=signed_by_operator(HEADER),
        release=signed_by_operator(RELEASE),
        adapter=memoryview(sample("adapter", 40)),
        last=LastAdvert(header=signed_by_operator(HEADER), advert=SIGNED_ADVERT),
    ),
    ShareRequest(context=CONTEXT, adverts=(SIGNED_ADVERT,)),
    MaskRequest(context=CONTEXT, shares=(SHARE,)),
    ConfirmRequest(context=CONTEXT, survivors=SITES[:2]),
    UnmaskRequest(context=CONTEXT, signatures=(CONFIRMATION,)),
    FinishRequest(release=signed_by_operator(RELEASE), adapter=memoryview(sample("adapter", 300))),
    OfferUnderRoster(plan=signed_by_operator(PLAN), roster=ROSTER.digest()),
    TrainFromLastRequest(
        header=signed_by_operator(HEADER),
        release=signed_by_operator(RELEASE),
        last=LastAdvert(header=signed_by_operator(HEADER), advert=SIGNED_ADVERT),
        onto=sample("adapter before", 32),
        changed=(memoryview(sample("first tensor", 40)), memoryview(sample("second tensor", 300))),
    ),
    PrepareRequest(preparation=PREPARATION),
    FillRequest(context=PREPARATION.context(), keys=(SIGNED_KEYS,)),
    MaskPreparedRequest(context=CONTEXT, adverts=(SIGNED_ADVERT,), shares=(SHARE,)),
    ShareAgainRequest(context=CONTEXT, adverts=(SIGNED_ADVERT,)),
    TogetherRequest(
        stage=UnmaskRequest(context=CONTEXT, signatures=(CONFIRMATION,)),
        ahead=FillRequest(context=PREPARATION.context(), keys=(SIGNED_KEYS,)),
    ),
)
REPLIES: tuple[Reply, ...] = (
    OfferReply(plan=PLAN.digest()),
    TrainReply(advert=SIGNED_ADVERT),
    ShareReply(context=CONTEXT, shares=(SHARE,)),
    MaskReply(context=CONTEXT, vector=memoryview(sample("masked vector", 64))),
    ConfirmReply(context=CONTEXT, signature=CONFIRMATION),
    UnmaskReply(
        context=CONTEXT,
        shares=(
            RevealedShare(owner="site-a", kind="self-mask", share=sample("share", 32)),
            RevealedShare(owner="site-c", kind="mask-key", share=sample("other share", 32)),
        ),
    ),
    FinishReply(adapter=RELEASE.adapter),
    Refusal(check="budget"),
    PrepareReply(keys=SIGNED_KEYS),
    FillReply(context=PREPARATION.context(), shares=(SHARE,)),
    TogetherReply(
        stage=ConfirmReply(context=CONTEXT, signature=CONFIRMATION),
        ahead=PrepareReply(keys=SIGNED_KEYS),
    ),
)
