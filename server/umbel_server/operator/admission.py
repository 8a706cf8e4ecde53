"""Admitting sites: what a request must fulfil, the next roster, and the kit in return.

The law: a request is checked against everything that is known before anything is written, and a
relay is admitted only together with its site's kit. No site is in a roster by its own word alone:
the operator's people compare its fingerprint first.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from umbel_common.errors import IdentityError
from umbel_common.trust.enrolment import (
    SignedRequest,
    SiteKit,
    check_request,
    kit_to_json,
    sign_kit,
)
from umbel_common.trust.identity import Member, Member2, fingerprint, public_size
from umbel_common.trust.roster import RosterDocument, with_members, without_size
from umbel_common.trust.roster_file import document_to_json
from umbel_host.files.keys import read_identity
from umbel_host.files.text_file import write_new_text
from umbel_server.operator.admitted_sites import SiteEntry
from umbel_server.operator.authority import certificate_pem
from umbel_server.operator.config import ServerConfig, public_address
from umbel_server.operator.files import load_authority


@dataclass(frozen=True)
class Asked:
    """A request that was read."""

    signed: SignedRequest
    file: Path

    @property
    def site(self) -> str:
        return self.signed.request.site


def with_sites(
    document: RosterDocument,
    known: dict[str, SiteEntry],
    admitted: list[Asked],
    weight: int,
    size: int | None = None,
) -> RosterDocument:
    """The next roster, with the sites that ask; each request is checked against all before it.

    Args:
        known: the relays that were admitted, by the names of their sites.
        weight: the public size class of each of these sites.
        size: what each of them says it has, in records; None: nothing.

    Raises:
        SignatureError, IdentityError: names the request that cannot be admitted.
    """
    entries = dict(known)
    names = [one.site for one in admitted]
    twice = [one for number, one in enumerate(admitted) if one.site in names[:number]]
    if twice:
        raise IdentityError(
            "two requests are of one site: nothing was changed",
            file=twice[0].file,
            field="site",
            found=twice[0].site,
            accepted="one request of each site",
        )
    for one in admitted:
        check_request(one.signed, one.file)
        _check_new(one.signed, document, entries, one.file)
        request = one.signed.request
        member = Member2(
            name=request.site,
            public_key=request.identity,
            weight=weight,
            public_size=size,
        )
        document = _with_member(document, member)
        entries[request.site] = SiteEntry(request.site, request.relay_key, "")
    return document


def _with_member(document: RosterDocument, member: Member) -> RosterDocument:
    """Returns the next roster: with the new site, and without sites whose keys are revoked. No site
    could approve a roster with a revoked key."""
    roster, dead = document.roster, document.revoked()
    stay = [other for other in roster.members if other.public_key not in dead]
    gone = {other.name: other for other in document.departed}
    gone |= {
        other.name: without_size(other) for other in roster.members if other.public_key in dead
    }
    return msgspec.structs.replace(
        document,
        roster=with_members(roster, (*stay, member)),
        departed=tuple(gone[name] for name in sorted(gone) if name != member.name),
    )


def with_size(document: RosterDocument, site: str, size: int) -> RosterDocument:
    """The next roster, in which a site has another public size.

    Raises:
        IdentityError: no such site takes part, or it has this size already.
    """
    roster = document.roster
    member = roster.member(site)
    if public_size(member) == size:
        raise IdentityError(
            "a site has this public size already: nothing was changed",
            field="--public-size",
            found=size,
        )
    sized = Member2(
        name=site,
        public_key=member.public_key,
        weight=member.weight,
        public_size=size,
    )
    others = [other for other in roster.members if other.name != site]
    return msgspec.structs.replace(document, roster=with_members(roster, (*others, sized)))


def _check_new(
    asked: SignedRequest, document: RosterDocument, known: dict[str, SiteEntry], file: Path
) -> None:
    request, current = asked.request, document.roster
    if request.federation != current.federation:
        raise IdentityError(
            "a request is for another federation",
            file=file,
            found=request.federation,
            accepted=current.federation,
        )
    former, dead = current.find(request.site), document.revoked()
    if former is not None and former.public_key not in dead:
        raise IdentityError(
            "a site of this name is already in the roster",
            file=file,
            field="site",
            found=request.site,
            remedy="umbel-server sites renew, if it is the same site with the same identity;"
            " umbel-server sites revoke first, if its identity is lost; otherwise use another name",
        )
    keys = {member.public_key for member in current.members} | {current.operator}
    if request.identity in keys | dead:
        raise IdentityError(
            "a request's identity is another party's, or is revoked", file=file, field="identity"
        )
    _check_relay_key(asked, known, file)


def _check_relay_key(asked: SignedRequest, known: dict[str, SiteEntry], file: Path) -> None:
    # An entry of this name that is not in the roster is left over from an interrupted command.
    others = (entry for owner, entry in known.items() if owner != asked.request.site)
    if any(asked.request.relay_key == entry.relay_key for entry in others):
        raise IdentityError("a request's relay key is another site's", file=file, field="relay_key")


def issue(
    settings: ServerConfig,
    asked: Asked,
    document: RosterDocument,
    out: Path,
    written: list[Path],
) -> SiteEntry:
    """Issues the certificate and writes the kit; returns the entry that admits the relay.

    Args:
        out: the kit's file.
        written: files to remove if a later step fails; the kit is added to them.
    """
    request = asked.signed.request
    key = check_request(asked.signed, asked.file)
    authority = load_authority(settings)
    certificate = authority.site(request.site, key, datetime.now(UTC))
    pem = certificate_pem(certificate).decode()
    kit = SiteKit(
        federation=document.roster.federation,
        site=request.site,
        server=public_address(settings),
        server_ca=certificate_pem(authority.certificate).decode(),
        certificate=pem,
        roster=document_to_json(document),
    )
    write_new_text(out, kit_to_json(sign_kit(kit, read_identity(Path(settings.identity)))))
    written.append(out)
    return SiteEntry(name=request.site, relay_key=request.relay_key, certificate=pem)


def check_renewal(asked: Asked, document: RosterDocument, known: dict[str, SiteEntry]) -> None:
    """Refuses a new certificate for anybody but a site that takes part with this identity.

    Raises:
        SignatureError, IdentityError: says why.
    """
    check_request(asked.signed, asked.file)
    request, file, site = asked.signed.request, asked.file, asked.site
    member, who = document.roster.find(site), f"{site} {fingerprint(request.identity)}"
    if member is None or site not in known or member.public_key != request.identity:
        raise IdentityError(
            "no site of this name and identity takes part",
            file=file,
            found=who,
            remedy="see umbel-server sites list; umbel-server sites add admits a new site",
        )
    if request.federation != document.roster.federation:
        raise IdentityError(
            "a request is for another federation",
            file=file,
            found=request.federation,
            accepted=document.roster.federation,
        )
    if known[site].revoked or member.public_key in document.revoked():
        raise IdentityError("this site is revoked for good", file=file, found=who)
    _check_relay_key(asked.signed, known, file)
