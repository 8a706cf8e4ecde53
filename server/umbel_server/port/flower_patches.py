"""Everywhere that this process changes Flower, or reaches past its methods: one function a patch.

No other module may assign to an attribute of Flower's or touch its tables. Each function says why
Flower needs the change, and names the tests of `tests/e2e/test_flower_contract.py` that hold it:
they fail first when Flower changes.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastapi import FastAPI
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore import sql_mixin
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.state.schema.corestate_models import ObjectPushSession, ObjectPushSessionRoot
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router
from sqlalchemy import delete, or_, select, update
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.types import Scope

_PRAGMAS = {
    "cache_size": "-2000",
    "mmap_size": "4000000",
    "temp_store": "FILE",
    "busy_timeout": "60000",
}
_TIDY_SECONDS = 5.0
PUSH_SECONDS = 1200
"""More than `gate` gives a body, and a relay tries again, together."""


def shrink_databases() -> None:
    """Sets how much memory and time a connection to one of Flower's databases takes.

    Reason: with Flower's settings, most of this process would be a cache of 64 MB in each of up to
    thirty connections, 256 MB of the file mapped into memory, and a copy in memory of every message
    that is being deleted (to undo it if the statement fails). Deleting a large message also takes
    longer than Flower's five seconds on a busy machine, and meanwhile nobody else can write.

    Call it before `create_app`, which opens the databases.

    Held by: test_how_a_database_connection_uses_memory_and_time_is_ours_to_set.
    """
    databases: Any = sql_mixin
    databases.SQLITE_PRAGMAS = tuple(
        (name, _PRAGMAS.get(name, value)) for name, value in databases.SQLITE_PRAGMAS
    )


def wait_for_slow_lines() -> None:
    """Lets as much time pass between two pieces of a reply as the gate and a relay give a piece.

    Reason: after three minutes in which no piece came, Flower deletes a reply and all that came of
    it, when the next piece comes, and answers as if it were well.

    Held by: test_a_piece_may_be_long_in_coming.
    """
    pushing: Any = sql_corestate
    pushing.OBJECT_PUSH_SESSION_TTL_SECONDS = PUSH_SECONDS


def fleet_only(flower: FastAPI, judge: Middleware) -> FastAPI:
    """Returns an application with only the part of Flower's that relays speak to.

    Args:
        judge: gets each request between Flower's authentication and Flower's handlers, with what
            Flower read of it in `scope["state"]["protobuf_request"]`.

    Reason: Control and Runtime share Fleet's port, and anyone who reaches them can start runs and
    take the place of an app. The pages of documentation, and the middleware that requests pass
    through for Control's sake, are not needed either.

    Held by: test_control_runtime_and_the_pages_of_documentation_are_not_there,
    test_what_requests_pass_through_is_what_was_read,
    test_what_judges_requests_gets_only_those_that_are_authenticated,
    test_every_path_that_the_gate_lets_through_exists.
    """
    passed: tuple[Any, ...] = (
        BaseHTTPMiddleware,
        ProtobufTranslationMiddleware,
        NodeAuthMiddleware,
    )
    kept = [one for one in flower.user_middleware if one.cls in passed]
    fleet = FastAPI(openapi_url=None, middleware=[*kept, judge])
    fleet.state = flower.state
    fleet.include_router(router)
    return fleet


def answered(scope: Scope, response: Any) -> Response:
    """Returns what a handler of Flower's returns, for what judges requests to send in its place.

    Args:
        response: the answer in the type that Flower's own handler of this path has.

    Reason: Flower translates an answer after its handler, and takes it from the request's state.

    Held by: test_a_node_that_is_asked_nothing_is_told_so_without_the_database.
    """
    scope["state"]["protobuf_response"] = response
    return Response()


def response(scope: Scope) -> Any:
    """Returns the answer of Flower's handler to a request, in the type that its path has; None if
    the handler was not reached.

    Reason: as `answered`.

    Held by: test_a_message_whose_delivery_was_lost_is_delivered_once_more.
    """
    return scope["state"].get("protobuf_response")


def tidy_seldom(state: Any) -> None:
    """Lets Flower look for runs whose app is silent at most once in `_TIDY_SECONDS`.

    Reason: Flower looks at nearly every request of a relay, by statements that wait for a turn to
    write: a sixth of what a round costs this process.

    Held by: test_silent_runs_are_looked_for_seldom,
    test_a_run_whose_app_is_silent_for_a_minute_ends_and_ours_is_not.
    """
    state._cleanup_expired_task_tokens = _seldom(state._cleanup_expired_task_tokens)


def write_no_traffic(state: Any) -> None:
    """Stops Flower from adding up how many bytes a run has moved.

    Reason: nobody reads the sum, and each piece of a message has to wait for a turn to write it.

    Held by: test_what_flower_sums_of_traffic_is_not_written.
    """
    state.store_traffic = lambda run_id, *, bytes_sent, bytes_recv: None


def take_turns(state: Any) -> None:
    """Lets one thread of this process at a time use Flower's database.

    Reason: SQLite lets one connection write, and a second one sleeps for longer and longer before
    it looks again: half of what a stage of a round took. Here the next one begins at once.

    Held by: test_no_thread_sleeps_until_another_has_written.
    """
    lock = threading.RLock()
    for part in (state, state.object_store):
        part.session = partial(_session, lock, part.session)


@contextmanager
def _session(
    lock: AbstractContextManager[bool], session: Callable[[], AbstractContextManager[Any]]
) -> Iterator[Any]:
    with lock, session() as opened:
        yield opened


def set_message_id(message: Message, identifier: str) -> None:
    """Gives a message its ID.

    Reason: Flower gives it to messages that pass through its grid, which ours do not.

    Held by: test_what_flower_hides_of_a_messages_metadata_can_be_set.
    """
    message.metadata.__dict__["_message_id"] = identifier


def store(state: Any, message: Message, tree: ObjectTree) -> bool:
    """Stores a message whose parts are there; returns whether Flower took it.

    Reason: Flower's method for a message and its parts opens a session in which they are pushed,
    and deletes the message if they do not come.

    Held by: test_a_message_and_its_reply_leave_nothing_behind.
    """
    with state.session():
        if state.store_message_ins(message) is None:
            return False
        state.object_store.preregister(message.metadata.run_id, tree)
        return True


def deliver_again(state: Any, identifiers: Collection[str]) -> None:
    """Marks messages as not delivered.

    Reason: Flower delivers a message once, and has no method to deliver it again.

    Held by: test_what_was_delivered_and_not_answered_is_delivered_again.
    """
    delivered = update(MessageIns).where(
        MessageIns.message_id.in_(identifiers), MessageIns.delivered_at != ""
    )
    with state.session() as session:
        session.execute(delivered.values(delivered_at=""))


def replies_to(state: Any, identifiers: Collection[str]) -> list[str]:
    """Returns the IDs of all replies to these messages.

    Reason: Flower tells of a reply once, and deletes its objects only with the run. To delete them
    earlier, their names are needed again.

    Held by: test_a_message_and_its_reply_leave_nothing_behind,
    test_a_message_that_nobody_waits_for_any_more_is_deleted.
    """
    answers = select(MessageRes.message_id).where(MessageRes.reply_to_message_id.in_(identifiers))
    with state.session() as session:
        return list(session.scalars(answers).all())


def end_sessions(state: Any, replies: Collection[str]) -> None:
    """Deletes what Flower notes of the pushing of these replies, and of what has expired.

    Reason: Flower makes a note at each announcement, also of one that it then refuses, and deletes
    it when the last object has come, or with the run.

    Held by: test_an_answer_that_stops_halfway_leaves_nothing_behind,
    test_announcements_that_flower_refuses_leave_nothing_behind.
    """
    notes = ObjectPushSession
    owned = select(ObjectPushSessionRoot.session_id).where(
        ObjectPushSessionRoot.root_object_id.in_(replies)
    )
    with state.session() as session:
        session.execute(
            delete(notes).where(
                or_(notes.expires_at <= datetime.now(UTC), notes.session_id.in_(owned))
            )
        )


def _seldom(call: Callable[[], None]) -> Callable[[], None]:
    """Wraps a function so that it does nothing for `_TIDY_SECONDS` after each call."""
    called = -math.inf

    def sometimes() -> None:
        nonlocal called
        if time.monotonic() - called >= _TIDY_SECONDS:
            called = time.monotonic()
            call()

    return sometimes
