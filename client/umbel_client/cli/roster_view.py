"""Rosters and their changes as people read them. A fingerprint never wraps: it is read out."""

from collections.abc import Iterable

from rich.console import Console

from umbel_common.trust.identity import fingerprint, public_size
from umbel_common.trust.key_statements import OPERATOR
from umbel_common.trust.roster import KeyChange, RosterChange, RosterDocument
from umbel_host.terminal import print_lines, table


def print_roster(console: Console, document: RosterDocument, site: str) -> None:
    """Everyone in the roster, and the keys that are revoked."""
    roster = document.roster
    print_lines(console, [("federation", roster.federation), ("digest", roster.digest().hex())])
    revoked = document.revoked()
    weights = {member.name: str(member.weight) for member in roster.members}
    sizes = {member.name: _records(public_size(member)) for member in roster.members}
    sized = any(public_size(member) is not None for member in roster.members)
    headings = ("party", "fingerprint", "weight", *(["public size"] if sized else []), "")
    members = table(*headings, folding=("party",))
    for party, key in document.parties().items():
        notes = [
            *(["this site"] if party == site else []),
            *(["REVOKED"] if key in revoked else []),
        ]
        told = [weights.get(party, ""), *([sizes.get(party, "")] if sized else [])]
        members.add_row(party, fingerprint(key), *told, ", ".join(notes))
    console.print()
    console.print(members)
    if revoked:
        print_revocations(console, document, revoked)


def roster_json(document: RosterDocument, site: str) -> dict[str, object]:
    """A roster as a document for programs."""
    roster, revoked = document.roster, document.revoked()
    weights = {member.name: member.weight for member in roster.members}
    sizes = {member.name: public_size(member) for member in roster.members}
    return {
        "federation": roster.federation,
        "digest": roster.digest().hex(),
        "parties": [
            {
                "party": party,
                "fingerprint": fingerprint(key),
                "weight": weights.get(party),
                "public_size": sizes.get(party),
                "this_site": party == site,
                "revoked": key in revoked,
            }
            for party, key in document.parties().items()
        ],
        "revoked": [fingerprint(key) for key in sorted(revoked)],
    }


def print_revocations(console: Console, document: RosterDocument, keys: Iterable[bytes]) -> None:
    """Revoked keys of a document, and by whose decision."""
    signers = {entry.revocation.key: entry.signer for entry in document.revocations}
    revocations = table("revoked key", "by")
    for key in sorted(keys):
        by = {None: "this site", key: "its own holder"}.get(signers.get(key), OPERATOR)
        revocations.add_row(fingerprint(key), by)
    console.print()
    console.print(revocations)


def print_change(
    console: Console, former: RosterDocument, merged: RosterDocument, change: RosterChange
) -> None:
    """What approving `merged` in the place of `former` would change, party by party."""
    print_lines(
        console,
        [
            ("federation", merged.roster.federation),
            ("pinned", former.roster.digest().hex()),
            ("proposed", merged.roster.digest().hex()),
        ],
    )
    changes = table("", "party", "fingerprint", "", folding=("party",))
    for member in change.added:
        size = _records(public_size(member))
        note = f"weight {member.weight}" + (f", public size {size}" if size else "")
        changes.add_row("+", member.name, fingerprint(member.public_key), note)
    for member in change.removed:
        changes.add_row("-", member.name, fingerprint(member.public_key), "")
    for key in change.keys:
        changes.add_row("-", key.party, fingerprint(key.old_key), "old key")
        changes.add_row("+", key.party, fingerprint(key.new_key), _witness(key))
    if changes.rows:
        console.print()
        console.print(changes)
    for weight in change.weights:
        console.print(f"weight of {weight.site}: {weight.old_weight} -> {weight.new_weight}")
    for sized in change.sizes:
        old, new = (_records(one) or "none" for one in (sized.old_size, sized.new_size))
        console.print(f"public size of {sized.site}: {old} -> {new}")
    if change.revoked:
        print_revocations(console, merged, change.revoked)
    if change == RosterChange():
        console.print("\nEveryone stays, with the same key and weight.")


def _records(size: int | None) -> str:
    return "" if size is None else f"{size:,}"


def _witness(key: KeyChange) -> str:
    return "rotated by old key" if key.rotated else "NOT BY OLD KEY"
