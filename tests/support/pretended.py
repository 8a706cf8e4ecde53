"""A pretended accelerator, for tests of what a GPU would do with this project's code.

Tensors say that they are on `pretend:0` or `pretend:1`; their data are in this machine's memory. As
on a GPU, an operation on tensors of two places is an error, a device's memory has an end, and a
value that the host reads is counted, because there the host would wait for the device. Kernels,
precision and speed are those of the CPU: nothing here tells what a GPU computes, or how fast.

It uses PyTorch's own key for backends that are written in Python, which a process has once. Threads
may use both devices at the same time.
"""

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COUNT = 2
_UNLIMITED = 1 << 40

_counting = threading.RLock()
DEVICES = tuple(f"{NAME}:{index}" for index in range(COUNT))


class Memory:
    """The memory of one device: each storage counts once, for as long as a tensor is in it."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.used = 0
        self.peak = 0
        self.limit: int | None = None
        """Bytes; None: no end."""
        self._blocks: weakref.WeakValueDictionary[int, _Block] = weakref.WeakValueDictionary()

    def block(self, raw: torch.Tensor) -> "_Block":
        """What holds a tensor's storage.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        storage = raw.untyped_storage()
        with _counting:
            known = self._blocks.get(storage._cdata)
            if known is not None:
                return known
            size = storage.nbytes()
            if self.limit is not None and self.used + size > self.limit:
                raise torch.OutOfMemoryError(
                    f"pretended device out of memory: {size} bytes beside {self.used}"
                    f" of {self.limit}"
                )
            block = self._blocks[storage._cdata] = _Block(self, storage, size)
            return block


class _Block:
    def __init__(self, memory: Memory, storage: torch.UntypedStorage, size: int) -> None:
        self.place = memory.place
        self._memory, self._storage, self._size = memory, storage, size
        self._counting = _counting
        memory.used += size
        memory.peak = max(memory.peak, memory.used)

    def __del__(self) -> None:
        with self._counting:
            self._memory.used -= self._size


MEMORY = {name: Memory(name) for name in DEVICES}
"""By device."""

READS: Counter[str] = Counter()
"""How often the host read a device's value, by operator: there it waits for all earlier work."""
WRITES: Counter[str] = Counter()
"""How often the host's memory was copied to a device, by operator."""


class Counted:
    """Reads and writes since the beginning of a `counting`."""

    def __init__(self) -> None:
        self._reads, self._writes = READS.copy(), WRITES.copy()

    @property
    def reads(self) -> Counter[str]:
        return READS - self._reads

    @property
    def writes(self) -> Counter[str]:
        return WRITES - self._writes


@contextmanager
def memory_of(size: int, device: str = DEVICES[0]) -> Iterator[Memory]:
    """Within the context, a device has `size` bytes more than are in use now."""
    memory = MEMORY[device]
    memory.limit = memory.used + size
    try:
        yield memory
    finally:
        memory.limit = None


class Pretended(torch.Tensor):
    """A tensor of a pretended device, around one of the CPU."""

    raw: torch.Tensor
    block: _Block

    @staticmethod
    def __new__(cls, raw: torch.Tensor, place: str) -> "Pretended":
        assert type(raw) is torch.Tensor
        block = MEMORY[place].block(raw)
        made: Pretended = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            # The engine of autograd believes that a device in Python is one: to it, all are the
            # first. `device`, which Python asks, says more.
            device=torch.device(f"{NAME}:0"),
        )
        made.raw, made.block = raw, block
        return made

    @property
    def device(self) -> torch.device:
        return torch.device(self.block.place)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device", next((one for one in args if _is_device(one)), None))
        place = _place(wanted)
        if place is None or place == self.block.place:
            return super().to(*args, **kwargs)
        finish()
        # To autograd both are one device, which copies nothing.
        moved = _Copied.apply(self, place)
        dtype = kwargs.get("dtype", next((one for one in args if type(one) is torch.dtype), None))
        return moved if dtype is None else moved.to(dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], Pretended):
            # What is there already: PyTorch's own code would take it to the first device.
            value, like = args[:2]
            return value.to(like.device, like.dtype)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: "Pretended") -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.raw, self.block = other.raw, other.block

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretended":
        copied: Any = Pretended(self.raw.detach().clone(), self.block.place)
        copied._is_param = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return copied

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {self.device} tensor to numpy")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.raw!r}, {self.device})"


class _Copied(torch.autograd.Function):
    """A copy from one pretended device to the other; its gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, value: Pretended, place: str) -> Pretended:
        ctx.place = value.block.place
        return Pretended(value.raw.clone(), place)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].to(ctx.place), None


_queue: deque[Callable[[], object]] = deque()
"""What the devices were told and have not done yet."""
_working = threading.Lock()
_is_late = False


@contextmanager
def late() -> Iterator[None]:
    """Within the context, a device does what it is told as late as it may: when somebody waits for
    it, or reads of it. Until then, a copy that does not block has not left the host's memory."""
    global _is_late
    _is_late = True
    try:
        yield
    finally:
        _is_late = False
        finish()


def finish() -> None:
    """Has the devices do all that they were told."""
    with _working:
        while _queue:
            _queue.popleft()()


def _later(func: Any, args: Any, kwargs: Any) -> None:
    _queue.append(lambda: func(*args, **kwargs))


