"""A site that is shown what it signed last notices that its own state is an old copy.

This module is part of the core of the privacy guarantee. Never drop a check or move it behind
training, and never take the mark of an old copy back here.

The ledger and the journal are compared with each other, but a copied folder or a virtual machine's
snapshot puts both back together. Then only others know what this site signed since. Each advert of
keys carries the head that the ledger had, and the server shows every site its own last advert with
the next request to train. A server cannot forge it. It can withhold it, or show an older one: then
nothing is noticed here.
"""

from umbel_client.trainer.job import SiteJob
from umbel_common.canonical import decode_canonical
from umbel_common.errors import RemoteProtocolError, require
from umbel_common.plans.statements import HEADER_VERSIONS
from umbel_common.protocol.wire import LastAdvert
from umbel_common.secagg.messages import KeyAdvert
from umbel_common.trust.identity import Identity, label_of, verifies


def check_last_advert(last: LastAdvert, job: SiteJob, identity: Identity) -> None:
    """Step 11 of `handler`: marks a ledger that does not know what this site signed, and refuses.

    Args:
        identity: this site's identity.

    Raises:
        RemoteProtocolError: `ledger-rolled-back`; `other-context` or `malformed-message` if the
            server shows something other than an advert with its header.
    """
    label, advert = label_of(KeyAdvert), last.advert
    if not verifies(identity.public_key, label, advert.statement, advert.signature):
        # It was signed with a former key of this site, or not by this site: it proves nothing.
        return
    signed = decode_canonical(advert.statement, KeyAdvert)
    # The site's own signature over the context binds the header, which others signed too.
    header = decode_canonical(last.header.statement, HEADER_VERSIONS)
    require(header.context() == signed.context, "other-context", "an advert is of another attempt")
    try:
        require(
            job.knows(signed.ledger_head, header),
            "ledger-rolled-back",
            f"this site signed a head of its privacy ledger, for round {header.round} of job"
            f" {header.job}, that the ledger does not contain",
            field="ledger.sqlite",
            accepted=f"a continuation of {signed.ledger_head.hex()}",
            remedy="the state folder is an old copy, or a new one: bring back the latest, or state"
            " what was spent since: umbel-client budget state-spend (docs/budget.md)",
        )
    except RemoteProtocolError:
        job.mark_as_old_copy(signed.ledger_head)
        raise
