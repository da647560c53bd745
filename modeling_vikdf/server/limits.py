"""How much of the server one client may have, so that something is left for the others.

Knows addresses and numbers; nothing of connections, requests and models.
"""

import ipaddress
import time
from collections import Counter
from collections.abc import Callable


MAX_OPEN_BYTES = 64 * 2**20  # of the bodies of all open requests; a client has half of it at most
SMALL_BODY = 2**16  # bytes of a body that do not count: an ordinary chat is always let in
BYTES_PER_SECOND = 8 * 2**20  # of a client's bodies, without these; reading and checking 8 MiB takes up to 0.2 s


class Budget:
    """
    What clients share, and may each have a part of.

    Args:
        total: how much there is.
        each: how much of it a client may have.
    """

    def __init__(self, total: float, each: float):
        self.total, self.each = total, each
        self.taken: Counter[str | None] = Counter()

    def take(self, client: str | None, amount: int) -> bool:
        """Takes more for a client, if as much is left for it; whether it is."""
        if amount > min(self.each - self.taken[client], self.total - self.taken.total()):
            return False
        self.taken[client] += amount
        return True

    def give_back(self, client: str | None, amount: int) -> None:
        """Gives back what was taken; of a client that has nothing left nothing is kept."""
        self.taken[client] -= amount
        if not self.taken[client]:
            del self.taken[client]


class Pace:
    """
    How fast a client may go on: some at once, and then so much a second.

    Args:
        rate: how much a second.
        burst: how much at once, after a pause.
        clock: tells the seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self.clock = rate, burst, clock
        # when what a client has taken is worked off; the client that took last is the last
        self.due: dict[str | None, float] = {}

    def take(self, client: str | None, amount: float) -> float:
        """Takes some for a client, which then has to wait for so many seconds; who has worked it off is forgotten."""
        now = self.clock()
        while self.due and self.due[oldest := next(iter(self.due))] <= now:
            del self.due[oldest]
        self.due[client] = max(now, self.due.pop(client, now)) + amount / self.rate
        return max(0.0, self.due[client] - now - self.burst / self.rate)


def client_network(client: tuple[str, int] | None) -> str | None:
    """The address of a client; the first half of an IPv6 address, because each network has all of the second."""
    host = client and client[0]
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:  # IPv4, a name, a Unix socket
        return host
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address), 64), strict=False))


__all__ = ["BYTES_PER_SECOND", "MAX_OPEN_BYTES", "SMALL_BODY", "Budget", "Pace", "client_network"]
