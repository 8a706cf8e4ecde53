"""What a relay hands messages to, in tests: a handler of whole messages in a trainer's place."""

from collections.abc import Callable

from umbel_client.relay.messages import Pieces
from umbel_host.transport.flower import regrouped


def whole(handle: Callable[[bytes], bytes]) -> Callable[[Pieces], Pieces]:
    """A handler of pieces, made from a handler of whole messages such as `Trainer.handle`."""
    return lambda pieces: list(regrouped([handle(b"".join(pieces))]))
