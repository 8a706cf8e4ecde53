"""A relay's signature on each of its requests to the server."""

from base64 import b64encode

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from umbel_client.relay.server_clock import ServerClock


class Signature:
    """Signs each request as Flower's own node does, with the server's time."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, clock: ServerClock) -> None:
        self._key = key
        self._public = b64encode(public_key_to_bytes(key.public_key())).decode("ascii")
        self._clock = clock

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Sends a request with its signature, and learns the server's time from the answer."""
        timestamp = self._clock.now().isoformat()
        signature = sign_message(self._key, timestamp.encode("ascii"))
        context.request.headers.update(
            {
                FLEET_HTTP_PUBLIC_KEY_HEADER: self._public,
                TIMESTAMP_HEADER: timestamp,
                FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
            }
        )
        asked = self._clock.here()
        response = call_next(context)
        self._clock.learn(response, asked)
        return response
