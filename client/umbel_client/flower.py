"""Flower on the site's side: a Flower message in, a Flower message out, sealed bytes between.

The only module here that imports flwr. It opens nothing: whoever runs it (the relay, or a
simulation) holds neither data nor identity key.
"""

from collections.abc import Callable

from flwr.app import ConfigRecord, Error, Message, RecordDict

from umbel_common.wire import FLOWER_FIELD, FLOWER_MESSAGE_TYPE, FLOWER_RECORD

NOT_OURS = 1
"""Code of the error that answers every message that is not Umbel's."""


def answer(message: Message, handle: Callable[[bytes], bytes]) -> Message:
    """Hands the sealed bytes to `handle` (`Trainer.handle` or its proxy) and sends back its answer.

    Nothing else is ever acted on: no app bundle, no run configuration, no other message type.
    """
    sealed = _sealed_bytes(message)
    if sealed is None:
        return Message(Error(NOT_OURS, "not a message of this federation"), reply_to=message)
    content = RecordDict({FLOWER_RECORD: ConfigRecord({FLOWER_FIELD: handle(sealed)})})
    return Message(content, reply_to=message)


def _sealed_bytes(message: Message) -> bytes | None:
    if message.metadata.message_type != FLOWER_MESSAGE_TYPE or not message.has_content():
        return None
    record = message.content.get(FLOWER_RECORD)
    if not isinstance(record, ConfigRecord) or set(record) != {FLOWER_FIELD}:
        return None
    sealed = record[FLOWER_FIELD]
    return sealed if isinstance(sealed, bytes) else None
