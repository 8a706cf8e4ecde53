"""Rosters and their changes as people read them. A fingerprint never wraps: it is read out."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from umbel_common.trust.identity import fingerprint
from umbel_common.trust.key_statements import OPERATOR
from umbel_common.trust.roster import KeyChange, RosterChange, RosterDocument
from umbel_host.terminal import print_lines


def print_roster(console: Console, document: RosterDocument, site: str) -> None:
    """Everyone in the roster, and the keys that are revoked."""
    roster = document.roster
    print_lines(console, [("federation", roster.federation), ("digest", roster.digest().hex())])
    revoked = document.revoked()
    weights = {member.name: str(member.weight) for member in roster.members}
    table = _table("party", "fingerprint", "weight", "")
    for party, key in document.parties().items():
        notes = [
            *(["this site"] if party == site else []),
            *(["REVOKED"] if key in revoked else []),
        ]
        table.add_row(party, fingerprint(key), weights.get(party, ""), ", ".join(notes))
    console.print()
    console.print(table)
    if revoked:
        print_revocations(console, document, revoked)


def print_revocations(console: Console, document: RosterDocument, keys: Iterable[bytes]) -> None:
    """Revoked keys of a document, and by whose decision."""
    signers = {entry.revocation.key: entry.signer for entry in document.revocations}
    table = _table("revoked key", "by")
    for key in sorted(keys):
        by = {None: "this site", key: "its own holder"}.get(signers.get(key), OPERATOR)
        table.add_row(fingerprint(key), by)
    console.print()
    console.print(table)


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
    table = _table("", "party", "fingerprint", "")
    for member in change.added:
        table.add_row("+", member.name, fingerprint(member.public_key), f"weight {member.weight}")
    for member in change.removed:
        table.add_row("-", member.name, fingerprint(member.public_key), "")
    for key in change.keys:
        table.add_row("-", key.party, fingerprint(key.old_key), "old key")
        table.add_row("+", key.party, fingerprint(key.new_key), _witness(key))
    if table.rows:
        console.print()
        console.print(table)
    for weight in change.weights:
        console.print(f"weight of {weight.site}: {weight.old_weight} -> {weight.new_weight}")
    if change.revoked:
        print_revocations(console, merged, change.revoked)
    if change == RosterChange():
        console.print("\nEveryone stays, with the same key and weight.")


def _witness(key: KeyChange) -> str:
    return "rotated by old key" if key.rotated else "NOT BY OLD KEY"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        # Long names fold, so that all of a fingerprint stays on its line.
        whole = name != "party"
        table.add_column(name, no_wrap=whole, overflow="fold", justify="left")
    return table
