"""A server, or a network, that sends what nobody should read or act on."""

from collections.abc import Callable

import msgspec
import pytest
from adversarial.federation import Federation
from adversarial.weaken import Stopped

from umbel_common.protocol.wire import seal_request

SITE = "site-00"


@pytest.mark.attack("oversized-message")
def test_a_server_sends_more_than_any_plan_allows(federation: Federation) -> None:
    federation.offer()
    request = msgspec.structs.replace(federation.train_request(), adapter=bytes(64 * 2**20))
    try:
        federation.ask(SITE, request)
    except Stopped as stopped:
        # Without the limit, the message was hashed, parsed and compared with the plan.
        if stopped.check != "adapter-length":
            raise


@pytest.mark.attack("pinned-signature")
def test_a_network_rewrites_a_survivor_set_on_its_way(
    open_federation: Callable[..., Federation],
) -> None:
    federation = open_federation(4)
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    attempt = federation.drive(attempt, until="confirm", silent="site-03")
    sealed = seal_request(federation.operator, SITE, attempt.requests()[SITE])
    assert sealed.count(b"site-02") == 1
    reply = federation.deliver(SITE, sealed.replace(b"site-02", b"site-03"))
    assert b"site-03" in reply.signature.signed.statement


@pytest.mark.attack("survivor-order", "canonical-set")
def test_a_server_has_one_set_signed_in_two_encodings(federation: Federation) -> None:
    federation.offer()
    request = federation.drive(federation.attempt(), until="confirm").requests()[SITE]
    federation.ask(SITE, msgspec.structs.replace(request, survivors=request.survivors[::-1]))


@pytest.mark.attack("pinned-signature")
def test_a_server_delivers_a_request_to_a_site_that_it_is_not_for(federation: Federation) -> None:
    """One site's shares, replayed to another, would answer for the wrong pairs."""
    federation.offer()
    sealed = seal_request(federation.operator, "site-01", federation.train_request())
    federation.deliver(SITE, sealed)


def test_no_part_of_a_message_is_taken_for_the_whole(federation: Federation) -> None:
    federation.offer()
    sealed = seal_request(federation.operator, SITE, federation.train_request())
    for length in (*range(80), *range(80, len(sealed), 397), len(sealed) - 1):
        with pytest.raises(Stopped) as caught:
            federation.deliver(SITE, sealed[:length])
        assert caught.value.check in ("malformed-message", "pinned-signature")
    assert federation.spent_rounds(SITE) == 0


def test_the_order_of_keys_and_shares_in_a_message_changes_nothing(federation: Federation) -> None:
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="share")
    for field in ("adverts", "shares"):
        replies = {}
        for site, request in attempt.requests().items():
            turned = {field: getattr(request, field)[::-1]}
            replies[site] = federation.ask(site, msgspec.structs.replace(request, **turned))
        attempt = federation.take(attempt, replies)
    outcome = federation.drive(attempt)
    assert federation.is_sum_of(outcome.aggregate.total, *federation.identities)