class Event:
    """What `torch.cuda.Event` is to a GPU, for its one stream."""

    def record(self, stream: object) -> None:
        assert stream is _STREAM

    def synchronize(self) -> None:
        finish()


_STREAM = object()

_READING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
"""Operators whose result, or its shape, a GPU has to tell the host."""


def _place(device: Any) -> str | None:
    """The name of a pretended device, with its number; None: another device."""
    if device is None:
        return None
    wanted = torch.device(device)
    return f"{NAME}:{wanted.index or 0}" if wanted.type == NAME else None


_lately: dict[int, str] = {}
"""The device of the last operator of each backward pass; they all run in one thread."""

_with_other_bits: set[str] = set()


@contextmanager
def other_bits(device: str) -> Iterator[None]:
    """Within the context, the matrix products of a device are rounded otherwise."""
    _with_other_bits.add(device)
    try:
        yield
    finally:
        _with_other_bits.remove(device)


def _is_device(value: Any) -> bool:
    return isinstance(value, str | torch.device)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name
    seen: set[str] = set()
    known: dict[int, Pretended] = {}
    plain_args = [_unwrap(value, seen, known) for value in args]
    plain_kwargs = {key: _unwrap(value, seen, known) for key, value in kwargs.items()}
    numbers = "" in seen
    seen.discard("")
    if numbers and not seen:
        seen = {one.block.place for one in known.values()}
    here = _place(kwargs.get("device"))
    if here is not None:
        plain_kwargs["device"] = torch.device("cpu")
    if name == "aten::copy_":
        source, to = _place(args[1].device), _place(args[0].device)
        _count(name, source, to)
        blocks = to is None or (source is None and not (len(args) > 2 and args[2]))
        if _is_late and not blocks:
            _later(func, plain_args, plain_kwargs)
            return args[0]
        finish()
        func(*plain_args, **plain_kwargs)
        return args[0]
    if name == "aten::_to_copy":
        source = _place(args[0].device)
        to = source if kwargs.get("device") is None else here
        _count(name, source, to)
        finish()
        out = func(*plain_args, **plain_kwargs)
        return out if to is None else Pretended(out, to)
    if len(seen) > 1 or (numbers and "cpu" in seen):
        raise RuntimeError(f"mixed devices in {name}: {', '.join(sorted(seen))}")
    if name in _READING or (name.startswith("aten::index") and _by_mask(args)):
        with _counting:
            READS[name] += bool(seen - {"cpu"})
    changes_first = name.endswith("_") and args and isinstance(args[0], Pretended)
    if _is_late and changes_first:
        _later(func, plain_args, plain_kwargs)
        return args[0]
    if _is_late and known and not _is_view(func):
        finish()
    out = func(*plain_args, **plain_kwargs)
    place = next(iter(seen - {"cpu"}), None)
    backward = torch._C._current_graph_task_id()
    if place is not None:
        # For what is made like a tensor, PyTorch's own code names the first device.
        _lately[backward] = place
        if place in _with_other_bits and name in ("aten::mm", "aten::addmm"):
            out.mul_(1 + 2**-23)
    elif here == DEVICES[0] and backward != -1:
        # So does its backward pass for zeros, and goes on with tensors of one device.
        place = _lately.get(backward, here)
    else:
        place = here
    return out if place is None else _wrap(out, place, known)


# Not within `_run`: functions that name themselves would keep its tensors until a collection.
def _unwrap(value: Any, seen: set[str], known: dict[int, Pretended]) -> Any:
    if isinstance(value, Pretended):
        # A number is at home everywhere: PyTorch's own code makes some on the first device.
        seen.add(value.block.place if value.dim() > 0 else "")
        known[id(value.raw)] = value
        return value.raw
    if isinstance(value, torch.Tensor):
        if value.dim() > 0:
            seen.add("cpu")
    elif isinstance(value, list | tuple):
        return type(value)([_unwrap(one, seen, known) for one in value])
    return value


def _wrap(value: Any, place: str, known: dict[int, Pretended]) -> Any:
    if isinstance(value, torch.Tensor):
        return known[id(value)] if id(value) in known else Pretended(value, place)
    if isinstance(value, list | tuple):
        return type(value)([_wrap(one, place, known) for one in value])
    return value


def _count(name: str, source: str | None, to: str | None) -> None:
    with _counting:
        if source is not None and to is None:
            READS[name] += 1
        if source is None and to is not None:
            WRITES[name] += 1


def _is_view(func: Any) -> bool:
    """Whether an operator only gives another shape to what is there."""
    returned = [one.alias_info for one in func._schema.returns]
    return bool(returned) and all(one is not None and not one.is_write for one in returned)


def _by_mask(args: Any) -> bool:
    """Whether an index is a mask, whose ones have to be counted first."""
    indices = args[1] if isinstance(args[1], list | tuple) else args[1:2]
    return any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices)


class _Module:
    """What `torch.cuda` is to a GPU."""

    Event = Event

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return COUNT

    def empty_cache(self) -> None:
        pass

    def current_stream(self, device: object) -> object:
        return _STREAM

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        memory = MEMORY[str(device)]
        limit = _UNLIMITED if memory.limit is None else memory.limit
        return limit - memory.used, limit

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")

_tensor = torch.tensor


def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which asks of a device in Python what it does not have: put it in that place
    where a library makes tensors on a device, and take it away before a model is loaded."""
    if _place(device) is None:
        return _tensor(data, device=device, **options)
    return _tensor(data, **options).to(device)
