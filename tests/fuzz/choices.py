"""A string of bytes, read as a series of choices; both engines search through such strings."""


class Choices:
    """Reads `data` from front to back. Once it is used up, every further choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> bool:
        """Whether there are bytes that have not been read."""
        return self._position < len(self._data)

    def take(self, size: int) -> bytes:
        """The next bytes, at most `size` of them."""
        part = self._data[self._position : self._position + size]
        self._position += size
        return part

    def rest(self) -> bytes:
        """Everything that has not been read."""
        return self.take(len(self._data))

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        size = 1 if count <= 256 else 2
        return int.from_bytes(self.take(size), "big") % count
