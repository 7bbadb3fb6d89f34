"""Owns the look at a client's socket: whether somebody still waits for the answer."""

import select
import socket

# Sending takes so long without waiting for the client, on a busy machine.
UNBLOCKED_S = 0.02


class ClientWatch:
    """Peeks at the socket without taking a byte from it; without a socket nobody ever seems gone.

    A client that has closed its sending half looks gone too: programs that speak HTTP keep it open until the answer is
    there. A kept or pipelined request behind this one is not touched.
    """

    def __init__(self, client: socket.socket | None):
        self._client = client
        self._gone = False
        if client is not None:
            self._poll = select.poll()
            self._poll.register(client, select.POLLRDHUP)

    def gone(self) -> bool:
        if self._client is None or self._gone:
            return self._gone
        try:
            events = self._poll.poll(0)
            if events:
                mask = events[0][1]
                self._gone = bool(mask & (select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL))
        except OSError:
            self._gone = True
        return self._gone

    def hang_up(self) -> None:
        """Ends the connection in both directions, which also wakes up a thread that writes to it."""
        if self._client is not None:
            try:
                self._client.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has gone by itself
