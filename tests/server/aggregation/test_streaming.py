"""The server holds one large message at a time, however many sites there are."""

import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from umbel_common.errors import JobFailed
from umbel_common.plans.plan import Aggregation, Lora, Tensor
from umbel_common.protocol.wire import Refusal, TrainRequest
from umbel_server.messaging.link import Step

SITES = 6
TENSORS = (
    Tensor(name="base.query.lora_A.weight", shape=(2, 6), role="lora_A"),
    Tensor(name="head.weight", shape=(3, 400_000), role="head"),
)
VECTOR_BYTES = 4 * 1_200_012
LATE = "site-05"

MakeSetting = Callable[..., Any]


class Forgetful(dict[Any, Any]):
    """Where a toy site's vectors go, so that they are not measured."""

    def __setitem__(self, key: Any, value: Any) -> None:
        return


class MeasuringLink:
    """Notes what is allocated whenever the job made a request or worked off a reply."""

    def __init__(self, sites: dict[str, Any], silent: bool) -> None:
        self.sites = sites
        self.silent = silent
        self.after_request: dict[str, list[int]] = {}
        self.after_reply: dict[str, list[int]] = {}

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        made = self.after_request.setdefault(step.stage, [])
        worked = self.after_reply.setdefault(step.stage, [])
        for site, sealed in requests:
            made.append(allocated())
            if not self.silent or step.stage != "train":
                reply = self.sites[site].handle(sealed)
                del sealed
                yield site, reply
                del reply
                worked.append(allocated())
            else:
                del sealed


def allocated() -> int:
    return tracemalloc.get_traced_memory()[0]


@pytest.fixture
def setting(make_setting: MakeSetting, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Sites of a plan with a large head; the parameter is its method."""
    lora = Lora(
        rank=2,
        alpha=4.0,
        target_modules=("query",),
        layers=None,
        method=getattr(request, "param", "both"),
        seed=7,
        tensors=TENSORS,
    )
    made = make_setting(
        SITES, lora=lora, aggregation=Aggregation(threshold=4, clip_range=1.0, step=1e-6)
    )
    for site in made.sites.values():
        site.requests = deque(maxlen=0)
        site.vectors = Forgetful()
        # What it keeps is on the disk of another machine.
        site.take_adapter = lambda request, header: None
    # What numpy imports when it is first used is not to be measured.
    made.sites["site-00"].delta(1)
    tracemalloc.start()
    yield made
    tracemalloc.stop()


def test_a_request_is_sealed_as_it_is_sent_and_then_let_go(setting: Any) -> None:
    setting.link = MeasuringLink(setting.sites, silent=True)
    with pytest.raises(JobFailed):
        setting.job(attempts=1).run()
    made = setting.link.after_request["train"]
    assert len(made) == SITES
    # The adapter and one sealed message.
    assert max(made) < 2.5 * VECTOR_BYTES


def test_a_masked_vector_is_added_and_then_let_go(setting: Any) -> None:
    setting.link = MeasuringLink(setting.sites, silent=False)
    setting.job(attempts=1).run()
    worked = setting.link.after_reply["mask"]
    # The last reply ends the stage without a look back.
    assert len(worked) == 3 * (SITES - 1)
    # The adapter and the running sum.
    assert max(worked) < 2.5 * VECTOR_BYTES


@pytest.mark.parametrize("setting", ["ffa"], indirect=True)
def test_differences_beside_whole_adapters_need_no_more_memory(setting: Any) -> None:
    """Nearly all of the adapter is in the difference, which is made without a copy."""
    late = setting.sites[LATE]
    first = late.answer
    missed: list[Any] = []

    def miss_a_round(request: Any) -> Any:
        if isinstance(request, TrainRequest) and not missed:
            missed.append(None)
            return Refusal(check="site-paused")
        return first(request)

    late.answer = miss_a_round
    setting.link = MeasuringLink(setting.sites, silent=False)
    setting.job(attempts=1).run()
    made = setting.link.after_request["train"]
    assert len(made) == 3 * SITES
    assert max(made) < 2.5 * VECTOR_BYTES
