"""Targets: a site's state at each stage of an attempt, under any request of a server."""

import os
from collections.abc import Callable
from typing import Any

from fuzz.choices import Choices
from fuzz.mutate import encoded, mutated, tree_of
from fuzz.target import Place, Property, Target
from vectors.attempts import at_stage, prepared_at
from vectors.operations import REQUESTS
from vectors.values import ROSTER

from umbel_common.canonical import decode, encode
from umbel_common.errors import RemoteProtocolError
from umbel_common.secagg import participant
from umbel_common.secagg.messages import EncryptedShare, KeyAdvert, Survivors
from umbel_common.trust.identity import Signed, open_signed

SITE = "site-a"


def _site_at(stage: str) -> Callable[[Place], Property]:
    """A refused request leaves the state as it was; an accepted one keeps the stage's promise."""

    def make(_: Place) -> Property:
        run = at_stage(stage)
        state = run.states[SITE]
        before = encode(state)
        honest = tree_of(run.requests(stage)[SITE])
        others = [tree_of(part) for part in run.output.values()]

        def prove(data: bytes) -> None:
            tree = mutated(honest, Choices(data), others)
            request = decode(encoded(tree), REQUESTS[stage])
            vector = run.vector(SITE)
            try:
                after, answer = _receive(state, request, vector)
            except RemoteProtocolError:
                assert encode(state) == before
                assert vector.tobytes() == run.inputs["vectors"][SITE]
                raise
            _CHECKS[stage](state, request, after, answer)
            assert decode(encode(after), participant.AttemptState) == after  # type: ignore[arg-type]  # a union is a decodable type

        def _receive(state: Any, request: Any, vector: Any) -> Any:
            match state:
                case participant.Advertised():
                    return state.receive(request, ROSTER, os.urandom)
                case participant.Shared():
                    return state.receive(request, vector)
                case participant.Masked():
                    return state.receive(request, run.identities[SITE])
                case _:
                    return state.receive(request, ROSTER)

        return prove

    return make


def _shared(state: Any, request: Any, after: Any, answer: Any) -> None:
    """There is one share for each peer that advertised, and enough peers."""
    assert len(answer) + 1 == len(request) >= state.rules.threshold
    assert [share.recipient for share in answer] == [peer.peer for peer in after.peers]
    assert state.advert in request


def _masked(state: Any, request: Any, after: Any, answer: Any) -> None:
    """The vector is masked with the peers whose shares it holds, at least two sites in all."""
    assert {share.owner for share in after.held} == {share.sender for share in request}
    assert len(after.held) + 1 >= state.rules.threshold


def _confirmed(state: Any, request: Any, after: Any, answer: Any) -> None:
    """The site signed the set that it was asked about, and holds one share of each peer."""
    key = ROSTER.member(SITE).public_key
    assert open_signed(answer.signed, Survivors, key).sites == request == after.survivors
    owners = [share.owner for share in after.shares]
    assert owners == sorted({SITE, *(share.owner for share in state.held)})
    for share in after.shares:
        assert (share.kind == "self-mask") == (share.owner in request)


def _revealed(state: Any, request: Any, after: Any, answer: Any) -> None:
    """Shares are revealed only for as many signatures as the threshold, all by survivors."""
    signers = {signature.site for signature in request}
    assert len(signers) >= state.rules.threshold
    assert signers <= set(state.survivors)
    assert answer == state.shares


_CHECKS = {"share": _shared, "mask": _masked, "confirm": _confirmed, "reveal": _revealed}


def _prepared(_: Place) -> Property:
    """As a site at `mask`, with the adverts of a prepared attempt beside the shares."""
    run = prepared_at("mask")
    state = run.states[SITE]
    before = encode(state)
    honest = tree_of(run.requests("mask")[SITE])
    others = [tree_of(part) for part in run.output.values()]

    def prove(data: bytes) -> None:
        tree = mutated(honest, Choices(data), others)
        adverts, shares = decode(
            encoded(tree), tuple[tuple[Signed, ...], tuple[EncryptedShare, ...]]
        )
        vector = run.vector(SITE)
        try:
            after, _ = state.receive(adverts, shares, ROSTER, vector)
        except RemoteProtocolError:
            assert encode(state) == before
            assert vector.tobytes() == run.inputs["vectors"][SITE]
            raise
        _masked(state, shares, after, None)
        assert state.advertised.advert in adverts
        seen = {decode(advert.statement, KeyAdvert).site for advert in adverts}
        assert {share.sender for share in shares} < seen

    return prove


def _slot(_: Place) -> Property:
    """A slot shares with its whole cohort, once its own keys are in the request, or refuses."""
    run = prepared_at("advertise")
    keys = tuple(run.output["prepare"].values())
    slot = run.slots[SITE].slot
    honest = tree_of(keys)
    others = [honest, *(tree_of(part) for part in at_stage("end").output.values())]

    def prove(data: bytes) -> None:
        tree = mutated(honest, Choices(data), others)
        asked = decode(encoded(tree), tuple[Signed, ...])
        filled, shares = slot.fill(asked, ROSTER, os.urandom)
        assert slot.keys in asked
        cohort = slot.preparation.cohort
        assert sorted(share.recipient for share in shares) == [
            site for site in cohort if site != SITE
        ]
        assert {peer.peer for peer in filled.peers} | {SITE} == set(cohort)

    return prove


SITES = tuple(
    Target(name, make, (RemoteProtocolError,), share=250, inputs=18_000, guided=15_000)
    for name, make in (
        *((f"site: at {stage}", _site_at(stage)) for stage in _CHECKS),
        ("site: prepared", _prepared),
        ("site: slot", _slot),
    )
)
