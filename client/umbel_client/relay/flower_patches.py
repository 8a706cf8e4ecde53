"""What the relay changes in Flower's objects: one function a change, with its reason and its test.

The tests are in tests/e2e/test_flower_contract.py; after an upgrade of Flower they fail first.
docs/adr/0011-flower-as-a-carrier.md lists every private name that is used.
"""

import ssl
from collections.abc import Iterator
from http.cookiejar import DefaultCookiePolicy

import httpx
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient

from umbel_client.relay.signature import Signature
from umbel_host.transport.pieces import FLOWER_PIECE_BYTES

LARGEST_ANSWER = 2 * FLOWER_PIECE_BYTES
"""Size of the largest answer, in bytes: a piece of a message."""
_LARGEST_OTHER = 1 << 17
"""Size of every other: a small message, or twice the names of all pieces of the largest."""
_WITH_A_PIECE = "/v1/fleet/pull-object"


def fleet_client(
    server: str, context: ssl.SSLContext, http: httpx.Client, signature: Signature
) -> FleetHttpClient:
    """Makes a client for Flower's Fleet interface that sends its requests through `http`.

    Flower's own HTTP client follows redirections to any address and reads proxies from the
    environment, and Flower's own interceptors let an answer of the server end this process. Nor
    does it limit an answer, packed or not, or the cookies of all answers together. Test:
    `test_the_client_is_httpx_with_a_switch_for_redirections`, and tests/e2e/test_hostile_server.py.
    """
    http.event_hooks = {"request": [_ask_unpacked], "response": [_limit]}
    http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    client = FleetHttpClient(f"https://{server}", interceptors=[signature], verify=context)
    client._client.close()
    client._client = http
    return client


class _Limited(httpx.SyncByteStream):
    """The body of an answer, up to the size of the largest that a server has to send."""

    def __init__(self, response: httpx.Response) -> None:
        assert isinstance(response.stream, httpx.SyncByteStream)
        self._response = response
        self._stream = response.stream
        has_piece = response.request.url.path == _WITH_A_PIECE
        self._most = LARGEST_ANSWER if has_piece else _LARGEST_OTHER

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        for part in self._stream:
            taken += len(part)
            if taken > self._most:
                raise httpx.DecodingError(
                    f"an answer of more than {self._most} bytes", request=self._response.request
                )
            yield part

    def close(self) -> None:
        """Ends the answer."""
        self._stream.close()


def _ask_unpacked(request: httpx.Request) -> None:
    request.headers["accept-encoding"] = "identity"


def _limit(response: httpx.Response) -> None:
    """Refuses an answer that was packed, and one that is larger than any has to be.

    Raises:
        httpx.DecodingError: the answer was packed, though nobody asked for that.
    """
    packed = response.headers.get("content-encoding", "identity")
    if packed != "identity":
        raise httpx.DecodingError(f"an answer packed as {packed}", request=response.request)
    response.stream = _Limited(response)


def set_message_id(message: Message, identifier: str) -> None:
    """Gives a message its identifier, the digest of its content.

    Flower sets it on a path that our messages do not take. Test:
    `test_what_flower_hides_of_a_messages_metadata_can_be_set`.
    """
    message.metadata.__dict__["_message_id"] = identifier


def set_lifetime(message: Message, created: float, seconds: float) -> None:
    """Sets when a message was created, and how long it lives from then on.

    Flower would take the time from this machine's clock, which may be wrong. Test:
    `test_what_flower_hides_of_a_messages_metadata_can_be_set`.

    Args:
        created: seconds since 1970, by the server's clock.
    """
    message.metadata.__dict__["_created_at"] = created
    message.metadata.__dict__["_ttl"] = seconds


def set_identity(node_id: int, run_id: int) -> None:
    """Sets the node and the run that this process creates messages for.

    Flower keeps both for the whole process, and sets them when it starts an app, which a relay
    never does. Test: `test_a_message_and_its_reply_leave_nothing_behind`.
    """
    TaskIdentity.node_id = node_id
    TaskIdentity.run_id = run_id
