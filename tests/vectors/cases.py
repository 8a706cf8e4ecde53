"""The parts of every vector: cases, bytes in hexadecimal, and fixed inputs."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import msgspec

from umbel_common.canonical import Value
from umbel_common.trust.identity import Identity

Case: TypeAlias = dict[str, Any]


def accepted(name: str, operation: str, inputs: dict[str, Any], output: Any) -> Case:
    """A case that gives `output`."""
    return {
        "name": name,
        "operation": operation,
        "inputs": to_json(inputs),
        "output": to_json(output),
    }


def refused(
    name: str,
    operation: str,
    inputs: dict[str, Any],
    check: str | None,
    error: str = "RemoteProtocolError",
) -> Case:
    """A case that fails with `error`, and with `check` if that error has one."""
    failure = {"error": error} if check is None else {"error": error, "check": check}
    return {"name": name, "operation": operation, "inputs": to_json(inputs), "failure": failure}


def sample(label: str, size: int) -> bytes:
    """`size` bytes that look random and are the same everywhere: SHAKE-256 of a label."""
    return hashlib.shake_256(f"umbel vector {label}".encode()).digest(size)


def identity(name: str) -> Identity:
    """The identity of a party of the vectors; its seed is in the vectors too."""
    return Identity(sample(f"identity {name}", 32))


class Drawn:
    """Entropy that keeps its draws, so that the vector can list them."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.draws: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        self.draws.append(sample(f"{self._label} draw {len(self.draws)}", size))
        return self.draws[-1]


def replayed(draws: list[bytes]) -> Callable[[int], bytes]:
    """Entropy that gives `draws` one after the other; each must have the size that is asked for."""
    rest: Iterator[bytes] = iter(draws)

    def entropy(size: int) -> bytes:
        data = next(rest)
        assert len(data) == size
        return data

    return entropy


def to_json(value: Any) -> Any:
    """Lists, objects in the order of their fields, and bytes as `0x` and hexadecimal digits."""
    match value:
        case bytes() | bytearray() | memoryview():
            return "0x" + bytes(value).hex()
        case Value():
            # A tag comes first, as on the wire.
            return to_json(msgspec.to_builtins(value, builtin_types=(bytes, memoryview)))
        case dict():
            return {name: to_json(inner) for name, inner in value.items()}
        case list() | tuple():
            return [to_json(inner) for inner in value]
        case _:
            return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json` but for types: byte strings are bytes again."""
    match value:
        case str() if value.startswith("0x"):
            return bytes.fromhex(value[2:])
        case dict():
            return {name: from_json(inner) for name, inner in value.items()}
        case list():
            return [from_json(inner) for inner in value]
        case _:
            return value


def long_bytes(data: bytes) -> bytes | dict[str, Any]:
    """Up to 256 bytes as they are; longer ones by length and SHA-256."""
    if len(data) <= 256:
        return data
    return {"length": len(data), "sha256": hashlib.sha256(data).digest()}
