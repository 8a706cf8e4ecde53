"""Flower's SuperLink without its power to ship code: one run, the nodes of relays, and Fleet.

Only one of Flower's three interfaces is served: Fleet, for relays. Starting a run and acting as its
app, which Control and Runtime are for, happens inside this process: no app bundle exists, and no
token that could be stolen. Nothing may be added here that starts a run or registers a node at the
request of a client. `docs/adr/0011-flower-as-a-carrier.md` says why;
`tests/e2e/test_flower_contract.py` holds every name of Flower's that is used here.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.main import create_app
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from umbel_server.port import flower_patches
from umbel_server.port.expected_replies import ExpectedReplies
from umbel_server.port.reply_filter import ReplyFilter

_logger = logging.getLogger("umbel.port")

_KEEP_ALIVE_SECONDS = 15.0
_RETURN_SECONDS = 120.0
"""How long a node that went away is waited for: its relay may be restarted, or its line be cut."""


class SuperLink:
    """One SuperLink; its methods may be called from any thread."""

    def __init__(self) -> None:
        """Opens the database that the environment names, and begins a new run in it.

        Messages that former runs left undelivered are deleted: nobody waits for them any more.
        """
        flower_patches.shrink_databases()
        flower_patches.wait_for_slow_lines()
        flower = create_app()
        # Only `register` makes nodes: a relay cannot register itself.
        flower.state.enable_supernode_auth = True
        self.expected = ExpectedReplies()
        """The replies that Flower's application for relays takes."""
        self.make_way: Callable[[bytes], int | None] = lambda key: None
        """Ends the former connection of a relay (public key, PEM) that connects again."""
        self.tidy: Callable[[], None] = lambda: None
        """Called now and then, in a thread of its own."""
        judge = Middleware(
            ReplyFilter,
            self.expected,
            lambda key: self.make_way(key),
            lambda messages: flower_patches.deliver_again(self.state, messages),
        )
        self.fleet: ASGIApp = flower_patches.fleet_only(flower, judge)
        """Flower's application for relays."""
        self.state: Any = flower.state.linkstate_factory.state()
        """Flower's `LinkState`."""
        flower_patches.tidy_seldom(self.state)
        flower_patches.write_no_traffic(self.state)
        flower_patches.take_turns(self.state)
        self._stopped = threading.Event()
        self._run_id, self._task_id = self._begin()
        self._alive = threading.Thread(target=self._keep_alive, daemon=True)
        self._alive.start()

    @property
    def run_id(self) -> int:
        """The run that messages belong to now; it changes if Flower ended the former one."""
        return self._run_id

    def close(self) -> None:
        """Ends the run, and deletes what it holds."""
        self._stopped.set()
        self._alive.join()
        self.state.stop_run(self._run_id)

    def register(self, key: bytes) -> int:
        """Lets a relay connect from now on; returns the node of its public key (PEM)."""
        known = self.state.get_node_id_by_public_key(key)
        if known is not None:
            return int(known)
        return int(self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0))

    def disconnect(self, key: bytes) -> int | None:
        """Ends the connection of a relay; returns its node, or None if it has none.

        Flower refuses a second connection until the first one has been silent for a minute.
        """
        node = self.state.get_node_id_by_public_key(key)
        if node is None:
            return None
        self.state.deactivate_node(node)
        return int(node)

    def was_connected(self, node: int) -> bool:
        """Whether a node is connected now, or was before."""
        (info,) = self.state.get_node_info(node_ids=[node])
        return info.status in (NodeStatus.ONLINE, NodeStatus.OFFLINE)

    def is_away(self, node: int) -> bool:
        """Whether a node is not connected but may come back. Flower would not wait for it."""
        return 0 < self._silence(node) < _RETURN_SECONDS

    def is_gone(self, node: int) -> bool:
        """Whether a node has been away for so long that nobody waits for it any more."""
        return self._silence(node) >= _RETURN_SECONDS

    def _silence(self, node: int) -> float:
        """How many seconds a node has been away; 0 while it is connected."""
        (info,) = self.state.get_node_info(node_ids=[node])
        return time.time() - info.online_until if info.status == NodeStatus.OFFLINE else 0.0

    def _begin(self) -> tuple[int, int]:
        for run in self.state.get_run_info():
            self.state.stop_run(run.run_id)
            self.state.cleanup_run(run.run_id)
        run_id = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        (run,) = self.state.get_run_info(run_ids=[run_id])
        task_id = run.primary_task_id
        self.state.claim_task(task_id)
        self.state.activate_task(task_id)
        TaskIdentity.task_id = task_id
        TaskIdentity.run_id = run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        return run_id, task_id

    def _keep_alive(self) -> None:
        """Tells Flower that the app is there: it ends a run whose app is silent for a minute."""
        while not self._stopped.wait(_KEEP_ALIVE_SECONDS):
            try:
                if not self.state.acknowledge_task_heartbeat(self._task_id):
                    # The machine slept. Messages in transit are lost, and `collect` says so.
                    self._run_id, self._task_id = self._begin()
                self.tidy()
            except SQLAlchemyError as error:
                # The disk is full or slow. If this thread ended here, the run would end for good.
                _logger.warning("the SuperLink's database: %s", str(error).splitlines()[0])
