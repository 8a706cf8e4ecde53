"""Target: the whole trainer of a site, with its state on disk, in every stage, under a lying
operator."""

from fuzz.choices import Choices
from fuzz.target import Place, Property, Target

from umbel_common.errors import RemoteProtocolError
from umbel_common.protocol.wire import Refusal, TrainReply


def _trainer(place: Place) -> Property:
    """Every request gets a sealed reply, and none causes an error that asks for a report."""
    # Imported here: it brings torch, which no other target needs.
    from fuzz.attacked import Attacked

    attacked = Attacked(place)

    def prove(data: bytes) -> None:
        attacked.site.errors.last = None
        body, sealed = attacked.lie(Choices(data))
        reply = attacked.site.opened(attacked.site.trainer.handle(sealed), sealed)
        error = attacked.site.errors.last
        assert "please report" not in (getattr(error, "remedy", None) or ""), error
        if isinstance(reply, Refusal):
            assert error is not None
            raise RemoteProtocolError(reply.check, "as the site told the server")
        if isinstance(reply, TrainReply):
            attacked.note_attempt(body)
        attacked.go_on()

    return prove


TRAINERS = (Target("trainer: whole", _trainer, (RemoteProtocolError,), share=150, inputs=15_000),)
