"""Owns the line between web and engine process: JSON messages over one end of a socket pair.

JSON and not pickle: a hostile model file that took over the engine must not get a way to run code in the web process.
A line has one user at a time at each end, so it needs no lock; the thread that waits for a message reads it itself,
because every hand-over between threads would cost more than the message.
"""

import select
import socket
import struct
from typing import Any

import orjson

_LONGEST_SEND_S = 10
_LENGTH = struct.Struct("!I")  # of the message that follows
_LARGEST_MESSAGE_BYTES = 64 << 20  # many times the largest prompt


class Line:
    """One end; every method raises EOFError or OSError once the other end is gone."""

    def __init__(self, descriptor: int):
        self._socket = socket.socket(fileno=descriptor)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def send(self, **message: Any) -> None:
        """Sends what JSON can hold, and frozen records as objects."""
        data = orjson.dumps(message)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message, or None if none comes within the time; waits for ever without one."""
        if not self._poll.poll(None if timeout_s is None else timeout_s * 1000):
            return None
        # Never a byte more than the message has: descriptors may lie behind it, and would be lost.
        length = _LENGTH.unpack(self._receive(_LENGTH.size))[0]
        if length > _LARGEST_MESSAGE_BYTES:
            raise EOFError("the other end does not speak the protocol any more")
        try:
            return dict(orjson.loads(self._receive(length)))
        except (ValueError, TypeError) as error:
            raise EOFError("the other end does not speak the protocol any more") from error

    def _receive(self, size: int) -> bytes:
        data = self._socket.recv(size, socket.MSG_WAITALL)
        while len(data) < size:  # a signal can cut it short, and so does the end
            more = self._socket.recv(size - len(data), socket.MSG_WAITALL)
            if not more:
                raise EOFError("the other end is gone")
            data += more
        return data

    def has_input(self) -> bool:
        """Whether a message, or the end, is there to be read."""
        return bool(self._poll.poll(0))

    def send_lines(self, descriptors: list[int]) -> None:
        """Hands ends of further lines over to the other process."""
        socket.send_fds(self._socket, [b"\x00"], descriptors)

    def receive_lines(self, count: int) -> "list[Line]":
        """Takes what ``send_lines`` has handed over.

        Sending on them is bounded in time: a frozen process must not hold the sender of a large prompt for ever.
        """
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, count)
        if len(descriptors) != count:
            raise EOFError(f"{len(descriptors)} lines came where {count} were announced")
        lines = [Line(descriptor) for descriptor in descriptors]
        for line in lines:
            line._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _LONGEST_SEND_S, 0))
        return lines

    def hang_up(self) -> None:
        """Ends the line in both directions, which wakes up whoever waits at either end."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # ended already

    def close(self) -> None:
        self._socket.close()

    def __del__(self) -> None:
        # Whoever ends a life hangs its lines up; closed sooner, a number could be another file's while a thread waits.
        self._socket.close()


def line_pair() -> tuple[Line, int]:
    """A line for this process and the descriptor of its other end, to be handed over and then closed here."""
    ours, theirs = socket.socketpair()
    return Line(ours.detach()), theirs.detach()
