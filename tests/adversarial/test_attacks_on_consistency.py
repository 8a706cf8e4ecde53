"""A server that tells different sites different things."""

from collections.abc import Callable, Mapping

import msgspec
import pytest
from adversarial.extraction import keys_of, masks_of, remove_masks, secret_of
from adversarial.federation import Federation, believe, moved
from adversarial.weaken import Stopped

from umbel_common.adapters.vector import adapter_digest, initial_vector
from umbel_common.plans.statements import RoundHeader
from umbel_common.protocol.wire import ConfirmRequest, UnmaskRequest
from umbel_common.secagg.messages import Survivors, SurvivorSignature
from umbel_common.trust.identity import Identity, sign
from umbel_server.aggregation.attempt import Attempt

SITE = "site-00"
PEERS = ("site-01", "site-02")


def two_models(federation: Federation) -> tuple[RoundHeader, RoundHeader]:
    """Round 2 of the same job from two adapters (Pasquini et al. 2022, arXiv 2111.07380)."""
    federation.offer()
    federation.drive(federation.attempt())
    headers = []
    for shift in (0.1, 0.2):
        vector = moved(federation.plan, shift)
        digest = adapter_digest(federation.plan.digest(), vector)
        headers.append(federation.header(round=2, adapter=digest))
        federation.releases[digest] = federation.release(vector, round=1)
    return headers[0], headers[1]


def two_plans(federation: Federation) -> tuple[RoundHeader, RoundHeader]:
    """The same job under two plans."""
    privacy = msgspec.structs.replace(federation.plan.privacy, clip_norm=2.0)
    other = federation.make_plan(privacy=privacy)
    federation.offer(other, SITE)
    federation.offer(federation.plan, *PEERS)
    digest = adapter_digest(other.digest(), initial_vector(other))
    federation.releases[digest] = federation.release(plan=other.digest(), adapter=digest)
    return federation.header(), federation.header(plan=other.digest(), adapter=digest)


def two_rosters(federation: Federation) -> tuple[RoundHeader, RoundHeader]:
    """Two sites were each made to believe another roster."""
    federation.offer()
    other = msgspec.structs.replace(
        federation.roster,
        members=(
            *federation.roster.members,
            msgspec.structs.replace(
                federation.roster.members[0], name="site-99", public_key=bytes(32)
            ),
        ),
    )
    believe(federation.trainers[SITE], other)
    return federation.header(), federation.header(roster=other.digest())


@pytest.mark.attack("other-context", "context-binding")
@pytest.mark.parametrize("split", [two_models, two_plans, two_rosters])
def test_a_server_shows_one_site_another_world(
    federation: Federation, split: Callable[[Federation], tuple[RoundHeader, RoundHeader]]
) -> None:
    shown, shown_to_site = split(federation)
    federation.shown[SITE] = shown_to_site
    attempt = federation.drive(federation.attempt(shown), until="mask")
    vectors, attempt = federation.vectors(attempt)
    attempt = federation.drive(attempt, until="unmask")
    revealed = federation.reveal(attempt)
    keys = keys_of(attempt)
    total = sum(
        remove_masks(
            masks_of(attempt, shown_to_site if site == SITE else shown),
            {site: keys[site]},
            [vectors[site]],
            seeds={site: secret_of(site, "self-mask", shown, revealed)},
            secrets={},
        )
        for site in (SITE, *PEERS)
    )
    if not federation.is_sum_of(total, SITE, *PEERS, round_number=shown.round):
        # The masks between two sites cancel in one world only. In an unprepared attempt, the sites
        # cannot even read each other's shares.
        raise Stopped("context-binding")


@pytest.mark.attack("threshold-too-low")
def test_a_server_has_a_vector_unmasked_from_both_sides(
    open_federation: Callable[..., Federation],
) -> None:
    """Half of the sites believe that the victim survived, the other half that it dropped out."""
    federation = open_federation(6)
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    vectors, attempt = federation.vectors(attempt)
    everyone = attempt.header.cohort
    told = {site: everyone if site in everyone[:3] else everyone[1:] for site in everyone}
    revealed = reveal_after(federation, attempt, told, honest_signatures)
    seed = secret_of(SITE, "self-mask", attempt.header, revealed)
    secret = secret_of(SITE, "mask-key", attempt.header, revealed)
    opened = remove_masks(
        masks_of(attempt),
        keys_of(attempt),
        [vectors[SITE]],
        seeds={SITE: seed},
        secrets={SITE: secret},
    )
    assert federation.is_sum_of(opened, SITE)


