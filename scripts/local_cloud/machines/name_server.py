"""Owns the cloud's name server, which servers and the host can ask: it answers for zones and hands on all other names.

It listens in the cloud's own namespace, where port 53 is free whatever the host itself runs, and asks the host's
resolvers from the host, where those on its loopback address can be reached as well.
"""

import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from socketserver import BaseRequestHandler

import dns.exception
import dns.flags
import dns.message
import dns.rcode

from scripts.local_cloud.machines import zone_answers
from scripts.local_cloud.machines.firewall import NAMES_PORT
from scripts.local_cloud.machines.inner_sockets import CallerServer, listen_in
from scripts.local_cloud.machines.zone_answers import Answer, LoadedZone

# Answers to a question, given as it came: from other name servers; None if none of them answers.
Forward = Callable[[bytes, bool], bytes | None]

_log = logging.getLogger(__name__)
_HEAD = struct.Struct("!HHHHHH")  # of a message: number, flags, how many of each section
_LENGTH = struct.Struct("!H")  # before each message over TCP
_LARGEST_MESSAGE = 65535
_RESPONSE_FLAG = 0x8000
# A resolver in the C library gives up a try after 5 s.
_PATIENCE_S = 2.0
_RESOLVERS_TRIED = 2
_IDLE_S = 10.0
_WAITING_AT_ONCE = 64


@dataclass(frozen=True)
class Later:
    """A question that is answered once others were asked: of a name in no zone, or of an alias that leads out of all.

    ``begun`` is what the zones say to the latter.
    """

    wire: bytes
    query: dns.message.Message
    begun: Answer | None
    over_tcp: bool


def parse_resolvers(text: str, own_address: str) -> list[str]:
    """The name servers in a text in the form of ``resolv.conf``, without this one, which the host may ask itself."""
    words = [line.split() for line in text.splitlines()]
    found = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]
    return [address for address in found if address != own_address]


def respond(wire: bytes, zones: Iterable[LoadedZone], over_tcp: bool) -> bytes | Later | None:
    """The answer to a message; what other name servers must be asked for; None for what is no question."""
    if len(wire) < _HEAD.size or _HEAD.unpack_from(wire)[1] & _RESPONSE_FLAG:
        return None
    try:
        query = dns.message.from_wire(wire, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError):
        return _HEAD.pack(_HEAD.unpack_from(wire)[0], _RESPONSE_FLAG | dns.rcode.FORMERR, 0, 0, 0, 0)
    found = zone_answers.answer(zones, query)
    if found is not None and (found.elsewhere is None or not query.flags & dns.flags.RD):
        return zone_answers.render(query, found.message, over_tcp)
    return Later(wire, query, found, over_tcp)


def finish(later: Later, forward: Forward | None) -> bytes:
    """The answer; without anybody to ask, an alias as it is, and a refusal of names in no zone."""
    if later.begun is not None:
        message = later.begun.message if forward is None else _follow(later, later.begun, forward)
    elif forward is None:
        message = zone_answers.refuse(later.query, dns.rcode.REFUSED)
    elif told := forward(later.wire, later.over_tcp):
        return told
    else:
        message = zone_answers.refuse(later.query, dns.rcode.SERVFAIL)
    return zone_answers.render(later.query, message, later.over_tcp)


def _follow(later: Later, begun: Answer, forward: Forward) -> dns.message.Message:
    """What the zones say, and what others say of the name that an alias leads to."""
    assert begun.elsewhere is not None, "it leads nowhere else"
    question = dns.message.make_query(begun.elsewhere, later.query.question[0].rdtype).to_wire()
    try:
        told = dns.message.from_wire(forward(question, False) or b"")
        if told.flags & dns.flags.TC:
            told = dns.message.from_wire(forward(question, True) or b"")
    except (dns.exception.DNSException, ValueError):
        return zone_answers.refuse(later.query, dns.rcode.SERVFAIL)
    begun.message.answer.extend(told.answer)
    begun.message.set_rcode(told.rcode())
    return begun.message


