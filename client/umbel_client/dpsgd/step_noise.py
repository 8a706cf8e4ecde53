"""The noise of a round's steps, drawn by threads while the steps compute.

Rank 16 in all linear layers of a model with 7 billion parameters trains 40 million numbers. Drawing
as many takes a processor about as long as a step takes a GPU, so the next step's noise is drawn
meanwhile, in blocks. Each block has a key of its own, and its own part of the trained numbers, all
of them on one device.

This module is part of the core of the privacy guarantee. Never add or change here:

- A block that is used for two steps, or at two places: two releases would have the same noise, and
  their difference none. Each says for which round, step and place it was drawn, is used once for
  these, and is wiped.
- A buffer that is written before its copy to the device has ended: the device would read the next
  step's noise, which is then used again.
- Draws for the batches: they have a source of their own.
- Noise that outlives its round. A process that is forked from this one has no use of it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self, TypeVar

import torch

from umbel_client.privacy.noise import NoiseSource
from umbel_common.canonical import Entropy

BLOCK = 1 << 20
"""Numbers of a block: 8 MiB."""

_THREADS = 4


_T = TypeVar("_T", bound=torch.Tensor)


def by_device(tensors: Iterable[_T]) -> dict[torch.device, list[_T]]:
    """The tensors of each device, in their order; the device of the first one comes first."""
    found: dict[torch.device, list[_T]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found


class _Place(NamedTuple):
    """A block's part of the trained numbers."""

    device: torch.device
    offset: int
    """The place of its first number among those of the device."""


class _Purpose(NamedTuple):
    """What a block is drawn for."""

    round: int
    step: int
    place: _Place


class _Block:
    """A buffer with the key that fills it; not thread-safe."""

    def __init__(self, source: NoiseSource, size: int, *, pinned: bool) -> None:
        self._source = source
        self._size = size
        # Draws come in pairs.
        self._buffer = torch.zeros(size + size % 2, dtype=torch.float64, pin_memory=pinned)
        self._purpose: _Purpose | None = None

    def draw(self, purpose: _Purpose, is_copied: Callable[[], object]) -> None:
        """Waits until the buffer is copied, and fills it again."""
        is_copied()
        self._source.fill(self._buffer.numpy())
        self._purpose = purpose

    def take(self, purpose: _Purpose) -> torch.Tensor:
        """The draws, float64[size]: the buffer itself.

        Raises:
            RuntimeError: they were drawn for another purpose, or were taken before.
        """
        if self._purpose != purpose:
            raise RuntimeError(f"noise of {self._purpose} was asked for as {purpose}")
        self._purpose = None
        return self._buffer[: self._size]

    def wipe(self) -> None:
        self._purpose = None
        self._buffer.zero_()


class StepNoise:
    """Independent standard normal draws for each step of a round, one for each trained number.

    Within its context; at the end, whatever was drawn and not used is wiped.
    """

    def __init__(
        self,
        entropy: Entropy,
        parameters: Sequence[torch.Tensor],
        *,
        steps: int,
        round_number: int = 1,
    ) -> None:
        """Begins to draw for the first step.

        Args:
            entropy: the source of the keys: 32 bytes for each `BLOCK` numbers.
            parameters: what is trained.
            steps: how often noise can be taken.
            round_number: the round, from 1.
        """
        self._round = round_number
        self._steps = steps
        self._step = 0
        self._process = os.getpid()
        self.sizes: Mapping[torch.device, int] = {
            device: sum(parameter.numel() for parameter in there)
            for device, there in by_device(parameters).items()
        }
        """How many of the trained numbers each device has."""
        self._blocks = {
            _Place(device, offset): _Block(
                NoiseSource(entropy), min(BLOCK, size - offset), pinned=device.type == "cuda"
            )
            for device, size in self.sizes.items()
            for offset in range(0, size, BLOCK)
        }
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="noise")
        self._drawn: dict[_Place, Future[None]] = {}
        self._copies: dict[_Place, Callable[[], object]] = dict.fromkeys(self._blocks, _is_there)
        """What waits until each block's last draws have left their buffer."""
        for place in self._blocks:
            self._draw_next(place)

    def take(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The next step's noise, block by block.

        Yields:
            The block's draws on the device of its numbers, float64[n], and before them the place of
            its first number among the trained ones of that device. The draws are the caller's until
            it asks for the next block.

        Raises:
            RuntimeError: there is no noise for another step, an earlier step did not take all of
                its noise, or this process was forked from the one that draws.
        """
        if os.getpid() != self._process:
            # Parent and child would add the same noise; and the child has no threads.
            raise RuntimeError("the noise of a round is used in a process that was forked")
        if self._step == self._steps:
            raise RuntimeError(f"the noise of a round is for {self._steps} steps")
        self._step += 1
        for place, block in self._blocks.items():
            self._drawn[place].result()
            draws = block.take(_Purpose(self._round, self._step, place))
            there, self._copies[place] = _sent(draws, place.device)
            yield place.offset, there
        # Not before: threads that draw would have the processor that adds.
        for place in self._blocks:
            self._draw_next(place)

    def wait(self) -> None:
        """Waits until the next step's noise is drawn."""
        for drawn in self._drawn.values():
            drawn.result()

    def _draw_next(self, place: _Place) -> None:
        """Has a block drawn for the step after this one, if there is one."""
        block, is_copied = self._blocks[place], self._copies[place]
        if self._step < self._steps:
            purpose = _Purpose(self._round, self._step + 1, place)
            self._drawn[place] = self._threads.submit(block.draw, purpose, is_copied)
        else:
            is_copied()
            block.wipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Wipes all that was drawn; no noise can be taken any more."""
        self._steps = self._step
        if os.getpid() == self._process:
            self._threads.shutdown(cancel_futures=True)
            # A step that just ended may not have had its noise yet: it would have none.
            for is_copied in self._copies.values():
                is_copied()
        for block in self._blocks.values():
            block.wipe()


def _is_there() -> None:
    """What waits for a copy that nobody made."""


def _sent(draws: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Callable[[], object]]:
    """Begins to copy draws to a device.

    Returns:
        The draws on the device, and what waits until they have left their buffer. On the CPU the
        draws are the buffer.
    """
    if device.type == "cpu":
        return draws, _is_there
    there = draws.to(device, non_blocking=True)
    ended = torch.get_device_module(device).Event()
    ended.record(torch.get_device_module(device).current_stream(device))
    return there, ended.synchronize
