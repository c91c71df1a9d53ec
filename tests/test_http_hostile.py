"""Malformed, slow and rude clients, over raw sockets: each gets one answer or a clean close, and harms nobody else.

A refusal that leaves a doubt about where the request ended must close the connection: every malformed request below is
followed by a good one on the same connection, which must not be answered.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from test_http import Running

import rerank_server as server

BODY = b'{"query": "q", "passages": ["a"]}'
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
NOTHING = b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n"
N_SLOW = 300


def post(*headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"POST /rerank HTTP/1.1", b"Host: a", *headers, b"", body])


def with_length(body: bytes) -> bytes:
    return post(b"Content-Length: %d" % len(body), body=body)


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    sized = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return post(b"Transfer-Encoding: chunked", body=sized + end)


CHUNKED, LENGTH_5 = b"Transfer-Encoding: chunked", b"Content-Length: 5"
GOOD = with_length(BODY)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["message"])

    @property
    def says_close(self) -> bool:
        return self.headers.get("connection") == "close"


class Wire:
    """A client that sends bytes as they are, and reads answers strictly."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None, wait_s: float = 20) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=wait_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            self._socket = context.wrap_socket(self._socket, server_hostname="127.0.0.1")
        self._received = b""

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def _until(self, end: bytes) -> bytes:
        while end not in self._received:
            received = self._socket.recv(65536)
            assert received or not self._received, f"closed in the middle of an answer: {self._received!r}"
            if not received:
                raise EOFError("closed")
            self._received += received
        found, _, self._received = self._received.partition(end)
        return found

    def answer(self, is_head: bool = False) -> Answer:
        first, *lines = self._until(b"\r\n\r\n").decode("ascii").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        assert len(headers) == len(lines), f"a header is there twice: {lines}"
        n_bytes = 0 if is_head or status in ("100", "204") else int(headers["content-length"])
        while len(self._received) < n_bytes:
            received = self._socket.recv(65536)
            assert received, "closed in the middle of a body"
            self._received += received
        body, self._received = self._received[:n_bytes], self._received[n_bytes:]
        assert b"Traceback" not in body
        return Answer(int(status), headers, body)

    def ends(self) -> bool:
        """Whether the server closes, with nothing more to say."""
        return self._received == b"" and self._socket.recv(65536) == b""

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    fixture = Running(max_body_mb=1, header_timeout_s=5)
    yield fixture
    fixture.close()


@pytest.fixture
def wire(running: Running) -> Iterator[Wire]:
    made = Wire(running.port)
    yield made
    made.close()


