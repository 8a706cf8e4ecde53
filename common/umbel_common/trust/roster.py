"""What a site pins: a roster, and what is known about keys that are, were or must not be in it.

The law: a roster is hashed, and every document that was ever pinned must still be read. So no field
of either is renamed, reordered or removed.

A document is only read here. `pinning` says whether its statements hold, and whether a site may pin
it.
"""

from collections.abc import Iterable

from umbel_common.canonical import Value
from umbel_common.trust.identity import Member, Member2, PublicKey, Roster, Roster2, public_size
from umbel_common.trust.key_statements import OPERATOR, SignedRevocation, SignedRotation


class RosterDocument(Value, frozen=True):
    """A roster, and what is known about keys that are, were or must not be in it."""

    roster: Roster
    rotations: tuple[SignedRotation, ...] = ()
    revocations: tuple[SignedRevocation, ...] = ()
    revoked_here: tuple[PublicKey, ...] = ()
    """Keys that the keeper of this document revoked by its own decision, without a signature."""
    departed: tuple[Member, ...] = ()
    """Former members as last known: one that comes back with another key must account for it."""

    def __post_init__(self) -> None:
        federations = {
            *(signed.rotation.federation for signed in self.rotations),
            *(signed.revocation.federation for signed in self.revocations),
        }
        if federations - {self.roster.federation}:
            raise ValueError(
                "a rotation or revocation belongs to another federation than the roster"
            )
        if any(member.name == OPERATOR for member in self.roster.members):
            raise ValueError(f"no site may be called {OPERATOR}")

    def parties(self) -> dict[str, bytes]:
        """The key of each party in the roster: `OPERATOR` first, then the sites by name."""
        members = {member.name: member.public_key for member in self.roster.members}
        return {OPERATOR: self.roster.operator, **members}

    def revoked(self) -> frozenset[bytes]:
        """All keys that this document revokes; none may speak, even if a roster lists it."""
        signed = (entry.revocation.key for entry in self.revocations)
        return frozenset((*signed, *self.revoked_here))

    def leads(self, party: str, old_key: bytes, new_key: bytes) -> bool:
        """Whether this document's rotations of `party` lead from one key to the other, in any
        number of steps."""
        successors = {
            signed.rotation.old_key: signed.rotation.new_key
            for signed in self.rotations
            if signed.rotation.party == party
        }
        key: bytes | None = old_key
        # At most one step for each rotation, so a circle ends too.
        for _ in successors:
            key = None if key is None else successors.get(key)
            if key == new_key:
                return True
        return False


def with_members(roster: Roster, members: Iterable[Member]) -> Roster:
    """The roster with other members, who are sorted by name.

    It is of version 2 only if it says what version 1 cannot, so that a roster has one digest.

    Raises:
        ValueError: two parties have one name or one key.
    """
    ordered = sorted(members, key=lambda member: member.name)
    second = roster if isinstance(roster, Roster2) else None
    approvers = second.approvers if second else ()
    approvals = second.approvals if second else 0
    if not (approvers or approvals or any(public_size(one) is not None for one in ordered)):
        return Roster(
            federation=roster.federation,
            operator=roster.operator,
            members=tuple(without_size(member) for member in ordered),
        )
    return Roster2(
        federation=roster.federation,
        operator=roster.operator,
        members=tuple(
            Member2(
                name=one.name,
                public_key=one.public_key,
                weight=one.weight,
                public_size=public_size(one),
            )
            for one in ordered
        ),
        approvers=approvers,
        approvals=approvals,
    )


def without_size(member: Member) -> Member:
    """The member in version 1, as a document keeps those who left."""
    return Member(name=member.name, public_key=member.public_key, weight=member.weight)


class KeyChange(Value, frozen=True):
    """One party's key in the pinned roster and in the proposed one."""

    party: str
    old_key: PublicKey
    new_key: PublicKey
    rotated: bool
    """Whether rotations lead from the old key to the new one."""


class WeightChange(Value, frozen=True):
    """One site's size class in the pinned roster and in the proposed one."""

    site: str
    old_weight: int
    new_weight: int


class SizeChange(Value, frozen=True):
    """One site's public size in the pinned roster and in the proposed one; None: it has none."""

    site: str
    old_size: int | None
    new_size: int | None


class RosterChange(Value, frozen=True):
    """What pinning another document would change."""

    added: tuple[Member, ...] = ()
    removed: tuple[Member, ...] = ()
    keys: tuple[KeyChange, ...] = ()
    """New keys of parties that stay or come back, the operator included."""
    weights: tuple[WeightChange, ...] = ()
    revoked: tuple[PublicKey, ...] = ()
    """Keys that were not revoked before, sorted."""
    sizes: tuple[SizeChange, ...] = ()


def compare(pinned: RosterDocument | None, merged: RosterDocument) -> RosterChange:
    """What pinning `merged` changes; before the first approval, every member is added.

    Args:
        merged: a result of `merge`, so its rotations are verified.
    """
    members = {member.name: member for member in merged.roster.members}
    if pinned is None:
        return RosterChange(added=merged.roster.members, revoked=tuple(sorted(merged.revoked())))
    former = {member.name: member for member in pinned.roster.members}
    departed = {member.name: member.public_key for member in pinned.departed}
    old_keys, new_keys = departed | pinned.parties(), merged.parties()
    return RosterChange(
        added=tuple(member for name, member in members.items() if name not in former),
        removed=tuple(member for name, member in former.items() if name not in members),
        keys=tuple(
            KeyChange(party, old_keys[party], key, merged.leads(party, old_keys[party], key))
            for party, key in new_keys.items()
            if party in old_keys and old_keys[party] != key
        ),
        weights=tuple(
            WeightChange(name, former[name].weight, member.weight)
            for name, member in members.items()
            if name in former and former[name].weight != member.weight
        ),
        revoked=tuple(sorted(merged.revoked() - pinned.revoked())),
        sizes=tuple(
            SizeChange(name, public_size(former[name]), public_size(member))
            for name, member in members.items()
            if name in former and public_size(former[name]) != public_size(member)
        ),
    )
