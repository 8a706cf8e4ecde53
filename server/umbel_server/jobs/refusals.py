"""What an operator reads about the sites that refuse or are silent, and what to do about it.

A refusal is the name of a rule and nothing else. The site's own log says why.
"""

from collections.abc import Collection, Mapping

UNDECIDED = frozenset({"awaiting-approval", "site-paused", "site-not-ready", "roster-digest"})
"""Refusals of a plan that people at the site may still take back."""

_WHAT_TO_DO = {
    "attempt-lost": "it was stopped while it computed, or lost what it had computed: it takes part"
    " in the next attempt",
    "awaiting-approval": "its people have not decided yet: umbel-client approve",
    "budget": "what is left of its privacy budget does not pay for the whole plan: agree on a"
    " smaller epsilon",
    "ledger-rolled-back": "its state was put back to an earlier time: its people have to state what"
    " was spent",
    "malformed-message": "it may run an older Umbel, which does not know this message: let it"
    " upgrade",
    "release-missing": "it has not kept the adapter of the last round: the next attempt sends it",
    "roster-digest": "it has not approved today's roster: send it umbel-server roster export; its"
    " people run umbel-client roster approve, and restart umbel-client run",
    "revoked-key": "it holds a key of this attempt for revoked: compare with its people",
    "site-fault": "something went wrong there, which its own log says",
    "site-not-ready": "its people have to do something about its data or its ledger, which its own"
    " log says",
    "site-paused": "its people paused it: umbel-client resume",
    "wire-version": "its Umbel and this one have to be upgraded together",
}


def told(refused: Mapping[str, str], silent: Collection[str], stage: str = "") -> str:
    """Each site that refused, with the rule's name, and each that did not answer."""
    late = f" ({stage})" if stage else ""
    return "; ".join(
        [f"{site} refused: {check}" for site, check in sorted(refused.items())]
        + [f"{site} did not answer{late}" for site in sorted(silent)]
    )


def counted(refused: Mapping[str, str], silent: Collection[str], cohort: int) -> str | None:
    """How many sites of a cohort refused, and by which rules; else how many were silent."""
    if refused:
        rules = ", ".join(sorted({*refused.values()}))
        return f"{len(refused)} of {cohort} sites refused ({rules})"
    if silent:
        return f"{len(silent)} of {cohort} sites did not answer in time"
    return None


def remedy(refused: Mapping[str, str], silent: Collection[str]) -> str:
    """What the operator can do about them."""
    known = [
        f"{check}: {_WHAT_TO_DO[check]}"
        for check in sorted({*refused.values()})
        if check in _WHAT_TO_DO
    ]
    if any(check not in _WHAT_TO_DO for check in refused.values()):
        known.append("the log of each site that refused says why")
    if silent:
        known.append("see that the silent sites run: umbel-client status")
    return "; ".join(known)
