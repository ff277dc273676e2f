# SPDX-License-Identifier: Apache-2.0
"""A setting of the whole process for as long as a block runs."""

from collections.abc import Iterator
from contextlib import contextmanager


class Override:
    """The value that the block entered last has set, or None outside of every block.

    Threads share it, because autograd's own threads run what is recomputed for a backward. Their
    blocks may end in any order: each takes away what it set.
    """

    def __init__(self) -> None:
        self._blocks: dict[object, str] = {}  # in the order of entering

    @property
    def value(self) -> str | None:
        blocks = list(self._blocks.values())
        return blocks[-1] if blocks else None

    @contextmanager
    def set(self, value: str) -> Iterator[None]:
        block = object()
        self._blocks[block] = value
        try:
            yield
        finally:
            del self._blocks[block]
