"""A server that asks a site again."""

from collections.abc import Callable

import msgspec
import pytest
from adversarial.extraction import keys_of, masks_of, remove_masks, secret_of
from adversarial.federation import Federation
from adversarial.weaken import Stopped

from umbel_common.protocol.wire import ConfirmRequest, UnmaskRequest

SITE = "site-00"
VICTIM = "site-03"


def asked_for_both_shares(federation: Federation, between: Callable[[str], None]) -> None:
    """Makes the victim's peers reveal a share of one kind, and then one of the other."""
    federation.offer()
    attempt = federation.drive(federation.attempt(), until="mask")
    vectors, attempt = federation.vectors(attempt)
    for site in federation.identities:
        federation.note_journal(site)
    everyone = attempt.header.cohort
    revealed = []
    for told in (everyone, everyone[:-1]):
        context = attempt.header.context()
        request = ConfirmRequest(context=context, survivors=told)
        signatures = tuple(federation.ask(site, request).signature for site in everyone[:-1])
        unmask = UnmaskRequest(context=context, signatures=signatures)
        revealed.append({site: federation.ask(site, unmask).shares for site in everyone[:-1]})
        for site in everyone[:-1]:
            between(site)
    survived, dropped = revealed
    opened = remove_masks(
        masks_of(attempt),
        keys_of(attempt),
        [vectors[VICTIM]],
        seeds={VICTIM: secret_of(VICTIM, "self-mask", attempt.header, survived)},
        secrets={VICTIM: secret_of(VICTIM, "mask-key", attempt.header, dropped)},
    )
    assert federation.is_sum_of(opened, VICTIM)


@pytest.mark.attack("durable-journal", "counted-answers")
def test_a_server_asks_for_both_shares_of_a_peer_with_a_restart_between(
    open_federation: Callable[..., Federation],
) -> None:
    federation = open_federation(4)
    asked_for_both_shares(federation, federation.crash)


@pytest.mark.attack("attempt-reused", "unique-attempt")
def test_a_server_uses_an_attempt_number_twice(open_federation: Callable[..., Federation]) -> None:
    federation = open_federation(4)
    federation.offer()
    for cohort in (("site-00", "site-01", "site-02"), ("site-00", "site-01", "site-03")):
        federation.drive(federation.attempt(federation.header(cohort=cohort)), until="confirm")


@pytest.mark.attack("recorded-answer", "attempt-reused", "unique-attempt")
def test_a_server_replays_the_request_of_an_attempt_for_fresh_keys(federation: Federation) -> None:
    federation.offer()
    request = federation.train_request()
    first, second = federation.ask(SITE, request), federation.ask(SITE, request)
    if first == second:
        raise Stopped("recorded-answer")
    assert first.advert.statement != second.advert.statement


# `other-keys` stops it too in a prepared attempt: test_attacks_on_slots.py.
@pytest.mark.way(False)
@pytest.mark.attack("other-context")
def test_a_server_replays_the_keys_of_an_earlier_attempt(federation: Federation) -> None:
    """A party that learnt an old mask key would know the new mask."""
    federation.offer()
    old = federation.drive(federation.attempt(), until="share").requests()[SITE].adverts
    attempt = federation.drive(federation.attempt(federation.header(attempt=2)), until="share")
    request = attempt.requests()[SITE]
    mixed = (request.adverts[0], *old[1:])
    federation.ask(SITE, msgspec.structs.replace(request, adverts=mixed))