def ask(resolver: str, wire: bytes, over_tcp: bool, patience_s: float = _PATIENCE_S) -> bytes | None:
    """What another name server answers to a message, under the message's own number; None if it does not."""
    number = secrets.token_bytes(2)
    family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM if over_tcp else socket.SOCK_DGRAM) as line:
            line.settimeout(patience_s)
            line.connect((resolver, NAMES_PORT))
            if over_tcp:
                line.sendall(_LENGTH.pack(len(wire)) + number + wire[2:])
                told = _receive(line)
            else:
                line.send(number + wire[2:])
                told = line.recv(_LARGEST_MESSAGE)
    except OSError:
        return None
    return wire[:2] + told[2:] if told is not None and told[:2] == number and len(told) >= _HEAD.size else None


def _receive(line: socket.socket) -> bytes | None:
    """One message over TCP; None if the other side ends before it is whole."""
    length = _read_whole(line, _LENGTH.size)
    return None if length is None else _read_whole(line, _LENGTH.unpack(length)[0])


def _read_whole(line: socket.socket, count: int) -> bytes | None:
    received = b""
    while len(received) < count:
        piece = line.recv(count - len(received))
        if not piece:
            return None
        received += piece
    return received


class NameServer:
    """Serves until closed.

    ``zones`` are those to answer for; ``resolvers`` whom to ask for all other names, nobody if there are none.
    ``is_cut_off(address)`` tells of a caller that must not reach the outside: its questions for other names are lost.
    """

    def __init__(
        self,
        namespace: Path,
        address: str,
        zones: Callable[[], Iterable[LoadedZone]],
        resolvers: Callable[[], list[str]],
        is_cut_off: Callable[[str], bool],
    ) -> None:
        self._zones, self._resolvers, self._is_cut_off = zones, resolvers, is_cut_off
        self._room = threading.BoundedSemaphore(_WAITING_AT_ONCE)
        self._datagrams = listen_in(namespace, address, NAMES_PORT, socket.SOCK_DGRAM)
        try:
            listening = listen_in(namespace, address, NAMES_PORT)
        except BaseException:
            self._datagrams.close()
            raise
        serve_line = self._serve_line

        class Names(BaseRequestHandler):
            def handle(self) -> None:
                serve_line(self.request, self.client_address[0])

        self._connections = CallerServer(listening, Names)
        self._connections.start()
        self._workers = ThreadPoolExecutor(_WAITING_AT_ONCE, thread_name_prefix="names")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve_datagrams, name="names", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._closing.set()
        self._connections.stop()
        self._thread.join()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._datagrams.close()

    def _respond(self, wire: bytes, over_tcp: bool) -> bytes | Later | None:
        try:
            return respond(wire, self._zones(), over_tcp)
        except Exception:  # one question that breaks something must not be the last one
            _log.exception("a question for a name could not be answered: %s", wire.hex())
            return None

    def _finish(self, later: Later, caller: str) -> bytes | None:
        if self._is_cut_off(caller):
            return None
        resolvers = self._resolvers()[:_RESOLVERS_TRIED]

        def forward(wire: bytes, over_tcp: bool) -> bytes | None:
            return next((told for each in resolvers if (told := ask(each, wire, over_tcp)) is not None), None)

        return finish(later, forward if resolvers else None)

    def _serve_datagrams(self) -> None:
        self._datagrams.settimeout(0.1)
        while not self._closing.is_set():
            try:
                wire, caller = self._datagrams.recvfrom(_LARGEST_MESSAGE)
            except OSError:
                continue  # nobody asks, or one who was answered is not there any more
            told = self._respond(wire, over_tcp=False)
            if isinstance(told, bytes):
                self._send(told, caller)
            # Names of zones are answered even while other name servers do not answer at all.
            elif told is not None and self._room.acquire(blocking=False):
                self._workers.submit(self._send_later, told, caller)

    def _send_later(self, later: Later, caller: tuple[str, int]) -> None:
        try:
            told = self._finish(later, caller[0])
            if told is not None:
                self._send(told, caller)
        except Exception:
            _log.exception("a question for a name could not be handed on: %s", later.wire.hex())
        finally:
            self._room.release()

    def _send(self, told: bytes, caller: tuple[str, int]) -> None:
        try:
            self._datagrams.sendto(told, caller)
        except OSError:
            pass  # as when it is lost on the way: the caller asks again

    def _serve_line(self, line: socket.socket, caller: str) -> None:
        line.settimeout(_IDLE_S)
        while (wire := _receive(line)) is not None:
            told = self._respond(wire, over_tcp=True)
            if isinstance(told, Later):
                told = self._finish(told, caller)
            if told is None:
                return
            line.sendall(_LENGTH.pack(len(told)) + told)