def wait_for(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


def is_alive(running: Running) -> bool:
    return bool(running.rerank({"query": "q", "passages": ["a"]})[0] == 200)


REFUSED = {
    # request lines
    "HTTP/0.9": (b"GET /health\r\n", 400, "METHOD TARGET HTTP/1.1"),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/2.0"),
    "HTTP/3": (b"GET /health HTTP/3.0\r\nHost: a\r\n\r\n", 505, "HTTP/3.0"),
    "HTTP/01.1": (b"GET /health HTTP/01.1\r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "lower-case http": (b"GET /health http/1.1\r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "two spaces": (b"GET  /health HTTP/1.1\r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "a space in the target": (b"GET /hea lth HTTP/1.1\r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "a tab for a space": (b"GET\t/health HTTP/1.1\r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "a space before": (b" GET /health HTTP/1.1\r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "a space after": (b"GET /health HTTP/1.1 \r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "a method that is no token": (b"G(T /health HTTP/1.1\r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "NUL in the target": (b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "METHOD TARGET"),
    "UTF-8 in the target": ("GET /é HTTP/1.1\r\nHost: a\r\n\r\n".encode(), 400, "METHOD TARGET"),
    "a fragment": (b"GET /health#x HTTP/1.1\r\nHost: a\r\n\r\n", 400, "request target"),
    "a relative target": (b"GET health HTTP/1.1\r\nHost: a\r\n\r\n", 400, "request target"),
    "another scheme": (b"GET ftp://a/health HTTP/1.1\r\nHost: a\r\n\r\n", 400, "request target"),
    "user information": (b"GET http://u:p@a/health HTTP/1.1\r\nHost: a\r\n\r\n", 400, "request target"),
    "CONNECT": (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "request target"),
    "* of another method": (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400, "request target"),
    "a long request line": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "8,192"),
    "an endless request line": (b"A" * 100_000, 414, "8,192"),
    "two empty lines": (b"\r\n\r\n", 400, "METHOD TARGET"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", 400, "CR LF"),
    # lines
    "bare LF everywhere": (b"GET /health HTTP/1.1\nHost: a\n\n", 400, "CR LF"),
    "bare LF after a header": (b"GET /health HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400, "CR LF"),
    "bare LF at the end": (b"GET /health HTTP/1.1\r\nHost: a\r\n\n", 400, "CR LF"),
    "bare CR in a header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", 400, "CR LF"),
    "bare CR before CR LF": (b"GET /health HTTP/1.1\r\nHost: a\r\r\n\r\n", 400, "CR LF"),
    "bare CR in the request line": (b"GET /health\r HTTP/1.1\r\nHost: a\r\n\r\n", 400, "CR LF"),
    # header fields
    "a folded header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400, "header line"),
    "a folded first header": (b"GET /health HTTP/1.1\r\n Host: a\r\n\r\n", 400, "header line"),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost: a\r\nX : a\r\n\r\n", 400, "header line"),
    "a length hidden by a space": (post(b"Content-Length : 33", body=BODY), 400, "header line"),
    "no colon": (b"GET /health HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", 400, "header line"),
    "no name": (b"GET /health HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400, "header line"),
    "NUL in a value": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400, "header line"),
    "NUL in a name": (b"GET /health HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n", 400, "header line"),
    "another control character": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n", 400, "header line"),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
    "two Hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400, "host header is there twice"),
    "a Host that is none": (b"GET /health HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "Host"),
    "two Hosts in one": (b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "Host"),
    "a large header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431, "longer"),
    "an endless header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000, 431, "longer"),
    "large headers": (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: %s\r\n" % (b"a" * 1000) * 50, 431, "longer"),
    "many headers": (b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 101, 431, "100 header lines"),
    "another expectation": (post(b"Expect: 200-ok", b"Content-Length: 33", body=BODY), 417, "100-continue"),
    "a compressed body": (post(b"Content-Encoding: gzip", b"Content-Length: 33", body=BODY), 415, "'gzip'"),
    "a body compressed twice": (post(b"Content-Encoding: br, gzip", CHUNKED, body=b"0\r\n\r\n"), 415, "'br, gzip'"),
    # framing
    "two lengths": (post(b"Content-Length: 33", b"Content-Length: 3", body=BODY), 400, "twice"),
    "two equal lengths": (post(b"Content-Length: 33", b"Content-Length: 33", body=BODY), 400, "twice"),
    "two lengths in one": (post(b"Content-Length: 33, 33", body=BODY), 400, "one number"),
    "a signed length": (post(b"Content-Length: +33", body=BODY), 400, "one number"),
    "a negative length": (post(b"Content-Length: -1", body=BODY), 400, "one number"),
    "a hexadecimal length": (post(b"Content-Length: 0x21", body=BODY), 400, "one number"),
    "a length with an underscore": (post(b"Content-Length: 3_3", body=BODY), 400, "one number"),
    "a length in other digits": (post("Content-Length: ٣".encode(), body=BODY), 400, "one number"),
    "an empty length": (post(b"Content-Length:", body=BODY), 400, "one number"),
    "a length of 4,000 digits": (post(b"Content-Length: " + b"9" * 4000, body=BODY), 400, "one number"),
    "length with chunked": (post(LENGTH_5, CHUNKED, body=b"0\r\n\r\n"), 400, "beside"),
    "chunked with length": (post(CHUNKED, LENGTH_5, body=b"0\r\n\r\n"), 400, "beside"),
    "chunked in HTTP/1.0": (
        b"POST /rerank HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "HTTP/1.1"),
    "gzip": (post(b"Transfer-Encoding: gzip", body=BODY), 501, "chunked"),
    "gzip, chunked": (post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 501, "chunked"),
    "identity": (post(b"Transfer-Encoding: identity", b"X: y", body=BODY), 501, "chunked"),
    "chunked, quoted": (post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"), 501, "chunked"),
    "chunked with a vertical tab": (post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), 400, "header line"),
    "chunked twice": (post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"), 400, "twice"),
    "an empty coding": (post(b"Transfer-Encoding:", body=BODY), 501, "chunked"),
    "a GET with both": (
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400, "beside"),
    "a POST without a length": (post(), 411, "Content-Length"),
    # chunks
    "a size that is no number": (chunked(end=b"g\r\n"), 400, "size"),
    "a size with 0x": (chunked(end=b"0x1\r\na\r\n0\r\n\r\n"), 400, "size"),
    "a size with a sign": (chunked(end=b"+1\r\na\r\n0\r\n\r\n"), 400, "size"),
    "a negative size": (chunked(end=b"-1\r\na\r\n0\r\n\r\n"), 400, "size"),
    "an empty size": (chunked(end=b"\r\n0\r\n\r\n"), 400, "size"),
    "a size with a space": (chunked(end=b"1 \r\na\r\n0\r\n\r\n"), 400, "size"),
    "a size of 17 digits": (chunked(end=b"00000000000000001\r\na\r\n0\r\n\r\n"), 400, "size"),
    "a size over the limit": (chunked(end=b"ffffffffffffffff\r\na"), 413, "1,000,000"),
    "a chunk longer than its size": (chunked(end=b"1\r\nab\r\n0\r\n\r\n"), 400, "longer"),
    "a chunk ended by LF": (chunked(end=b"1\r\na\n0\r\n\r\n"), 400, "CR LF"),
    "a size ended by LF": (chunked(end=b"1\na\r\n0\r\n\r\n"), 400, "CR LF"),
    "a chunk ended by two other bytes": (chunked(end=b"1\r\naXX0\r\n\r\n"), 400, "longer"),
    "a long extension": (chunked(end=b"1;" + b"x" * 300 + b"\r\na\r\n0\r\n\r\n"), 400, "longer"),
    "NUL in an extension": (chunked(end=b"1;\0\r\na\r\n0\r\n\r\n"), 400, "size"),
    "a trailer that is none": (chunked(BODY, end=b"0\r\nX\r\n\r\n"), 400, "header line"),
    "a folded trailer": (chunked(BODY, end=b"0\r\nX: a\r\n b\r\n\r\n"), 400, "header line"),
    "a length as a trailer": (chunked(BODY, end=b"0\r\nContent-Length: 33\r\n\r\n"), 400, "a trailer must not"),
    "a coding as a trailer": (chunked(BODY, end=b"0\r\nTransfer-Encoding: x\r\n\r\n"), 400, "a trailer must not"),
    "a host as a trailer": (chunked(BODY, end=b"0\r\nHost: b\r\n\r\n"), 400, "a trailer must not"),
    "a large trailer": (chunked(BODY, end=b"0\r\nX: " + b"a" * 40_000 + b"\r\n\r\n"), 431, "longer"),
    "many trailers": (chunked(BODY, end=b"0\r\n" + b"X: a\r\n" * 101 + b"\r\n"), 431, "100 header lines"),
    "a body over the limit": (post(b"Content-Length: 1000001"), 413, "1,000,000"),
    "chunks over the limit": (chunked(*[b" " * 65_536] * 16), 413, "1,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_request_gets_one_refusal_and_the_connection_closes(
    running: Running, wire: Wire, name: str
) -> None:
    data, status, words = REFUSED[name]
    with contextlib.suppress(ConnectionError):  # an early refusal may close before all of it is sent
        wire.send(data + HEALTH)
    answer = wire.answer()
    assert (answer.status, answer.says_close) == (status, True), answer
    assert words in answer.message
    assert wire.ends(), "what followed was read as another request"
    assert is_alive(running)


BAD_JSON = {
    "nothing": (b"", "not valid JSON"),
    "half an object": (BODY[:-1], "not valid JSON"),
    "two objects": (BODY + BODY, "not valid JSON"),
    "NUL": (b'{"query": "\0", "passages": []}', "not valid JSON"),
    "UTF-16": (BODY.decode().encode("utf-16"), "not valid UTF-8"),
    "compressed": (b"\x1f\x8b\x08\x00", "not valid UTF-8"),
    "a list": (b"[]", "not a list"),
    "NaN": (b'{"query": "q", "passages": [], "min_score": NaN}', "NaN is no JSON number"),
    "Infinity": (b'{"query": "q", "passages": [], "x": Infinity}', "Infinity is no JSON number"),
    "-Infinity": (b'{"query": "q", "passages": [], "x": [-Infinity]}', "-Infinity is no JSON number"),
    "a number beyond floats": (b'{"query": "q", "passages": [], "x": 1e999}', "1e999"),
    "a number of 10,000 digits": (b'{"query": "q", "passages": [], "x": %s}' % (b"9" * 10_000), "10,000 characters"),
    "a number of 900,000 digits": (b'{"query": "q", "x": -%s}' % (b"9" * 900_000), "900,001 characters"),
    "10,000 digits after the point": (b'{"query": "q", "x": 0.%s}' % (b"9" * 10_000), "more than a float"),
    "an exponent of 10,000 digits": (b'{"query": "q", "x": 1e-%s}' % (b"9" * 10_000), "more than a float"),
    "a name twice": (b'{"query": "q", "passages": ["a"], "query": "r"}', "'query' is in an object"),
    "an escaped name twice": (b'{"query": "q", "passages": ["a"], "\\u0071uery": "r"}', "'query' is in an object"),
    "an unknown name twice": (b'{"query": "q", "documents": [{"x": {"a": 1, "a": 2}}]}', "'a' is in an object"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "deep inside a field": (b'{"query": %s}' % (b"[" * 50_000 + b"]" * 50_000), "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
@pytest.mark.parametrize("send", [with_length, chunked], ids=["length", "chunked"])
def test_bad_json_is_refused_in_one_line_and_the_connection_goes_on(
    wire: Wire, name: str, send: Any
) -> None:
    body, words = BAD_JSON[name]
    wire.send((send(body) if body or send is with_length else chunked()) + GOOD)
    refusal, after = wire.answer(), wire.answer()
    assert (refusal.status, after.status, refusal.says_close) == (400, 200, False)
    assert words in refusal.message
    assert len(refusal.message) < 300
    assert "\n" not in refusal.message


def test_lists_that_grow_in_memory_are_counted_before_they_are_made() -> None:
    """32 MB of "[]," would become 700 MB. Brackets inside strings are only text."""
    swarm = b'{"query": "q", "passages": [' + b"[]," * server.MAX_JSON_CONTAINERS + b"[]]}"
    with pytest.raises(server.BadRequestError, match="1,000,000 lists and objects"):
        server.parse_json_object(swarm)
    brackets = json.dumps({"query": '"[\\"{' * 600_000, "passages": ["[[{{" * 600_000]}).encode()
    assert len(server.parse_json_object(brackets)["passages"][0]) == 2_400_000


ACCEPTED = {
    "one chunk": chunked(BODY),
    "single bytes": chunked(*(BODY[i : i + 1] for i in range(len(BODY)))),
    "upper-case sizes and zeros": post(b"Transfer-Encoding: Chunked", body=b"00021\r\n" + BODY + b"\r\n000\r\n\r\n"),
    "extensions": post(b"Transfer-Encoding: chunked", body=b'21 ; a=b;c="d e"\r\n' + BODY + b"\r\n0;x\r\n\r\n"),
    "trailers": chunked(BODY, end=b"0\r\nX-Checksum: 1\r\nExpires: 2\r\n\r\n"),
    "an absolute target": GOOD.replace(b"/rerank", b"http://example.com:80/rerank?x=/y"),
    "https in an absolute target": GOOD.replace(b"/rerank", b"HTTPS://[::1]/rerank"),
    "a query": GOOD.replace(b"/rerank", b"/rerank?a=b&c"),
    "an empty line before": b"\r\n" + GOOD,
    "an empty Host": GOOD.replace(b"Host: a", b"Host:"),
    "names in any case, any spaces": GOOD.replace(b"Content-Length: ", b"cOnTeNt-LeNgTh:\t "),
    "a value in Latin-1": GOOD.replace(b"Host: a", b"Host: a\r\nX: \xe9"),
    "an empty value": GOOD.replace(b"Host: a", b"Host: a\r\nX:"),
    "a body that is not compressed": GOOD.replace(b"Host: a", b"Host: a\r\nContent-Encoding: Identity"),
    "repeated headers": GOOD.replace(b"Host: a", b"Host: a\r\nAccept: a\r\nAccept: b"),
    "a length with zeros": GOOD.replace(b"Content-Length: 33", b"Content-Length: 000033"),
    "HTTP/1.9": GOOD.replace(b"HTTP/1.1", b"HTTP/1.9"),
    "99 more headers": GOOD.replace(b"Host: a", b"Host: a" + b"\r\nX: a" * 98),
    "a request line of 8,000 bytes": GOOD.replace(b"/rerank", b"/rerank?" + b"a" * 7990),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("n_bytes", [1, 1 << 20], ids=["byte by byte", "at once"])
def test_what_is_right_but_rare_is_answered_and_the_connection_goes_on(wire: Wire, name: str, n_bytes: int) -> None:
    """Followed by a request that is answered differently: an answer too many or too few would show."""
    data = ACCEPTED[name] + NOTHING
    for start in range(0, len(data), n_bytes):
        wire.send(data[start : start + n_bytes])
    assert (wire.answer().status, wire.answer().status) == (200, 404)


def test_fifty_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    for n_bytes in (7, 1000, 1 << 20):
        requests = [GOOD, chunked(BODY), HEALTH, NOTHING, with_length(b"{}"), with_length(b"")] * 8
        data = b"".join(requests)
        for start in range(0, len(data), n_bytes):
            wire.send(data[start : start + n_bytes])
        assert [wire.answer().status for _ in requests] == [200, 200, 200, 404, 400, 400] * 8


def test_close_is_kept_and_what_was_pipelined_behind_it_is_not_answered(wire: Wire) -> None:
    wire.send(HEALTH.replace(b"Host: a", b"Host: a\r\nConnection: x, Close") + HEALTH)
    answer = wire.answer()
    assert (answer.status, answer.says_close) == (200, True)
    assert wire.ends()


@pytest.mark.parametrize(("connection", "is_kept"), [(b"", False), (b"Connection: keep-alive\r\n", True)])
def test_http_1_0_closes_unless_asked_not_to(wire: Wire, connection: bytes, is_kept: bool) -> None:
    wire.send(b"GET /health HTTP/1.0\r\n" + connection + b"\r\n")
    answer = wire.answer()
    assert answer.says_close is not is_kept
    assert (answer.headers.get("connection") == "keep-alive") is is_kept, "a 1.0 client that is not told so closes"
    if is_kept:
        wire.send(HEALTH)
        assert wire.answer().status == 200
    else:
        assert wire.ends()


def test_head_has_the_length_of_the_body_that_it_leaves_out(wire: Wire) -> None:
    wire.send(HEALTH.replace(b"GET", b"HEAD") + HEALTH)
    head, answer = wire.answer(is_head=True), wire.answer()
    assert int(head.headers["content-length"]) == len(answer.body)


def test_options_says_what_a_path_takes(wire: Wire) -> None:
    wire.send(b"OPTIONS /rerank HTTP/1.1\r\nHost: a\r\n\r\n" + b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n" + HEALTH)
    first, star, _ = wire.answer(), wire.answer(), wire.answer()
    assert (first.status, first.headers["allow"], star.status) == (204, "POST, OPTIONS", 204)
    assert "content-length" not in first.headers
    assert "access-control-allow-origin" not in first.headers


@pytest.mark.parametrize("half", [
    b"GET /hea", b"GET /health HTTP/1.1\r\nHost", HEALTH[:-2], GOOD[:-1], chunked(BODY)[:-1], chunked(BODY)[:-30],
    chunked(BODY, end=b"0\r\nX: y\r\n"),
])  # fmt: skip
def test_a_request_that_stops_half_way_is_refused(running: Running, wire: Wire, half: bytes) -> None:
    wire.send(half)
    wire.half_close()
    answer = wire.answer()
    assert answer.status == 400
    assert "ended in the middle" in answer.message
    assert wire.ends()
    assert is_alive(running)


def test_a_refusal_reaches_a_client_that_is_still_sending(running: Running, wire: Wire) -> None:
    """Closing with unread data in the socket would reset the connection and destroy the answer."""
    wire.send(post(b"Content-Length: 3000000", body=b"x" * 3_000_000))
    assert wire.answer().status == 413
    assert wire.ends()


# -- Expect: 100-continue ---------------------------------------------------------------------------------------------

EXPECT = b"Expect: 100-Continue"


@pytest.mark.parametrize("data", [
    GOOD.replace(b"Host: a", b"Host: a\r\n" + EXPECT), chunked(BODY).replace(b"Host: a", b"Host: a\r\n" + EXPECT)
], ids=["length", "chunked"])  # fmt: skip
def test_a_client_that_waits_is_told_to_go_on(wire: Wire, data: bytes) -> None:
    head, _, body = data.partition(b"\r\n\r\n")
    for _ in range(2):
        wire.send(head + b"\r\n\r\n")
        assert wire.answer().status == 100
        wire.send(body)
        assert wire.answer().status == 200


@pytest.mark.parametrize(("data", "status"), [
    (post(EXPECT, b"Content-Length: 2000000"), 413),
    (post(EXPECT, b"Content-Length: 33").replace(b"/rerank", b"/nothing"), 404),
    (post(EXPECT, b"Transfer-Encoding: chunked").replace(b"/rerank", b"/health"), 405),
    (post(EXPECT, b"Transfer-Encoding: gzip"), 501),
    (post(EXPECT), 411),
])  # fmt: skip
def test_a_body_that_would_be_refused_is_not_asked_for(wire: Wire, data: bytes, status: int) -> None:
    wire.send(data)
    answer = wire.answer()
    assert (answer.status, answer.says_close) == (status, True)
    assert wire.ends()


def test_no_go_on_is_sent_where_nothing_is_to_come(wire: Wire) -> None:
    wire.send(HEALTH.replace(b"Host: a", b"Host: a\r\n" + EXPECT))
    assert wire.answer().status == 200
    wire.send(GOOD.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: a", EXPECT))
    assert wire.answer().status == 200


# -- Slow and silent clients, and bounds ------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "beginning"), [
    ({"header_timeout_s": 1}, b"GET /health HTT"),
    ({"header_timeout_s": 1}, b"GET /health HTTP/1.1\r\nX: "),
    ({"body_timeout_s": 1}, post(b"Content-Length: 1000", body=b"{")),
    ({"body_timeout_s": 1}, chunked(BODY)[:-5]),
    ({"body_timeout_s": 1}, chunked(BODY, end=b"0\r\nX: ")),
])  # fmt: skip
def test_a_request_that_drips_is_given_up_however_steadily(changes: dict[str, Any], beginning: bytes) -> None:
    """A time-out for each read alone would wait for as long as a byte comes now and then."""
    fixture = Running(**changes)
    wire = Wire(fixture.port)
    wire.send(beginning)
    started = time.monotonic()
    answers: list[Answer] = []
    reader = threading.Thread(target=lambda: answers.append(wire.answer()))
    reader.start()
    while reader.is_alive() and time.monotonic() < started + 15:
        with contextlib.suppress(OSError):
            wire.send(b"1")
        time.sleep(0.1)
    reader.join(1)
    assert (answers[0].status, answers[0].says_close) == (408, True)
    wire.close()
    fixture.close()


def test_a_large_body_may_take_longer_than_a_small_one() -> None:
    fixture = Running(body_timeout_s=1)
    wire = Wire(fixture.port)
    body = BODY + b" " * 60_000
    wire.send(post(b"Content-Length: %d" % len(body)))
    for start in range(0, len(body), 20_000):
        wire.send(body[start : start + 20_000])
        time.sleep(0.6)
    assert wire.answer().status == 200
    wire.close()
    fixture.close()


@pytest.mark.parametrize("first", [b"", HEALTH])
def test_a_silent_connection_is_closed_without_a_word(first: bytes) -> None:
    fixture = Running(header_timeout_s=1, keep_alive_s=1)
    wire = Wire(fixture.port)
    if first:
        wire.send(first)
        assert wire.answer().status == 200
    assert wire.ends()
    wire.close()
    fixture.close()


def test_a_client_is_told_for_how_long_its_connection_is_kept(running: Running, wire: Wire) -> None:
    """Would break: a proxy sends its next request on a connection that the server is just closing."""
    assert server.Settings().keep_alive_s > 90, "common proxies drop idle connections after 60 s, Go's after 90"
    for request in (HEALTH, GOOD, NOTHING):
        wire.send(request)
        answer = wire.answer()
        expected = f"timeout={running.server.settings.keep_alive_s}"
        assert (answer.headers["connection"], answer.headers["keep-alive"]) == ("keep-alive", expected)
    wire.send(HEALTH.replace(b"Host: a", b"Host: a\r\nConnection: close"))
    assert "keep-alive" not in wire.answer().headers


def test_300_slow_or_silent_connections_leave_the_others_as_they_were(running: Running) -> None:
    beginnings = [b"", b"GET /health HT", post(b"Content-Length: 1000", body=b"{"), chunked(BODY)[:-3]]
    slow = [Wire(running.port) for _ in range(N_SLOW)]
    for index, wire in enumerate(slow):
        wire.send(beginnings[index % len(beginnings)])
    others = [Wire(running.port) for _ in range(8)]
    for _ in range(25):
        for wire in others:
            wire.send(GOOD)
        assert [wire.answer().status for wire in others] == [200] * len(others)
    for wire in slow[3::4]:
        wire.send(chunked(BODY)[-3:])  # one who is only slow is answered in the end
    assert {wire.answer().status for wire in slow[3::4]} == {200}
    for wire in (*slow, *others):
        wire.close()


def test_a_client_that_does_not_read_its_answers_holds_up_nobody(running: Running) -> None:
    rude = Wire(running.port, wait_s=3)
    page = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
    with contextlib.suppress(TimeoutError):
        rude.send(page * 10_000)
    assert is_alive(running)
    rude.close()
    assert is_alive(running)


def test_connections_beyond_the_bound_wait_until_one_has_ended() -> None:
    fixture = Running(max_connections=4)
    busy = [Wire(fixture.port) for _ in range(4)]
    for wire in busy:
        wire.send(GOOD[:-1])  # at work: each has begun a request
    wait_for(lambda: fixture.server._open == 4 and fixture.server.bodies._taken >= 4 and not fixture.server._idle)
    late = [Wire(fixture.port) for _ in range(100)]
    for wire in late:
        wire.send(HEALTH.replace(b"Host: a", b"Host: a\r\nConnection: close"))
    time.sleep(0.1)
    assert fixture.server._open == 4
    for wire in busy:
        wire.send(GOOD[-1:])
        assert wire.answer().status == 200
        wire.close()
    for wire in late:
        assert wire.answer().status == 200
        wire.close()
    assert is_alive(fixture)
    fixture.close()


def test_a_connection_that_becomes_idle_makes_room_for_one_that_waits() -> None:
    fixture = Running(max_connections=1)
    first = Wire(fixture.port)
    first.send(GOOD[:-1])
    wait_for(lambda: fixture.server.bodies._taken > 0)
    second = Wire(fixture.port)
    second.send(HEALTH)
    first.send(GOOD[-1:])
    assert (first.answer().status, second.answer().status) == (200, 200)
    assert first.ends()
    for wire in (first, second):
        wire.close()
    fixture.close()


def test_a_server_that_stops_does_not_wait_for_room() -> None:
    """Would break: a full server cannot be stopped, since the thread that accepts waits for a connection to end."""
    fixture = Running(max_connections=1)
    busy = Wire(fixture.port)
    busy.send(GOOD[:-1])
    wait_for(lambda: fixture.server.bodies._taken > 0)
    late = Wire(fixture.port)
    late.send(HEALTH)
    time.sleep(0.1)
    stopping = threading.Thread(target=fixture.close)
    stopping.start()
    assert late.answer().status == 200
    busy.send(GOOD[-1:])
    assert busy.answer().status == 200
    stopping.join(10)
    assert not stopping.is_alive()


def test_an_idle_connection_makes_room_for_a_new_one() -> None:
    fixture = Running(max_connections=4)
    idle = [Wire(fixture.port) for _ in range(4)]
    for wire in idle:
        wait_for(lambda: len(fixture.server._idle) == 4)
        wire.send(HEALTH)
        assert wire.answer().status == 200
    wait_for(lambda: len(fixture.server._idle) == 4)
    assert is_alive(fixture)
    assert idle[0].ends(), "the one that was idle for longest"
    idle[3].send(HEALTH)
    assert idle[3].answer().status == 200
    for wire in idle:
        wire.close()
    fixture.close()


@pytest.mark.parametrize("beginning", [b"P", b"GET /health HTTP/1.1\r\nX: ", b"\r\n"])
def test_a_connection_still_in_its_header_makes_room_for_a_new_one(beginning: bytes) -> None:
    """Would break: one byte on each of --max-connections keeps everybody else out for --header-timeout-s."""
    fixture = Running(max_connections=4, header_timeout_s=60)
    slow = [Wire(fixture.port) for _ in range(4)]
    for wire in slow:
        wire.send(beginning)
    wait_for(lambda: fixture.server._open == 4)
    time.sleep(0.3)
    for _ in range(10):
        assert is_alive(fixture)
    if beginning == b"P":
        answer = slow[0].answer()
        assert (answer.status, answer.says_close, answer.headers["retry-after"]) == (503, True, "1")
        assert slow[0].ends(), "the one that was there for longest"
    slow[3].send(HEALTH[len(b"GET") :] if beginning == b"P" else b"\r\n")
    for wire in slow:
        wire.close()
    fixture.close()


def test_a_connection_that_must_make_room_still_gets_the_answer_to_a_whole_request() -> None:
    fixture = Running(max_connections=1, header_timeout_s=60)
    for _ in range(20):
        first, second = Wire(fixture.port), Wire(fixture.port)
        first.send(GOOD)
        second.send(GOOD)
        statuses = set()
        for wire in (first, second):
            with contextlib.suppress(EOFError, ConnectionError):
                statuses.add(wire.answer().status)
            wire.close()
        wait_for(lambda: fixture.server._open == 0)
        assert 200 in statuses
        assert statuses <= {200, 503}
    fixture.close()


def test_bodies_in_memory_are_bounded_and_the_room_comes_back() -> None:
    fixture = Running(max_body_mb=1, max_bodies_mb=2)
    large = BODY + b" " * (1_000_000 - len(BODY))
    for _ in range(3):
        holding = [Wire(fixture.port) for _ in range(2)]
        for wire in holding:
            wire.send(with_length(large)[:-1])
        wait_for(lambda: fixture.server.bodies._taken >= 1_999_000)
        refused = Wire(fixture.port)
        refused.send(with_length(large))
        answer = refused.answer()
        assert (answer.status, answer.headers["retry-after"], answer.says_close) == (503, "1", True)
        holding[0].send(b" ")
        assert holding[0].answer().status == 200
        for wire in (*holding, refused):  # the second one hangs up with its body half sent
            wire.close()
        wait_for(lambda: fixture.server.bodies._taken == 0)
    assert is_alive(fixture)
    fixture.close()


def test_no_thread_is_left_when_clients_are_gone() -> None:
    before = threading.active_count()
    fixture = Running()
    wires = [Wire(fixture.port) for _ in range(50)]
    for wire, data in zip(wires, [b"", HEALTH, GOOD[:-3], b"\0", chunked(BODY)] * 10, strict=True):
        wire.send(data)
        wire.close()
    fixture.close()
    wait_for(lambda: threading.active_count() <= before)


# -- Keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# team a\nalpha-1\n\n  beta-2  \r\n#gamma-3\n")
    fixture = Running(api_key="sesame", api_key_file=file)
    yield fixture
    fixture.close()


@pytest.mark.parametrize(("header", "status"), [
    (b"Bearer sesame", 200), (b"Bearer alpha-1", 200), (b"bearer  beta-2 ", 200), (b"Bearer gamma-3", 401),
    (b"Bearer #gamma-3", 401), (b"Bearer ", 401), (b"Bearer", 401), (b"alpha-1", 401), (b"Basic alpha-1", 401),
    (b"Bearer alpha-1 x", 401), (b"Bearer ALPHA-1", 401), (b"Bearer \xe9", 401), (b"Bearer sesame, Bearer sesame", 401),
])  # fmt: skip
def test_each_key_of_the_file_opens_and_nothing_else(locked: Running, header: bytes, status: int) -> None:
    wire = Wire(locked.port)
    wire.send(GOOD.replace(b"Host: a", b"Host: a\r\nAuthorization: " + header))
    answer = wire.answer()
    assert (answer.status, answer.says_close) == (status, False)
    assert ("www-authenticate" in answer.headers) is (status == 401)
    wire.close()


def test_health_needs_no_key_and_everything_else_does(locked: Running) -> None:
    for path, methods in locked.server.application.routes.items():
        for method in methods:
            wire = Wire(locked.port)
            wire.send(b"%b %b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}" % (method.encode(), path.encode()))
            assert (wire.answer().status != 401) is (path in server.OPEN_ENDPOINTS), path
            wire.close()


@pytest.mark.parametrize("head", [
    post(b"Content-Length: 30000000"), post(EXPECT, b"Content-Length: 3"), post(EXPECT, b"Transfer-Encoding: chunked"),
])  # fmt: skip
def test_a_large_or_announced_body_is_not_read_from_a_client_without_a_key(locked: Running, head: bytes) -> None:
    wire = Wire(locked.port)
    wire.send(head)
    answer = wire.answer()
    assert (answer.status, answer.says_close) == (401, True)
    assert wire.ends()
    wire.close()


@pytest.mark.parametrize("path", [b"/rerank", b"/health"])
def test_chunks_without_a_key_take_no_room_from_those_who_have_one(path: bytes) -> None:
    """Would break: anybody fills the room for bodies, and every client with a key gets 503."""
    fixture = Running(api_key="sesame", max_body_mb=1, max_bodies_mb=1)
    method = b"GET" if path == b"/health" else b"POST"
    begun = b"%b %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % (method, path)
    rude = [Wire(fixture.port) for _ in range(3)]
    for wire in rude:
        with contextlib.suppress(ConnectionError):
            wire.send(begun + b"e0000\r\n" + b" " * 0xE0000)
    time.sleep(0.3)
    large = BODY + b" " * 200_000
    wire = Wire(fixture.port)
    wire.send(with_length(large).replace(b"Host: a", b"Host: a\r\nAuthorization: Bearer sesame"))
    assert wire.answer().status == 200
    assert fixture.server.bodies._taken == 0
    refusal = rude[0].answer()
    assert (refusal.status, refusal.says_close) == (401, True)
    for one in (*rude, wire):
        one.close()
    fixture.close()


def test_a_body_without_a_key_is_not_counted() -> None:
    fixture = Running(api_key="sesame")
    wire = Wire(fixture.port)
    wire.send(post(b"Content-Length: %d" % len(BODY), body=BODY[:-1]))
    for _ in range(30):
        assert fixture.server.bodies._taken == 0
        time.sleep(0.01)
    wire.send(BODY[-1:])
    answer = wire.answer()
    assert (answer.status, answer.says_close) == (401, False)
    wire.close()
    fixture.close()


@pytest.mark.parametrize(("content", "words"), [
    (b"", "holds no key"), (b"# only a comment\n\n", "holds no key"), (b"good\ntwo words\n", "line 2"),
    ("schlüssel\n".encode(), "line 1"), (b"\xff\n", "cannot be read"),
])  # fmt: skip
def test_a_key_file_that_cannot_be_used_is_refused_at_start(tmp_path: Path, content: bytes, words: str) -> None:
    """An empty one would leave the server open."""
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(server.SettingsError, match=words) as caught:
        Running(api_key_file=file)
    assert str(file) in str(caught.value)
    for name in ("good", "words", "schl"):
        assert name not in str(caught.value).replace(str(file), ""), "a key must not be printed"


@pytest.mark.parametrize(("changes", "words"), [
    ({"api_key_file": Path("nowhere")}, "--api-key-file: there is no file nowhere"),
    ({"api_key": "two words"}, "--api-key: a key holds"),
    ({"tls_cert": Path(__file__)}, "--tls-cert and --tls-key go together"),
    ({"tls_key": Path(__file__)}, "--tls-cert and --tls-key go together"),
    ({"tls_cert": Path("nowhere"), "tls_key": Path(__file__)}, "--tls-cert: there is no file nowhere"),
    ({"tls_cert": Path(__file__), "tls_key": Path(__file__)}, "no PEM certificate"),
    ({"cors_origins": "https://a.example/"}, "'https://a.example/' is no origin"),
    ({"cors_origins": "a.example"}, "'a.example' is no origin"),
    ({"cors_origins": "https://a.example, null"}, "'null' is no origin"),
    ({"max_body_mb": 300}, "--max-bodies-mb must have room"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused_at_start(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(server.SettingsError) as caught:
        Running(**changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# -- Pages of other origins -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    fixture = Running(cors_origins="https://a.example, http://localhost:3000", api_key="sesame")
    yield fixture
    fixture.close()


def from_page(shared: Running, data: bytes, origin: bytes, *headers: bytes) -> Answer:
    wire = Wire(shared.port)
    wire.send(data.replace(b"Host: a", b"\r\n".join([b"Host: a", b"Origin: " + origin, *headers])))
    answer = wire.answer()
    wire.close()
    return answer


@pytest.mark.parametrize("origin", [b"https://a.example", b"http://localhost:3000"])
def test_a_page_of_an_allowed_origin_may_ask_and_read_the_answer(shared: Running, origin: bytes) -> None:
    preflight = from_page(
        shared, b"OPTIONS /rerank HTTP/1.1\r\nHost: a\r\n\r\n", origin,
        b"Access-Control-Request-Method: POST", b"Access-Control-Request-Headers: authorization,content-type",
    )  # fmt: skip
    assert preflight.status == 204, "a preflight carries no key"
    assert preflight.headers["access-control-allow-origin"] == origin.decode()
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    answer = from_page(shared, GOOD, origin, b"Authorization: Bearer sesame")
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == origin.decode()
    assert "X-Rerank-Model" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"
    refusal = from_page(shared, GOOD, origin)
    assert (refusal.status, refusal.headers["access-control-allow-origin"]) == (401, origin.decode())


def test_a_page_of_an_allowed_origin_may_ask_a_server_in_a_private_network(shared: Running) -> None:
    """Private network access: a browser asks before a public page may reach this machine."""
    ask, options = b"Access-Control-Request-Private-Network: true", b"OPTIONS /rerank HTTP/1.1\r\nHost: a\r\n\r\n"
    allowed = from_page(shared, options, b"https://a.example", ask)
    assert allowed.headers["access-control-allow-private-network"] == "true"
    name = "access-control-allow-private-network"
    assert name not in from_page(shared, options, b"https://b.example", ask).headers
    assert name not in from_page(shared, options, b"https://a.example").headers
    assert name not in from_page(shared, GOOD, b"https://a.example", ask).headers


@pytest.mark.parametrize("origin", [
    b"https://b.example", b"http://a.example", b"https://a.example.b.example", b"https://a.example:8443", b"null", b"*",
])  # fmt: skip
def test_a_page_of_another_origin_is_not_told_that_it_may(shared: Running, origin: bytes) -> None:
    for data in (GOOD, b"OPTIONS /rerank HTTP/1.1\r\nHost: a\r\n\r\n"):
        answer = from_page(shared, data, origin, b"Authorization: Bearer sesame")
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["vary"] == "Origin", "a cache must not give this answer to an allowed origin"


def test_no_page_is_allowed_unless_the_setting_says_so(running: Running) -> None:
    answer = from_page(running, GOOD, b"https://a.example")
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


def test_a_star_allows_every_origin() -> None:
    fixture = Running(cors_origins="*")
    assert from_page(fixture, GOOD, b"https://b.example").headers["access-control-allow-origin"] == "https://b.example"
    fixture.close()


# -- TLS --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    certificate: Path
    key: Path

    @property
    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificate)


def make_certificate(folder: Path, password: bytes | None = None) -> Certificate:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False).sign(key, hashes.SHA256())
    )  # fmt: skip
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encryption: Any = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    made.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
    return made


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure(certificate: Certificate) -> Iterator[Running]:
    fixture = Running(tls_cert=certificate.certificate, tls_key=certificate.key, max_body_mb=1, header_timeout_s=5)
    yield fixture
    fixture.close()


def test_requests_are_answered_over_tls(secure: Running, certificate: Certificate) -> None:
    wire = Wire(secure.port, certificate.trusting)
    large = BODY + b" " * 900_000
    for data in (GOOD, chunked(BODY), with_length(large), GOOD + GOOD):
        wire.send(data)
        assert wire.answer().status == 200
    assert wire.answer().status == 200
    wire.send(NOTHING.replace(b"Host: a", b"Host: a\r\nConnection: close"))
    assert wire.answer().status == 404
    assert wire.ends(), "closed with TLS's own goodbye: a cut would raise here"
    wire.close()


def test_malformed_requests_over_tls_are_refused(secure: Running, certificate: Certificate) -> None:
    for name in ("bare LF everywhere", "length with chunked", "a body over the limit", "an endless header"):
        data, status, _ = REFUSED[name]
        wire = Wire(secure.port, certificate.trusting)
        wire.send(data)
        answer = wire.answer()
        assert (answer.status, answer.says_close) == (status, True), name
        wire.close()


def test_clients_that_do_not_finish_the_handshake_hold_up_nobody(secure: Running, certificate: Certificate) -> None:
    silent = [Wire(secure.port) for _ in range(50)]
    for wire in silent[::2]:
        wire.send(b"\x16\x03\x01\x02\x00")
    plain = Wire(secure.port)
    plain.send(HEALTH)
    with contextlib.suppress(ConnectionError):  # plain HTTP is no handshake
        assert b"HTTP" not in plain._socket.recv(100)
    wire = Wire(secure.port, certificate.trusting)
    wire.send(GOOD)
    assert wire.answer().status == 200
    for one in (*silent, plain, wire):
        one.close()


def test_old_tls_is_refused(secure: Running, certificate: Certificate) -> None:
    context = certificate.trusting
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Wire(secure.port, context)
    assert secure.server.tls_context is not None


def test_an_idle_tls_connection_does_not_hold_up_the_stop(certificate: Certificate) -> None:
    fixture = Running(tls_cert=certificate.certificate, tls_key=certificate.key, header_timeout_s=60)
    idle, silent = Wire(fixture.port, certificate.trusting), Wire(fixture.port)
    idle.send(HEALTH)
    assert idle.answer().status == 200
    stopped: list[bool] = []
    waiter = threading.Thread(target=lambda: stopped.append(fixture.server.drain(20)))
    waiter.start()
    assert idle.ends()
    idle.close()
    waiter.join(20)
    assert stopped == [True]
    silent.close()
    for role in fixture.local:
        role.close()


def test_a_key_that_does_not_fit_or_is_encrypted_is_refused_at_start(certificate: Certificate, tmp_path: Path) -> None:
    """Without asking for a password on the terminal, which a service does not have."""
    locked = make_certificate(tmp_path, b"secret")
    (tmp_path / "other").mkdir()
    other = make_certificate(tmp_path / "other")
    for cert, key in ((locked.certificate, locked.key), (certificate.certificate, other.key)):
        with pytest.raises(server.SettingsError, match="no PEM certificate with its unencrypted key"):
            Running(tls_cert=cert, tls_key=key)
