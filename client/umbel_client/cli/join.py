"""`umbel-client init` and `join`: a site's keys, its request to the operator, and the answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from umbel_client.cli import roster
from umbel_client.cli.options import CLIENT_TOML, Config
from umbel_client.site.joining import Own, set_up, set_up_alone, take_kit
from umbel_common.plans.alike import alike, seen, shown, told
from umbel_common.trust.identity import fingerprint
from umbel_host.terminal import Screen, enter_folder, name, print_lines, say, site_name


def _given(check: Callable[[str], str]) -> Callable[[str | None], str | None]:
    """The check of an option that may be absent."""
    return lambda value: None if value is None else check(value)


def init(
    site: Annotated[
        str | None, typer.Option(callback=_given(site_name), help="This site's name.")
    ] = None,
    federation: Annotated[
        str | None, typer.Option(callback=_given(name), help="Name of the federation.")
    ] = None,
    local: Annotated[
        bool,
        typer.Option(
            "--local",
            help="Write a client.toml for work on this machine alone: no federation, no keys.",
        ),
    ] = False,
    folder: Annotated[
        Path, typer.Option(help="This site's folder; it is made if it does not exist.")
    ] = Path(),
    data: Annotated[
        Path | None, typer.Option(help="The file with the records, for client.toml.")
    ] = None,
    public_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**9,
            help="About how many records (or patients) there are, as everybody may know.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The base model's folder, for client.toml; the policy then allows it."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="A label that the policy allows; once for each label of the plans."),
    ] = None,
) -> None:
    """Make this site's keys, the request that the operator needs, and a client.toml."""
    given = any(value is not None for value in (data, public_size, model, label))
    if local:
        if given or site is not None or federation is not None:
            raise typer.BadParameter(
                "takes no other option but --folder: name data and model in client.toml",
                param_hint="--local",
            )
        made = set_up_alone(folder)
        say(
            f"configuration  {made}\n\nName your records and a base model's folder in it."
            f"{enter_folder(folder)}"
        )
        return
    if site is None or federation is None:
        missing = "--site" if site is None else "--federation"
        raise typer.BadParameter(f"give {missing}, or --local to work alone", param_hint=missing)
    _check_labels(label or [])
    own = Own(data, public_size, model, label or ()) if given else None
    identity, request = set_up(folder, site, federation, own)
    console = Screen()
    print_lines(
        console,
        [
            ("site", f"{site} of {federation}"),
            ("fingerprint", fingerprint(identity.public_key)),
            ("request", str(request)),
        ],
    )
    console.print(
        f"\nSend {request.name} to the operator, and read the fingerprint out to them.\n"
        "The private keys stay here: identity.pem for the trainer, relay/key.pem for the relay."
        f"{enter_folder(folder)}",
        soft_wrap=True,
    )


def _check_labels(labels: list[str]) -> None:
    """Refuses labels that no plan can have.

    Raises:
        typer.BadParameter: says why.
    """
    wrong = [f"labels look alike: {pair}" for pair in told(alike(labels))]
    wrong += [f"a label is empty: {shown(label)}" for label in labels if not seen(label)]
    if len(labels) == 1:
        wrong.append("a classification has two labels or more: give --label once for each")
    if wrong:
        raise typer.BadParameter("; ".join(wrong), param_hint="--label")


def join(
    kit: Annotated[Path, typer.Argument(help="The enrolment kit that the operator sent.")],
    config: Config = CLIENT_TOML,
    approve: Annotated[
        bool,
        typer.Option(
            "--approve",
            help="Continue with umbel-client roster approve: only if the operator says that the"
            " kit's roster has all sites.",
        ),
    ] = False,
) -> None:
    """Take the certificate from a kit. Which parties to believe stays your own decision."""
    joined = take_kit(config, kit)
    state = "is pinned" if joined.is_pinned else "which nobody here has approved yet"
    console = Screen()
    print_lines(
        console,
        [
            ("server", joined.server),
            ("certificate", str(joined.certificate)),
            ("operator", fingerprint(joined.operator)),
            ("roster", f"{joined.proposal}, {state}"),
            ("sites", ", ".join(joined.sites)),
        ],
    )
    if joined.is_pinned:
        return
    console.print(
        "\nCompare the operator's fingerprint with what the operator reads out to you, and each\n"
        "site's with that site.",
        soft_wrap=True,
    )
    if approve:
        console.print()
        roster.approve(joined.proposal, config)
        return
    console.print(
        "Ask the operator whether these are all sites. If they are:\n"
        f"umbel-client roster approve {joined.proposal.name}\n"
        "If more are to come, approve nothing yet: the operator sends a roster with all of them.",
        soft_wrap=True,
    )


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    app.command()(init)
    app.command()(join)
