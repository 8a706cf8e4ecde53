"""What a site itself knows of the adapter that a job starts from.

This module is part of the core of the privacy guarantee. Never take an operator's word for a start:
one that was made for it amplifies the rounding of a record.
"""

from collections.abc import Callable

import numpy as np

from umbel_client.models.adapters.folder import read_to_export
from umbel_client.site.policy import judge_unknown_start
from umbel_client.site.state_folder import StateFolder
from umbel_client.trainer.site import Site
from umbel_common.adapters.start import Origin, origin_of, seed_origin
from umbel_common.adapters.vector import Vector
from umbel_common.canonical import decode_canonical
from umbel_common.errors import ModelError, PlanError
from umbel_common.plans.plan import PLAN_VERSIONS, TrainingPlan
from umbel_common.plans.start import LabelNamesStart, ReleasedStart
from umbel_common.plans.statements import RELEASE_VERSIONS


def origin_at(
    site: Site, state: StateFolder, plan: TrainingPlan, computed: Callable[[], Vector]
) -> Origin:
    """The start of a plan, as this site has it or computes it.

    Args:
        computed: computes the start with this site's own base model; called only for a head that
            starts at its labels' names.

    Raises:
        PolicyRefusal: `start-unknown`: an adapter that this site does not have, and its policy does
            not allow.
        UmbelError: the model cannot be loaded.
    """
    match plan.start:
        case LabelNamesStart() as start:
            return origin_of(plan, computed(), row_radius=start.tolerance * start.scale)
        case ReleasedStart() as start:
            known = _known(site, state, plan, start)
            if known is not None:
                return origin_of(plan, known)
            judge_unknown_start(site.policy, start.largest_norm)
            # All that the plan says: a longer one is none of its starts.
            nothing = np.zeros(plan.lora.size, dtype=np.float32)
            return origin_of(plan, nothing, radius=start.largest_norm)
        case _:
            return seed_origin(plan)


def check_known_start(site: Site, state: StateFolder, plan: TrainingPlan) -> None:
    """Refuses a plan that starts from an earlier adapter, if this site neither has it nor allows
    others.

    Raises:
        PolicyRefusal: `start-unknown`.
    """
    if isinstance(plan.start, ReleasedStart) and _known(site, state, plan, plan.start) is None:
        judge_unknown_start(site.policy, plan.start.largest_norm)


def _known(
    site: Site, state: StateFolder, plan: TrainingPlan, start: ReleasedStart
) -> Vector | None:
    """The adapter that the plan starts from, if an earlier job of this federation, with the same
    base model, tensors and factor, which this site has trained in, gave it as its last."""
    for signed in site.journal.plans():
        with site.journal.errors():
            earlier = decode_canonical(signed.statement, PLAN_VERSIONS)
        if earlier.digest() != start.plan:
            continue
        alike = (
            (earlier.federation, plan.federation),
            (earlier.model.digest, plan.model.digest),
            (earlier.lora.tensors, plan.lora.tensors),
            # With another factor, the same numbers would change the model by more.
            (earlier.lora.alpha, plan.lora.alpha),
            (earlier.lora.scaling, plan.lora.scaling),
        )
        if any(one != other for one, other in alike):
            return None
        # An operator may end a job that never ran by any adapter that its rounds could lead to.
        # After a row of such jobs a start would lie anywhere, and nothing would be charged.
        if not site.journal.has_attempt(earlier.job):
            return None
        try:
            found, vector, release = read_to_export(state.adapter(earlier.job))
        except (ModelError, PlanError):
            # Its people deleted the folder, or put another there.
            return None
        if release is None or found != earlier:
            return None
        # The journal took it after the operator's signature was verified, with that time's key.
        with site.journal.errors():
            kept = [one.statement for one in site.journal.releases(earlier.job)]
        statement = decode_canonical(release.statement, RELEASE_VERSIONS)
        same = (statement.plan, statement.round, statement.adapter)
        if release.statement in kept and same == (start.plan, start.round, start.adapter):
            return vector
        return None
    return None
