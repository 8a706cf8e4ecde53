"""What a statement of spend charges: training, and counts of held-out records beside it."""

from collections.abc import Callable

import msgspec

from umbel_client.ledger.contents import Contents
from umbel_client.ledger.rows import EVALUATION
from umbel_client.ledger.statement import stated_rounds
from umbel_client.privacy.accounting import DpEvent
from umbel_common.plans.plan import FederatedEvaluation, TrainingPlan

MakePlan = Callable[..., TrainingPlan]


def test_a_job_that_counted_is_charged_for_its_counts_too(make_plan: MakePlan) -> None:
    evaluation = FederatedEvaluation(noise_multiplier=9.0, max_records=100)
    plan = msgspec.structs.replace(make_plan(), evaluation=evaluation)
    rounds = stated_rounds(Contents(), {"job": 2}, [plan], 1000)
    assert [(one.job, one.round) for one in rounds] == [
        *(("job", 1), ("job", 2)),
        *(("job" + EVALUATION, 1), ("job" + EVALUATION, 2)),
    ]
    assert {one.event for one in rounds if one.job != "job"} == {DpEvent(9.0, 1.0, 1)}


def test_one_that_did_not_is_not(make_plan: MakePlan) -> None:
    rounds = stated_rounds(Contents(), {"job": 2}, [make_plan()], 1000)
    assert [(one.job, one.round) for one in rounds] == [("job", 1), ("job", 2)]
