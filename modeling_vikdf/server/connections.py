"""Connections that say or read nothing: how long and how many of them `vikdf serve` keeps.

Knows uvicorn's protocol and its connections; nothing of requests, jobs and models.
"""

import asyncio
from collections import Counter

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import client_network


HEADER_TIMEOUT = 10.0  # seconds for a request's header; uvicorn has no limit once its first byte has come
SEND_TIMEOUT = 30.0  # seconds for what has been written to a client that does not read
REFUSED_PAUSE = 0.1  # seconds before more is read of a request that has been answered already
MAX_CLIENT_CONNECTIONS = 64  # without a whole request
MAX_CONNECTIONS = 512  # half of the 1,024 file descriptors that a process usually has
BACKLOG = 128  # connections that the system accepts at once, before any of them can be closed


class GuardedProtocol(H11Protocol):
    """
    uvicorn's HTTP protocol, which closes connections that do not ask anything, or do not read what they asked for.

    A request's header has to arrive within `HEADER_TIMEOUT`, in however many pieces. A client that stops reading has
    `SEND_TIMEOUT`; nothing more is written meanwhile. What still comes of a request that has been answered is read
    slowly, for as long as a header may take. Of more than `MAX_CLIENT_CONNECTIONS` of a client without a whole request
    the oldest ends. Where there are more than `MAX_CONNECTIONS`, the client that has most of these loses its oldest
    one. A request that is being answered is never lost.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Closes another connection if there are too many, or this one if all others are being answered."""
        self.silence: asyncio.TimerHandle | None = None
        self.stall: asyncio.TimerHandle | None = None
        self.aborted = False
        self.opened = self.loop.time()
        super().connection_made(transport)
        self.address = client_network(self.client)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called as soon as the client does not read
        self._watch()
        idle = [each for each in self.connections if each.is_dispensable() and not each.aborted]
        own = [each for each in idle if each.address == self.address]
        if len(own) > MAX_CLIENT_CONNECTIONS:
            min(own, key=lambda each: each.opened).abort()
        elif len(self.connections) > MAX_CONNECTIONS:
            held = Counter(each.address for each in idle)
            min(idle, key=lambda each: (-held[each.address], each.opened)).abort()  # this one at the worst

    def data_received(self, data: bytes) -> None:
        """Passes data on; the header's time runs on until it is complete."""
        super().data_received(data)
        self._watch()
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            self.transport.pause_reading()
            self.loop.call_later(REFUSED_PAUSE, self._read_on)

    def on_response_complete(self) -> None:
        """The time of the next header begins."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The client does not read: its time begins."""
        super().pause_writing()
        self.stall = self.loop.call_later(SEND_TIMEOUT, self.abort)

    def resume_writing(self) -> None:
        """The client has read everything."""
        super().resume_writing()
        self.stall.cancel()

    def abort(self) -> None:
        """Closes the connection, whatever is still to be sent."""
        self.aborted = True  # it counts until the event loop's next turn
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._end_watch()
        if self.stall is not None:
            self.stall.cancel()
        super().connection_lost(exc)

    def is_dispensable(self) -> bool:
        """Whether there is no request that has arrived whole and waits for its answer."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_watch()
        elif self.silence is None and not self.transport.is_closing():
            self.silence = self.loop.call_later(HEADER_TIMEOUT, self.transport.close)  # after what is still to be sent

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _end_watch(self) -> None:
        if self.silence is not None:
            self.silence.cancel()
            self.silence = None


__all__ = ["BACKLOG", "HEADER_TIMEOUT", "MAX_CLIENT_CONNECTIONS", "MAX_CONNECTIONS", "SEND_TIMEOUT", "GuardedProtocol"]
