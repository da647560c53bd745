"""Connections that say nothing: how long and how many of them `vikdf serve` keeps.

Knows uvicorn's protocol and its connections; nothing of requests, jobs and models.
"""

import asyncio
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


HEADER_TIMEOUT = 10.0  # seconds for a request's header; uvicorn has no limit once its first byte has come
MAX_CONNECTIONS = 512  # half of the 1,024 file descriptors that a process usually has
BACKLOG = 128  # connections that the system accepts at once, before any of them can be closed


class GuardedProtocol(H11Protocol):
    """
    uvicorn's HTTP protocol, which closes connections that do not ask anything.

    A request's header has to arrive within `HEADER_TIMEOUT`, in however many pieces. Where there are more than
    `MAX_CONNECTIONS`, the client that has most of them without a whole request loses its oldest one; a request that
    is being answered is never lost.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Closes another connection if there are too many, or this one if all others are being answered."""
        self.silence: asyncio.TimerHandle | None = None
        self.aborted = False
        self.opened = self.loop.time()
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > MAX_CONNECTIONS:
            dispensable = self._most_dispensable()
            dispensable.aborted = True  # it counts until the event loop's next turn
            dispensable.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Passes data on; the header's time runs on until it is complete."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The time of the next header begins."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._end_watch()
        super().connection_lost(exc)

    def is_dispensable(self) -> bool:
        """Whether there is no request that has arrived whole and waits for its answer."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _most_dispensable(self) -> "GuardedProtocol":
        idle = [each for each in self.connections if each.is_dispensable() and not each.aborted]
        held = Counter(each.address for each in idle)
        return min(idle, key=lambda each: (-held[each.address], each.opened), default=self)

    @property
    def address(self) -> Any:
        """The client's address, without its port."""
        return self.client and self.client[0]

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_watch()
        elif self.silence is None and not self.transport.is_closing():
            self.silence = self.loop.call_later(HEADER_TIMEOUT, self.transport.close)  # after what is still to be sent

    def _end_watch(self) -> None:
        if self.silence is not None:
            self.silence.cancel()
            self.silence = None


__all__ = ["BACKLOG", "HEADER_TIMEOUT", "MAX_CONNECTIONS", "GuardedProtocol"]
