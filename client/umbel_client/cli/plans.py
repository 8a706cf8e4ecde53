"""`umbel-client plans`, `approve` and `reject`: which plans may run at this site."""

from pathlib import Path
from typing import Annotated

import typer

from umbel_client.cli.options import CLIENT_TOML, Config, Json
from umbel_client.ledger.plan_cost import Total, cost_here
from umbel_client.privacy.attempt_cost import attempt_cost, judge_cost
from umbel_client.site.config import ClientConfig, load_config
from umbel_client.site.decisions import Decisions, Proposal
from umbel_client.site.ipc import against_readers
from umbel_client.site.policy import Policy, as_asked, judge_plan
from umbel_client.site.policy_file import PolicyFile
from umbel_common.errors import JobUnknown, PolicyRefusal, UmbelError
from umbel_common.plans.alike import alike, told
from umbel_common.plans.plan import DistributedPrivacy, TrainingPlan
from umbel_common.plans.plan_file import plan_lines, privacy_text
from umbel_common.printable import one_line
from umbel_host.terminal import Screen, confirm, print_json, print_lines, say, table, working

Job = Annotated[
    str, typer.Argument(help="The job whose plan waits, or the plan's digest or its first digits.")
]

Labels = Annotated[
    bool, typer.Option("--labels", help="Show all labels of a classification, each on a line.")
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
            _promise(plan),
            proposal.digest.hex(),
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
    labels: Labels = False,
) -> None:
    """Show a plan that waits for approval, and approve it if you type yes."""
    settings = load_config(config)
    decisions = Decisions(settings.state_folder)
    proposal = _find(decisions, job)
    console = Screen()
    promise = ("privacy", _promise(proposal.plan))
    every = plan_lines(proposal.plan, labels=labels)
    print_lines(console, [promise if line[0] == "privacy" else line for line in every], fold=True)
    console.print()
    print_lines(console, _budget_lines(settings, proposal.plan))
    refused = _refusal(settings.policy, proposal.plan)
    if refused is not None:
        console.print(f"\nThis site's policy refuses it all the same: {refused}.")
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
    if refused is None and settings.policy.approval == "each-plan":
        _offer_policy(console, config, proposal.plan, ask=digest is None)


def _promise(plan: TrainingPlan) -> str:
    """What a plan promises; in distributed mode against whom, and what it is against everybody."""
    privacy = plan.privacy
    try:
        cost = attempt_cost(plan)
        if cost is None or not isinstance(privacy, DistributedPrivacy):
            return privacy_text(plan)
        with working("computing epsilon"):
            found = cost.epsilons(privacy.delta)
    except UmbelError as error:
        return error.message
    return (
        f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} {against_readers(cost.honest)};"
        f" epsilon {found.everybody:.4g} against everybody"
    )


def _refusal(policy: Policy, plan: TrainingPlan) -> str | None:
    """The rule by which a policy refuses a plan, whatever people say; None: it does not."""
    try:
        judge_plan(as_asked(policy, plan), plan)
        judge_cost(policy, plan)
    except PolicyRefusal as refusal:
        return refusal.check
    return None


def _offer_policy(console: Screen, config: Path, plan: TrainingPlan, *, ask: bool) -> None:
    """Shows what the policy has no field for, and writes the plan's values if a person agrees."""
    policy = PolicyFile(config)
    values = policy.missing(plan)
    if not values:
        return
    console.print(f"\nThe policy in {policy.path} does not say yet:", soft_wrap=True)
    for field, value in values.items():
        shown = (f"\n  {one_line(str(one))}" for one in value)
        console.print(f"{field}, {len(value)} in all:", *shown, sep="", soft_wrap=True)
    if "labels" in values:
        for pair in told(alike(map(str, values["labels"]))):
            console.print(f"LOOK ALIKE: {pair}", soft_wrap=True)
        console.print("Without labels no plan for a classification runs.")
    if not ask:
        console.print(
            "Write it there by hand: with --digest nothing is asked, and nothing written."
        )
        return
    try:
        confirm(
            console,
            "Type yes to write these values into the policy, which then allows no others: ",
            unattended=UmbelError("nobody was asked about the policy"),
            declined=UmbelError("the policy stays as it is"),
        )
    except UmbelError as error:
        console.print(f"\n{error.message}")
        return
    policy.add(values)
    now = (
        "This plan runs only after a restart of the trainer: stop umbel-client run, and start it"
        " again."
        if "labels" in values
        else "A trainer that is running follows the policy that it was started with: the new values"
        " count from its next start on."
    )
    console.print(f"\nwritten: {policy.path}\n{now}", soft_wrap=True)


def _budget_lines(settings: ClientConfig, plan: TrainingPlan) -> list[tuple[str, str]]:
    """What was spent on the data set, what the plan costs, and what both are together; against
    everybody, and against readers of the sums where a job is of distributed mode."""
    try:
        cost = cost_here(settings, plan)
        if cost.honest is None:
            return [("budget", _total_text(cost.everybody, cost.budget.epsilon))]
        readers = against_readers(cost.honest)
        return [
            ("budget", f"{_total_text(cost.everybody, cost.budget.epsilon)}, against everybody"),
            ("", f"{_total_text(cost.shared, cost.budget.shared)}, {readers}"),
        ]
    except UmbelError as error:
        return [("budget", error.message)]


def _total_text(total: Total, most: float | None) -> str:
    """One total.

    Args:
        most: what the policy allows; None: it names nothing.
    """
    after = total.after()
    allowed = "nothing: the policy names none" if most is None else f"{most:g}"
    text = (
        f"spent epsilon {total.spent():.4g}, this plan {total.alone():.4g}, after it"
        f" {after:.4g} of {allowed}, at delta {total.delta:g}"
    )
    return text if most is not None and after <= most else f"{text}: IT IS REFUSED"


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
