"""Limits on the rate of each client's requests."""

import collections

CLIENTS = 10_000  # that are remembered; of more, those that asked least recently are forgotten


class Rates:
    """A bucket of tokens for each client: `rate` requests a second, and as many at once (one at least)."""

    def __init__(self, rate: float) -> None:
        self._rate, self._most = rate, max(1.0, rate)
        self._clients: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()  # tokens, seconds

    def wait(self, client: str, now: float) -> float:
        """Takes a token of the client and returns 0, or returns the seconds until there is one. `now` is in seconds."""
        tokens, before = self._clients.pop(client, (self._most, now))
        tokens = min(self._most, tokens + (now - before) * self._rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self._rate
        self._clients[client] = tokens - (not wait), now
        if len(self._clients) > CLIENTS:
            self._clients.popitem(last=False)
        return wait
