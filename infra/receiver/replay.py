"""What was received already, so that it is not taken twice; a bounded memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from starlette.exceptions import HTTPException

MOST = 10_000  # deliveries; about 2 MB


class Memory:
    """The latest deliveries, each by what it says of itself and by the digest of its body."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def note(self, *marks: bytes) -> None:
        """Remember a delivery; 409 for one that shares a mark with an earlier one."""
        digests = [hashlib.sha256(mark).digest()[:16] for mark in marks]
        if any(digest in self._seen for digest in digests):
            raise HTTPException(409, "this delivery was taken already")
        for digest in digests:
            self._seen[digest] = None
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def forget(self, *marks: bytes) -> None:
        """The delivery came to nothing, so the sender may try it again."""
        for mark in marks:
            self._seen.pop(hashlib.sha256(mark).digest()[:16], None)
