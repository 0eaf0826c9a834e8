"""A dict with an end, for every cache of the process. It takes no lock: who shares one brings his own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LeastRecentlyUsed(OrderedDict[Key, Value], Generic[Key, Value]):
    """A dict that forgets what was used longest ago. `limit` 0: unlimited; negative: keeps nothing (B20)."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.crowded = False  # half full: from here on it matters who was used last

    def add(self, key: Key, value: Value) -> None:
        """Insert as the newest, dropping the oldest where that goes over the limit."""
        if self.limit < 0:
            return
        self[key] = value
        self.move_to_end(key)
        self.crowded = 0 < self.limit <= 2 * len(self)
        while self.limit and len(self) > self.limit:
            self.popitem(last=False)
