"""What a site is for as long as its process runs.

This module is part of the core of the privacy guarantee. Never open a statement with another key
than the pinned operator's, and never seal a reply that does not name its request.
"""

from dataclasses import dataclass

from umbel_client.site.pinned_roster import Pinned
from umbel_client.site.policy import Policy
from umbel_client.storage.journal import Journal
from umbel_common.canonical import Entropy, V
from umbel_common.protocol.wire import Reply, seal_reply
from umbel_common.trust.identity import Identity, Roster, Signed, open_signed


@dataclass(frozen=True)
class Site:
    """A site's name, and everything that it judges, signs and remembers with."""

    name: str
    pinned: Pinned
    """Whom this site believes."""
    identity: Identity
    policy: Policy
    journal: Journal
    entropy: Entropy

    @property
    def roster(self) -> Roster:
        """The pinned roster."""
        return self.pinned.roster

    def open(self, signed: Signed, kind: type[V] | tuple[type[V], ...]) -> V:
        """The statement in something that the operator of the pinned roster signed.

        Args:
            kind: its type, or the versions of one.

        Raises:
            RemoteProtocolError: `pinned-signature` or `malformed-message`.
        """
        return open_signed(signed, kind, self.roster.operator, "operator")

    def seal(self, reply: Reply, asked: bytes) -> bytes:
        """A reply as it travels: signed, and bound to the request that it answers.

        Args:
            asked: digest of the sealed request, 32 bytes.
        """
        return seal_reply(self.identity, self.name, reply, asked)
