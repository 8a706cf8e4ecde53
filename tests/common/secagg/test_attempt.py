"""Sites and coordinator together: the secure sum is the plaintext sum, or there is no sum."""

import os
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import pytest
from fuzz.record import RECORD, full_run
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from umbel_common.errors import RemoteProtocolError, RoundAborted
from umbel_common.secagg.encoding import Encoding, decode_sum, encode
from umbel_common.secagg.messages import KeyAdvert
from umbel_common.trust.identity import sign

STAGES = ("advertise", "share", "mask", "confirm", "reveal")
ABORTS = (
    "too-few-adverts",
    "too-few-shares",
    "too-few-vectors",
    "too-few-confirmations",
    "too-few-reveals",
)
NEVER = len(STAGES)
SMALL, LARGE = [range(size, size + 1) for size in range(3, 13)], range(13, 41)
# A large cohort is any of them; `make fuzz` has its number of attempts for each size.
COHORTS = (
    [*((sizes, 900) for sizes in SMALL), *((range(size, size + 1), 36) for size in LARGE)]
    if full_run()
    else [
        *((sizes, 8) for sizes in SMALL),
        (LARGE, 4),
        # The long search.
        *(pytest.param(sizes, 60, marks=pytest.mark.full) for sizes in SMALL),
        pytest.param(LARGE, 30, marks=pytest.mark.full),
    ]
)
LENGTH = 3


@dataclass(frozen=True)
class Case:
    threshold: int
    colluding: int
    ring_bits: Literal[16, 32]
    leaves: list[int]
    """For each site, the index of the stage that it does not answer; NEVER if it stays."""
    weights: list[int]
    deltas: list[list[float]]
    prepared: bool


@st.composite
def cases(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> Case:
    size = draw(sizes)
    colluding = draw(st.integers(0, min(2, size - 1)))
    lowest = (size + colluding) // 2 + 1
    leaves = st.one_of(st.just(NEVER), st.just(NEVER), st.integers(0, NEVER))
    coordinate = st.floats(-2, 2, width=32)
    return Case(
        threshold=draw(st.integers(lowest, size)),
        colluding=colluding,
        ring_bits=draw(st.sampled_from([16, 32])),
        leaves=draw(st.lists(leaves, min_size=size, max_size=size)),
        weights=draw(st.lists(st.integers(1, 5), min_size=size, max_size=size)),
        deltas=[[draw(coordinate) for _ in range(LENGTH - 1)] for _ in range(size)],
        prepared=draw(st.booleans()),
    )


def check(make_attempt, case: Case) -> None:
    size = len(case.leaves)
    encoding = Encoding(
        clip_range=1.0, step=0.01, ring_bits=case.ring_bits, max_weight=5, sites=size
    )
    names = [f"site-{index:02}" for index in range(size)]
    weights = dict(zip(names, case.weights, strict=True))
    vectors = {
        name: encode(np.array(delta, dtype=np.float32), weights[name], encoding, os.urandom)
        for name, delta in zip(names, case.deltas, strict=True)
    }
    attempt = make_attempt(
        size,
        case.threshold,
        vectors=vectors,
        ring_bits=case.ring_bits,
        length=LENGTH,
        colluding=case.colluding,
        prepared=case.prepared,
    )
    left = dict(zip(names, case.leaves, strict=True))
    while attempt.stage != "end":
        index = STAGES.index(attempt.stage)
        staying = {name for name in names if left[name] > index}
        attempt.collect(silent=set(names) - staying)
        if len(staying) < case.threshold:
            with pytest.raises(RoundAborted) as caught:
                attempt.close()
            assert caught.value.check == ABORTS[index]
            return
        attempt.close()
    aggregate = attempt.machine
    survivors = tuple(name for name in names if left[name] > STAGES.index("mask"))
    assert aggregate.survivors == survivors
    assert aggregate.total.dtype == vectors[names[0]].dtype
    assert aggregate.total.tobytes() == attempt.plain_sum(survivors).tobytes()
    weight, mean = decode_sum(aggregate.total, encoding)
    assert weight == sum(weights[name] for name in survivors)
    clipped = sum(
        weights[name] * np.clip(np.array(delta), -1, 1)
        for name, delta in zip(names, case.deltas, strict=True)
        if name in survivors
    )
    assert np.abs(mean - clipped / weight).max() <= encoding.step + 1e-6


@pytest.mark.parametrize(("sizes", "count"), COHORTS)
def test_the_sum_of_a_random_cohort_is_the_plaintext_sum_or_the_attempt_aborts(
    make_attempt, sizes, count
):
    with RECORD.attempts() as counted:

        @seed(RECORD.seed + sizes.start)
        @settings(max_examples=count, database=None, suppress_health_check=[HealthCheck.too_slow])
        @given(case=cases(st.integers(sizes.start, sizes.stop - 1)))
        def attempts(case):
            counted[len(case.leaves)] += 1
            check(make_attempt, case)

        attempts()
    assert counted.total() >= count


def resigned(attempt, signed, context):
    """A site's advert with the same keys, signed for another context."""
    advert = msgspec.msgpack.decode(signed.statement, type=KeyAdvert)
    identity = attempt.identities[advert.site]
    return sign(identity, msgspec.structs.replace(advert, context=context))


def test_a_site_that_was_shown_another_header_is_not_shared_with(make_attempt):
    attempt = make_attempt(4, 3).run_to("share")
    other = msgspec.structs.replace(attempt.header, adapter=bytes([1] * 32))
    *honest, last = attempt.requests()["site-00"]
    with pytest.raises(RemoteProtocolError) as caught:
        attempt.receive("site-00", (*honest, resigned(attempt, last, other.context())))
    assert caught.value.check == "other-context"
    attempt.receive("site-00", (*honest, last))


def test_masks_and_shares_of_a_site_that_was_shown_another_header_do_not_fit(make_attempt):
    """Even with valid signatures on both headers over the same keys, the sum is noise."""
    attempt = make_attempt(4, 3).run_to("share")
    state = attempt.states["site-03"]
    other = msgspec.structs.replace(attempt.header, adapter=bytes([1] * 32)).context()
    adverts = tuple(resigned(attempt, signed, other) for signed in attempt.requests()["site-03"])
    misled = msgspec.structs.replace(state, context=other, advert=adverts[-1])
    misled, shares = misled.receive(adverts, attempt.roster, os.urandom)
    attempt.run_to("mask")
    request = attempt.requests()["site-00"]
    with pytest.raises(RemoteProtocolError) as caught:
        attempt.receive("site-00", (*request[:-1], shares[0]))
    assert caught.value.check == "share-decrypt"
    attempt.states["site-03"] = msgspec.structs.replace(
        attempt.states["site-03"],
        peers=tuple(
            msgspec.structs.replace(ours, mask_key=theirs.mask_key)
            for ours, theirs in zip(attempt.states["site-03"].peers, misled.peers, strict=True)
        ),
    )
    attempt.run_to("end")
    assert (attempt.machine.total != attempt.plain_sum(attempt.header.cohort)).all()


def test_one_masked_vector_tells_nothing_of_its_content(make_attempt):
    """Two attempts over the same vectors send masked vectors without a common element."""
    zeros = {f"site-{index:02}": np.zeros(64, dtype="<u4") for index in range(4)}
    sent = []
    for _ in range(2):
        attempt = make_attempt(4, 3, vectors=zeros, length=64).run_to("mask")
        request = attempt.requests()["site-01"]
        sent.append(np.frombuffer(attempt.answer("site-01", request), dtype="<u4"))
    assert (sent[0] != sent[1]).all()
    assert (sent[0] != 0).all()
