"""Owns the line between web and engine process: JSON messages over one end of a socket pair.

JSON and not pickle: a hostile model file that took over the engine must not get a way to run code in the web process.
A line has one user at a time at each end, so it needs no lock; the thread that waits for a message reads it itself,
because every hand-over between threads would cost more than the message.
"""

import json
import select
import socket
import struct
from multiprocessing.connection import Connection
from typing import Any

_LONGEST_SEND_S = 10


class Line:
    """One end; every method raises EOFError or OSError once the other end is gone."""

    def __init__(self, descriptor: int):
        self._connection = Connection(descriptor)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def send(self, **message: Any) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message, or None if none comes within the time; waits for ever without one."""
        if not self._poll.poll(None if timeout_s is None else timeout_s * 1000):
            return None
        try:
            return dict(json.loads(self._connection.recv_bytes()))
        except (ValueError, TypeError) as error:
            raise EOFError("the other end does not speak the protocol any more") from error

    def has_input(self) -> bool:
        """Whether a message, or the end, is there to be read."""
        return bool(self._poll.poll(0))

    def send_lines(self, descriptors: list[int]) -> None:
        """Hands ends of further lines over to the other process."""
        with socket.socket(fileno=self._connection.fileno()) as end:
            try:
                socket.send_fds(end, [b"\x00"], descriptors)
            finally:
                end.detach()

    def receive_lines(self, count: int) -> "list[Line]":
        """Takes what ``send_lines`` has handed over.

        Sending on them is bounded in time: a frozen process must not hold the sender of a large prompt for ever.
        """
        with socket.socket(fileno=self._connection.fileno()) as end:
            try:
                _, descriptors, _, _ = socket.recv_fds(end, 1, count)
            finally:
                end.detach()
        if len(descriptors) != count:
            raise EOFError(f"{len(descriptors)} lines came where {count} were announced")
        for descriptor in descriptors:
            with socket.socket(fileno=descriptor) as line:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _LONGEST_SEND_S, 0))
                line.detach()
        return [Line(descriptor) for descriptor in descriptors]

    def hang_up(self) -> None:
        """Ends the line in both directions, which wakes up whoever waits at either end."""
        with socket.socket(fileno=self._connection.fileno()) as end:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # ended already
            finally:
                end.detach()

    def close(self) -> None:
        self._connection.close()


def line_pair() -> tuple[Line, int]:
    """A line for this process and the descriptor of its other end, to be handed over and then closed here."""
    ours, theirs = socket.socketpair()
    return Line(ours.detach()), theirs.detach()