Signatures = Mapping[str, SurvivorSignature]


def honest_signatures(told: Mapping[str, tuple[str, ...]], signed: Signatures, site: str) -> list:
    """The signatures over the set that the site was told."""
    return [signed[peer] for peer in told if told[peer] == told[site]]


def no_signatures(told: Mapping[str, tuple[str, ...]], signed: Signatures, site: str) -> list:
    return []


def signatures_over_other_sets(
    told: Mapping[str, tuple[str, ...]], signed: Signatures, site: str
) -> list:
    """The signatures of the sites in the set, over any set that they signed."""
    return [signed[peer] for peer in told[site]]


def forged_signatures(told: Mapping[str, tuple[str, ...]], signed: Signatures, site: str) -> list:
    """One signature for each site of the set, made by the server."""
    context = msgspec.msgpack.decode(signed[site].signed.statement)["context"]
    statement = Survivors(context=context, sites=told[site])
    server = Identity(bytes(32))
    return [SurvivorSignature(site=peer, signed=sign(server, statement)) for peer in told[site]]


def reveal_after(
    federation: Federation,
    attempt: Attempt,
    told: Mapping[str, tuple[str, ...]],
    signatures_for: Callable[..., list],
) -> dict:
    """The shares that each site reveals when it was told this set and shown these signatures."""
    context = attempt.header.context()
    signed = {
        site: federation.ask(site, ConfirmRequest(context=context, survivors=survivors)).signature
        for site, survivors in told.items()
    }
    return {
        site: federation.ask(
            site,
            UnmaskRequest(context=context, signatures=tuple(signatures_for(told, signed, site))),
        ).shares
        for site in told
    }


TOLD = {
    "site-00": ("site-00", "site-01", "site-03"),
    "site-01": ("site-00", "site-01", "site-02"),
    "site-02": ("site-00", "site-01", "site-02"),
    "site-03": ("site-00", "site-01", "site-03"),
    "site-04": ("site-00", "site-01", "site-04"),
}
"""Survivor sets by site. Each site finds itself and enough others in its set. All sets have the
victim and an accomplice in common, whose sum is the victim's delta."""


def sum_of_two(federation: Federation, signatures_for: Callable[..., list]) -> None:
    """Gathers shares from sites that were told different sets, for a set that nobody was told."""
    federation.offer()
    federation.play("site-01", own_keys=True)
    attempt = federation.drive(federation.attempt(), until="mask")
    vectors, attempt = federation.vectors(attempt)
    revealed = reveal_after(federation, attempt, TOLD, signatures_for)
    opened = remove_masks(
        masks_of(attempt),
        keys_of(attempt),
        [vectors["site-00"], vectors["site-01"]],
        seeds={
            site: secret_of(site, "self-mask", attempt.header, revealed)
            for site in ("site-00", "site-01")
        },
        secrets={
            site: secret_of(site, "mask-key", attempt.header, revealed)
            for site in ("site-02", "site-03", "site-04")
        },
    )
    assert federation.is_sum_of(opened, SITE)


@pytest.fixture
def trusting(open_federation: Callable[..., Federation]) -> Federation:
    """Five sites that assume that no other site works with the server."""
    return open_federation(5, {"*": "colluding_sites = 0"})


@pytest.mark.attack("too-few-signatures")
def test_a_server_tells_five_sites_five_survivor_sets(trusting: Federation) -> None:
    sum_of_two(trusting, no_signatures)


@pytest.mark.attack("other-survivors")
def test_a_server_shows_signatures_over_other_survivor_sets(trusting: Federation) -> None:
    sum_of_two(trusting, signatures_over_other_sets)


@pytest.mark.attack("pinned-signature")
def test_a_server_forges_the_peers_signatures(trusting: Federation) -> None:
    sum_of_two(trusting, forged_signatures)
