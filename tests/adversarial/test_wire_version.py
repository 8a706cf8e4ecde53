"""A server of another wire version: the site says so to both sides' people, and does nothing."""

import pytest
from adversarial.federation import Federation
from adversarial.weaken import Stopped

from umbel_common.protocol.wire import MAGIC, WIRE_VERSION, OfferReply, OfferRequest, seal_request
from umbel_common.trust.identity import sign

SITE = "site-00"


@pytest.mark.parametrize(
    ("version", "behind"),
    [(WIRE_VERSION - 1, "upgrade Umbel at the operator"), (WIRE_VERSION + 1, "on this side")],
)
def test_a_request_of_another_version_is_refused_and_both_versions_are_named(
    federation: Federation, version: int, behind: str
) -> None:
    offer = OfferRequest(plan=sign(federation.operator, federation.plan))
    sealed = seal_request(federation.operator, SITE, offer)
    other = f"UMB{version}".encode() + sealed[len(MAGIC) :]
    # The reply is in this side's version, because no version is common to both.
    with pytest.raises(Stopped) as stopped:
        federation.deliver(SITE, other)
    assert stopped.value.check == "wire-version"
    (error,) = federation.observers[SITE].errors
    assert error.message == (
        f"the operator speaks wire version {version}, this side speaks {WIRE_VERSION}"
    )
    assert behind in (error.remedy or "")
    assert isinstance(federation.deliver(SITE, sealed), OfferReply)
