"""The line between web and engine process."""

import os
import socket
import threading
from dataclasses import dataclass

import pytest

from service.engine.line import Line, line_pair


@dataclass(frozen=True)
class Record:
    text: str


def test_messages_arrive_whole() -> None:
    """Records become objects, large messages come in pieces and are one again."""
    here, there = line_pair()
    other = Line(there)
    large = "x" * 3_000_000  # more than the kernel holds
    sender = threading.Thread(target=lambda: here.send(type="a", record=Record(large)))
    sender.start()
    assert other.receive(10) == {"type": "a", "record": {"text": large}}
    sender.join()
    assert other.receive(0.01) is None
    assert not other.has_input()


def test_lines_behind_a_message_are_not_lost() -> None:
    """Descriptors lie behind a message that is there already: whoever reads it leaves them alone."""
    here, there = line_pair()
    other = Line(there)
    mine, theirs = line_pair()
    here.send(type="ready")
    here.send_lines([theirs])
    os.close(theirs)
    assert other.receive(1) == {"type": "ready"}
    [line] = other.receive_lines(1)
    mine.send(type="hello")
    assert line.receive(1) == {"type": "hello"}


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00\x00", b"\x00\x00\x00\x05ab", b"\xff\xff\xff\xff{}", b"\x00\x00\x00\x03[1]", b"\x00\x00\x00\x01x"],
    ids=["nothing", "half a length", "half a message", "absurd length", "no object", "no JSON"],
)
def test_end_and_nonsense(data: bytes) -> None:
    """The end, in the middle of a message too, and what is no message end the line with EOFError."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(data)
    with pytest.raises(EOFError):
        Line(theirs.detach()).receive(1)
