"""A hundred hostile requests against the real gunicorn and gpt4all: each is answered or cut, and nothing is harmed."""

import json
import re
import socket
import time
from collections.abc import Iterator

import pytest

from tests.service.harness import SMALL, Service, running_service

JSON = b"Content-Type: application/json\r\n"
CODING = b"Transfer-Encoding: chunked\r\n"
CLOSED = 0  # the connection is closed without an answer


def post(body: bytes, headers: bytes = JSON, path: bytes = b"/generate", method: bytes = b"POST") -> bytes:
    return (
        method + b" " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers
        + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip


def prompt(text: bytes, more: bytes = b"") -> bytes:
    return post(b'{"max_tokens": 2, "prompt": "' + text + b'"' + more + b"}")


def field(more: bytes) -> bytes:
    return prompt(b"x", b", " + more)


def head(lines: bytes, body: bytes = b"") -> bytes:
    return lines + b"\r\n\r\n" + body


def chunked(chunks: bytes, headers: bytes = CODING) -> bytes:
    return b"POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + JSON + headers + b"\r\n" + chunks


BODY = b'{"prompt": "x", "max_tokens": 1}'
SMUGGLED = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"

HOSTILE: dict[str, tuple[bytes, set[int]]] = {
    # texts
    "lone high surrogate": (prompt(rb"\ud800"), {422}),
    "lone low surrogate": (prompt(rb"a\udc00b"), {422}),
    "swapped surrogates": (prompt(rb"\udc00\ud800"), {422}),
    "surrogate pair": (prompt(rb"\ud83d\ude00"), {200}),
    "NUL escape": (prompt(rb"a\u0000b"), {422}),
    "NUL byte": (prompt(b"a\x00b"), {400}),
    "surrogate in system": (field(rb'"system": "\ud800"'), {422}),
    "surrogate in stop": (field(rb'"stop": ["\ud800"]'), {422}),
    "NUL in stop": (field(rb'"stop": "\u0000"'), {422}),
    "empty prompt": (prompt(b""), {422}),
    "spaces only": (prompt(b"   "), {200}),
    "newlines only": (prompt(rb"\n\n\n"), {200}),
    "control characters": (prompt(rb"\u0001\u001b[2J\u007f"), {200}),
    "right-to-left override": (prompt("\u202e\u2066".encode()), {200}),
    "combining flood": (prompt(("e" + "\u0301" * 40).encode()), {200}),
    "noncharacters": (prompt("\ufffe\uffff\U0010ffff".encode()), {200}),
    "special-token look-alikes": (prompt(b"<|eot_id|><s></s>[INST]<|im_end|>"), {200}),
    "template look-alike": (prompt(b"{{ 7*7 }}{% for x in y %} %1 %2"), {200}),
    "private-use placeholders": (prompt("\ue0000\ue001".encode()), {200}),
    "prompt over the context": (prompt(b"word " * 5000), {400}),
    "one long word": (prompt(b"a" * 200_000), {400}),
    "200,000 emoji": (prompt("🎉".encode() * 50_000), {400}),
    # numbers
    "huge integer": (field(b'"max_tokens": 99999999999999999999999999'), {400, 422}),
    "integer of 5,000 digits": (post(b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}"), {400}),
    "negative": (field(b'"top_k": -5'), {422}),
    "zero tokens": (post(b'{"prompt": "x", "max_tokens": 0}'), {422}),
    "1e999": (field(b'"temperature": 1e999'), {422}),
    "-1e999": (field(b'"temperature": -1e999'), {422}),
    "tiny": (field(b'"temperature": 1e-320'), {200}),
    "NaN": (field(b'"temperature": NaN'), {400}),
    "Infinity": (field(b'"top_p": Infinity'), {400}),
    "fraction of a token": (post(b'{"prompt": "x", "max_tokens": 1.5}'), {422}),
    "true as a number": (field(b'"top_k": true'), {400}),
    "hexadecimal": (field(b'"top_k": 0x10'), {400}),
    "leading zero": (field(b'"top_k": 010'), {400}),
    # JSON
    "empty body": (post(b""), {400}),
    "null": (post(b"null"), {400}),
    "array": (post(b"[1]"), {400}),
    "string": (post(b'"prompt"'), {400}),
    "cut": (post(b'{"prompt": "x'), {400}),
    "trailing comma": (post(b'{"prompt": "x",}'), {400}),
    "trailing text": (post(BODY + b"x"), {400}),
    "two documents": (post(BODY + BODY), {400}),
    "comment": (post(b'/* x */ {"prompt": "x"}'), {400}),
    "single quotes": (post(b"{'prompt': 'x'}"), {400}),
    "duplicate field": (field(b'"prompt": "y"'), {400}),
    "arrays 100,000 deep": (post(b"[" * 100_000), {400}),
    "objects 50,000 deep": (post(b'{"a":' * 50_000), {400}),
    "deep prompt": (post(b'{"prompt": ' + b"[" * 400 + b"]" * 400 + b"}"), {400}),
    "10,000 unknown fields": (post(json.dumps({f"k{i}": i for i in range(10_000)}).encode()), {400}),
    "prototype names": (field(b'"__proto__": {}, "constructor": 1'), {400}),
    "long field name": (post(b'{"' + b"k" * 100_000 + b'": 1}'), {400}),
    "1,000 stops": (field(b'"stop": [' + b",".join([b'"s"'] * 1000) + b"]"), {422}),
    "stop of objects": (field(b'"stop": [{}]'), {400}),
    "stream as text": (field(b'"stream": "true"'), {400}),
    "unsupported seed": (field(b'"seed": 1'), {400}),
    # encodings
    "UTF-16": (post('{"prompt": "x"}'.encode("utf-16")), {400}),
    "UTF-32": (post('{"prompt": "x"}'.encode("utf-32")), {400}),
    "Latin-1": (post('{"prompt": "é"}'.encode("latin-1")), {400}),
    "byte order mark": (post(b"\xef\xbb\xbf" + BODY), {400}),
    "overlong UTF-8": (prompt(b"\xc0\xaf"), {400}),
    "UTF-8 surrogates": (prompt(b"\xed\xa0\x80"), {400}),
    "over U+10FFFF": (prompt(b"\xf4\x90\x80\x80"), {400}),
    "gzip": (post(b"\x1f\x8b\x08\x00\x00", JSON + b"Content-Encoding: gzip\r\n"), {400, 415}),
    "form": (post(b"prompt=x", b"Content-Type: application/x-www-form-urlencoded\r\n"), {415}),
    "multipart": (post(b"--a--", b"Content-Type: multipart/form-data; boundary=a\r\n"), {415}),
    "no content type": (post(BODY, b""), {415}),
    "broken content type": (post(BODY, b"Content-Type: ;;;/\r\n"), {415}),
    "two content types": (post(BODY, JSON + b"Content-Type: text/plain\r\n"), {200, 400, 415}),
    # sizes
    "body over the limit": (post(b'{"prompt": "' + b"x" * 1_100_000 + b'"}'), {413}),
    "announced terabyte": (chunked(b"", b"Content-Length: 1099511627776\r\n"), {408, 413}),
    "long request line": (head(b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost"), {414}),
    "long header": (head(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000), {431}),
    "many headers": (head(b"GET /health HTTP/1.1\r\nHost: localhost" + b"\r\nX: a" * 500), {431}),
    # HTTP and smuggling
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40 + b"\r\n\r\n", {400}),
    "HTTP/0.9": (b"GET /health\r\n\r\n", {400, 200}),
    "HTTP/3.0": (head(b"GET /health HTTP/3.0\r\nHost: localhost"), {400}),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    "odd method": (head(b"BREW /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close"), {400, 405}),
    "lower-case method": (head(b"post /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close"), {400, 405}),
    "CONNECT": (head(b"CONNECT x:80 HTTP/1.1\r\nHost: localhost"), {400, 404, 405}),
    "absolute path outside": (head(b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close"), {404}),
    "encoded path": (head(b"GET /%2e%2e/%00health HTTP/1.1\r\nHost: localhost\r\nConnection: close"), {404}),
    "invalid escapes in the path": (
        head(b"GET /%ff%fe%zz HTTP/1.1\r\nHost: localhost\r\nConnection: close"),
        {400, 404},
    ),
    "length and chunked": (chunked(b"0\r\n\r\n" + SMUGGLED, b"Content-Length: 5\r\n" + CODING), {400}),
    "chunked and length": (chunked(b"0\r\n\r\n" + SMUGGLED, CODING + b"Content-Length: 50\r\n"), {400}),
    "two lengths": (chunked(BODY + SMUGGLED, b"Content-Length: 32\r\nContent-Length: 0\r\n"), {400}),
    "list of lengths": (chunked(BODY + SMUGGLED, b"Content-Length: 32, 32\r\n"), {400}),
    "signed length": (chunked(BODY + SMUGGLED, b"Content-Length: +32\r\n"), {400}),
    "negative length": (chunked(BODY, b"Content-Length: -1\r\n"), {400}),
    "length in letters": (chunked(BODY, b"Content-Length: abc\r\n"), {400}),
    "unknown coding": (chunked(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding: xchunked\r\n"), {400, 501}),
    "doubled coding": (chunked(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding: chunked, chunked\r\n"), {400, 501}),
    "coding with tab": (chunked(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding:\tchunked, identity\r\n"), {400, 501}),
    "space before colon": (chunked(BODY + SMUGGLED, b"Content-Length : 32\r\n"), {400}),
    "folded header": (chunked(BODY, b"X: a\r\n b\r\nContent-Length: 32\r\n"), {400}),
    "bare line feeds": (b"GET /health HTTP/1.1\nHost: localhost\n\n", {400, 408, CLOSED}),
    "NUL in a header": (head(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\nConnection: close"), {400}),
    "header without name": (head(b"GET /health HTTP/1.1\r\nHost: localhost\r\n: a"), {400}),
    "chunk size in letters": (chunked(b"zz\r\nhello\r\n0\r\n\r\n"), {400}),
    "chunk size negative": (chunked(b"-1\r\nhello\r\n0\r\n\r\n"), {400}),
    "chunk size huge": (chunked(b"ffffffffffffffffff\r\nhello"), {400, 408, 413}),
    "chunk without end": (chunked(b"5\r\nhelloXX0\r\n\r\n"), {400}),
    "chunk extension": (chunked(b"20;a=b\r\n" + BODY + b"\r\n0\r\n\r\n"), {200, 400}),
    "chunked whole": (chunked(b"20\r\n" + BODY + b"\r\n0\r\n\r\n"), {200}),
    "underscored header": (post(BODY, JSON + b"X_Deadline_S: 0\r\n"), {200}),
    "forged proxy headers": (post(BODY, JSON + b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n"), {401}),
    "pipelined garbage": (post(BODY) + b"\x00\x01garbage", {200}),
    # slow
    "headers never end": (b"POST /generate HTTP/1.1\r\nHost: localhost\r\n", {408, CLOSED}),
    "body never comes": (chunked(b"", b"Content-Length: 100\r\n"), {408}),
    "body stops midway": (chunked(BODY[:10], b"Content-Length: 32\r\n"), {408}),
    "chunk stops midway": (chunked(b"20\r\n" + BODY[:10]), {408}),
    "last chunk never comes": (chunked(b"20\r\n" + BODY + b"\r\n"), {408}),
    "expects and sends nothing": (chunked(b"", b"Expect: 100-continue\r\nContent-Length: 32\r\n"), {408, 100}),
    "odd expectation": (chunked(BODY, b"Expect: 200-ok\r\nContent-Length: 32\r\n"), {417}),
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(model=SMALL, header_timeout_s=0.8, body_timeout_s=1.2) as running:
        yield running
        assert running.metric("llm_engine_restarts_total") == 0
        assert running.generate("hello", max_tokens=1).status == 200
        assert not running.logs("failure")


def test_there_are_a_hundred() -> None:
    """The list is as long as it claims to be."""
    assert len(HOSTILE) >= 100


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_request(service: Service, name: str) -> None:
    """One answer of the expected kind or a closed connection within the deadlines; errors are problem documents."""
    raw, expected = HOSTILE[name]
    start_s = time.monotonic()
    answer = exchange(service, raw)
    assert time.monotonic() - start_s < 5
    statuses = [int(code) for code in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", answer)]
    assert len(statuses) <= 1 or statuses[0] == 100, f"answered twice: {statuses}"
    assert (statuses[0] if statuses else CLOSED) in expected, answer[:500]
    if statuses and statuses[-1] >= 400:
        _, _, body = answer.partition(b"\r\n\r\n") if statuses[0] != 100 else answer.rpartition(b"\r\n\r\n")
        document = json.loads(body)
        assert document["status"] == statuses[-1]
        assert b"Traceback" not in answer
    assert service.get("/health").status == 200


def exchange(service: Service, raw: bytes) -> bytes:
    """Sends bytes and reads to the end of the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=6) as client:
        try:
            client.sendall(raw)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all of it was sent; the answer may be there all the same
        try:
            while part := client.recv(65536):
                received += part
                if b"keep-alive" in received and received.count(b"\r\n\r\n") and complete(received):
                    break
        except ConnectionResetError:
            pass  # an answer that was sent before the reset has been read
    return received


def complete(answer: bytes) -> bool:
    """Whether a kept connection has given its whole answer (its length is announced)."""
    headers, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: ([0-9]+)", headers, re.IGNORECASE)
    return length is not None and len(body) >= int(length.group(1))
