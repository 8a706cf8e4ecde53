"""`umbel-client plans`, `approve` and `reject`: which plans may run at this site."""

from typing import Annotated

import typer

from umbel_client.cli.options import CLIENT_TOML, Config, Json, print_json
from umbel_client.site.config import load_config
from umbel_client.site.decisions import Decisions, Proposal
from umbel_client.site.policy import judge_plan
from umbel_common.errors import JobUnknown, PolicyRefusal, UmbelError
from umbel_common.plans.plan_file import plan_lines, privacy_text
from umbel_host.terminal import Screen, confirm, print_lines, say, table

Job = Annotated[
    str, typer.Argument(help="The job whose plan waits, or the plan's digest or its first digits.")
]


def plans(config: Config = CLIENT_TOML, as_json: Json = False) -> None:
    """List the plans that wait for approval."""
    proposals = Decisions(load_config(config).state_folder).proposals()
    if as_json:
        print_json([{"job": one.plan.job, "digest": one.digest.hex()} for one in proposals])
        return
    console = Screen()
    if not proposals:
        console.print("No plan waits for approval.")
        return
    waiting = table("job", "model", "rounds", "privacy", "digest", folding=("job", "model"))
    for proposal in proposals:
        plan = proposal.plan
        waiting.add_row(
            plan.job,
            plan.model.name,
            str(plan.training.rounds),
            privacy_text(plan),
            proposal.digest.hex()[:16],
        )
    console.print(waiting)


def approve(
    job: Job,
    config: Config = CLIENT_TOML,
    digest: Annotated[
        str | None,
        typer.Option(
            help="Approve without asking, but only a plan with this digest, 64 hexadecimal digits."
        ),
    ] = None,
) -> None:
    """Show a plan that waits for approval, and approve it if you type yes."""
    settings = load_config(config)
    decisions = Decisions(settings.state_folder)
    proposal = _find(decisions, job)
    console = Screen()
    print_lines(console, plan_lines(proposal.plan), fold=True)
    try:
        judge_plan(settings.policy, proposal.plan)
    except PolicyRefusal as refusal:
        console.print(f"\nThis site's policy refuses it all the same: {refusal.check}.")
    if digest is not None:
        _require_digest(proposal, digest)
    else:
        confirm(
            console,
            "Type yes to approve: ",
            unattended=UmbelError(
                "a plan is approved by a person at a terminal, or by its digest",
                remedy="run this at a terminal, or add --digest with the digest that you"
                " compared; nothing was changed",
            ),
            declined=UmbelError("the plan was not approved: nothing was changed"),
        )
    decisions.approve(proposal.digest)
    console.print(f"\napproved: {proposal.digest.hex()}", soft_wrap=True)


def reject(job: Job, config: Config = CLIENT_TOML) -> None:
    """Take a plan off the list of those that wait; the server may propose it again."""
    decisions = Decisions(load_config(config).state_folder)
    proposal = _find(decisions, job)
    decisions.reject(proposal.digest)
    say(f"rejected: {proposal.digest.hex()}")


def _find(decisions: Decisions, text: str) -> Proposal:
    waiting = decisions.proposals()
    found = [one for one in waiting if text == one.plan.job or one.digest.hex().startswith(text)]
    if len(found) != 1:
        raise JobUnknown(
            "no plan of this name waits for approval" if not found else "several plans match",
            found=text,
            accepted=", ".join(f"{one.plan.job} {one.digest.hex()}" for one in waiting) or None,
            remedy="umbel-client plans lists those that wait",
        )
    return found[0]


def _require_digest(proposal: Proposal, digest: str) -> None:
    if proposal.digest.hex() != digest.lower():
        raise UmbelError(
            "a plan is not the one that was to be approved: nothing was changed",
            field="--digest",
            found=proposal.digest.hex(),
            accepted=digest.lower(),
        )


def register(app: typer.Typer) -> None:
    """Adds these commands to `umbel-client`."""
    for command in (plans, approve, reject):
        app.command()(command)
