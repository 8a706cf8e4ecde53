"""One error tree for the whole project.

Every error has the exit code that a command ends with, and `diagnostics()`: text for the person at
the keyboard, which names the file, the field, what was found, what is accepted, and what to do. No
secret, no sample and no vector may be put into an error.

Exit codes, in ranges (`docs/errors.md` lists them; a test holds the two together):

===========  ===================================================
2            wrong command line
10 to 19     input: configuration, data, model, plan
20 to 29     trust: keys, signatures, roster
30 to 39     privacy: policy, budget, ledger
40 to 49     protocol: the peer, the round, the network
50 to 59     storage: journals, run folders
130          interrupted by the operator
===========  ===================================================
"""

from typing import ClassVar

from umbel_common.printable import one_line


class UmbelError(Exception):
    """Root of all errors that Umbel raises on purpose.

    Args:
        message: what is wrong, in one sentence, without the details below.
        file: the file or folder concerned.
        field: the field, column, row or option concerned.
        found: what was there; several values as a tuple.
        accepted: what would have been right.
        remedy: what the reader can do about the error.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        field: str | None = None,
        found: object = None,
        accepted: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.field = field
        self.found = found
        self.accepted = accepted
        self.remedy = remedy

    def diagnostics(self) -> str:
        """The message and its details, one per line, ready for a terminal."""
        lines = [_text(self.message)]
        details = (
            ("file", self.file),
            ("field", self.field),
            ("found", self.found),
            ("accepted", self.accepted),
            ("what to do", self.remedy),
        )
        lines += [f"  {name}: {_text(value)}" for name, value in details if value is not None]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.diagnostics()


def _text(value: object) -> str:
    """`value` on one line and printable: text from a stranger cannot look like text of ours."""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return one_line(text)


class ConfigError(UmbelError):
    """A configuration or scenario file is missing, malformed or inconsistent."""

    exit_code = 10


class DataError(UmbelError):
    """A data set is missing, malformed or empty, or does not fit the plan."""

    exit_code = 11


class ModelError(UmbelError):
    """A base model is missing, does not have its digest, or cannot be fine-tuned as planned."""

    exit_code = 12


class PlanError(UmbelError):
    """A training plan contradicts itself or asks for something unsupported."""

    exit_code = 13


class JobUnknown(UmbelError):
    """No job has the name that was given."""

    exit_code = 14


class IdentityError(UmbelError):
    """A key or roster is missing, malformed, or not one that this party may believe."""

    exit_code = 20


class SignatureError(UmbelError):
    """A statement does not carry the signature that it must carry."""

    exit_code = 21


class PolicyRefusal(UmbelError):
    """The site's own policy forbids what a plan or round asks for.

    Args:
        check: name of the rule; the only part that the server learns.
    """

    exit_code = 30

    def __init__(self, check: str, message: str, **details: object) -> None:
        super().__init__(message, **details)  # type: ignore[arg-type]  # forwarded by name
        self.check = check


class BudgetError(UmbelError):
    """The privacy budget does not allow the next release."""

    exit_code = 31


class CalibrationError(UmbelError):
    """No reasonable noise gives the epsilon that was asked for."""

    exit_code = 32


class LedgerError(UmbelError):
    """The privacy ledger is corrupt, rolled back, or used by another process."""

    exit_code = 33


class ProtocolError(UmbelError):
    """The protocol was broken. For the party that raises this, the attempt is over.

    Args:
        check: name of the check that failed, in kebab-case. Tests assert it, and the peer learns
            it.
    """

    exit_code = 40

    def __init__(self, check: str, message: str, **details: object) -> None:
        super().__init__(message, **details)  # type: ignore[arg-type]  # forwarded by name
        self.check = check


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol."""

    exit_code = 40


def require(holds: bool, check: str, message: str, **details: object) -> None:
    """Checks what a peer sent. Every refusal of the protocol is one call of this function.

    The details are built whether the check holds or not, so they must be cheap.

    Raises:
        RemoteProtocolError: `check`, unless `holds`.
    """
    if not holds:
        raise RemoteProtocolError(check, message, **details)


class LocalProtocolError(ProtocolError):
    """Our own code used the protocol in a way that it does not allow; this is a bug."""

    exit_code = 41


class RoundAborted(ProtocolError):
    """Too few sites took part, or a check failed; nothing of this attempt was released."""

    exit_code = 42


class JobFailed(UmbelError):
    """A job ended without its last release, after all the attempts that were allowed.

    Args:
        may_accept: sites that the job needed to begin and that may still accept its plan.
    """

    exit_code = 43

    def __init__(
        self, message: str, *, may_accept: tuple[str, ...] = (), **details: object
    ) -> None:
        super().__init__(message, **details)  # type: ignore[arg-type]  # forwarded by name
        self.may_accept = may_accept


class UnreachableError(UmbelError):
    """Another process, or the other side's machine, does not answer."""

    exit_code = 44


class StorageError(UmbelError):
    """A journal, registry or run folder is corrupt, locked, or not writable."""

    exit_code = 50


class RunExists(UmbelError):
    """A run of this name exists and was made from other inputs; it is never overwritten."""

    exit_code = 51


class VerificationError(UmbelError):
    """A transcript, release or run folder does not verify."""

    exit_code = 52
