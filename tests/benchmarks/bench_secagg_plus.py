"""One secure round beside Flower's SecAgg+: `python tests/benchmarks/bench_secagg_plus.py`.

Both run whole in this process, on the same vector of 1,048,576 numbers in a ring of 32 bits, with
three sites and every mask and share: Flower's workflow with its own mod at each node, and a round
of a job with this project's participants. Nothing is carried, so that it is the cryptography and
what is around it that is compared; `bench_round.py` has what carrying costs. The two do not do the
same. Flower's masks are of a Mersenne Twister with a seed of 32 bits, ours of AES with a key of
256. Ours also has a stage that confirms the survivors, signs and verifies every message, and stores
sum and adapter. Seconds of CPU, the median of three.
"""

import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_masking import entry
from bench_memory import run as run_job
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common import recorddict_compat
from flwr.server.client_manager import SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.task_identity import TaskIdentity
from toy_federation import PARAMETERS, Federation

from umbel_server.messaging.link import Step

SITES = 3
TRIALS = 3
MORE = 5
"""Rounds."""


def measure() -> dict[str, dict[str, Any]]:
    """Name -> {value, unit, target, holds}."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    ours, flowers = _ours(), _flowers()
    unit = "s of CPU"
    return {
        "secure_round_in_process_3_sites_1m_s": entry(ours, unit, None),
        "flower_secagg_plus_3_sites_1m_s": entry(flowers, unit, None),
        "secure_round_over_flower_secagg_plus": entry(ours / flowers, "ratio", None),
    }


def _median(trial: Callable[[], None]) -> float:
    seconds = []
    for _ in range(TRIALS):
        began = time.process_time()
        trial()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


class DirectLink:
    """Hands each request to its site, in this process."""

    def __init__(self, sites: dict[str, Any]) -> None:
        self._sites = sites

    def exchange(
        self, step: Step, requests: Iterable[tuple[str, bytes]], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """See `Link`."""
        replies = [(site, self._sites[site].handle(sealed)) for site, sealed in requests]
        yield from replies


def _ours() -> float:
    """A job of some rounds, less one of a single round: what a job does once is left out."""

    def job(rounds: int) -> None:
        federation = Federation(SITES, 32)
        training = msgspec.structs.replace(federation.plan.training, rounds=rounds)
        federation.plan = msgspec.structs.replace(federation.plan, training=training)
        with tempfile.TemporaryDirectory() as folder:
            link: Any = DirectLink(federation.sites())
            run_job(federation, link, Path(folder))

    return (_median(lambda: job(1 + MORE)) - _median(lambda: job(1))) / MORE


class DirectGrid:
    """What the workflow needs of a `Grid`: each message is answered by its node's mod at once."""

    def __init__(self, vector: Parameters) -> None:
        self._vector = vector
        self._contexts = {
            node: Context(1, node, {}, RecordDict(), {}) for node in range(1, SITES + 1)
        }

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """See `Grid`."""
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = str(number)
            # The mod takes what it gets apart.
            received = message_from_proto(message_to_proto(message))
            context = self._contexts[message.metadata.dst_node_id]
            replies.append(secaggplus_mod(received, context, self._train))
        return replies

    def _train(self, message: Message, _context: Context) -> Message:
        result = FitRes(Status(Code.OK, ""), self._vector, num_examples=1, metrics={})
        content = recorddict_compat.fitres_to_recorddict(result, keep_input=True)
        return Message(content, reply_to=message)


def _flowers() -> float:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    vector = ndarrays_to_parameters([np.zeros(PARAMETERS, dtype=np.float32)])

    def trial() -> None:
        grid: Any = DirectGrid(vector)
        manager = SimpleClientManager()
        for node in range(1, SITES + 1):
            manager.register(GridClientProxy(node_id=node, grid=grid, run_id=1))
        state = RecordDict(
            {
                "config": ConfigRecord({"current_round": 1}),
                "parameters": recorddict_compat.parameters_to_arrayrecord(vector, keep_input=True),
            }
        )
        context = LegacyContext(
            Context(1, 0, {}, state, {}),
            strategy=FedAvg(min_fit_clients=SITES, min_available_clients=SITES),
            client_manager=manager,
        )
        workflow = SecAggPlusWorkflow(SITES, 2, clipping_range=1.0, max_weight=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            workflow(grid, context)
        (after,) = context.state.array_records.values()
        assert sum(array.numpy().size for array in after.values()) == PARAMETERS

    return _median(trial)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
