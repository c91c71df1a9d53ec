"""Damaged HTTP over raw sockets, against a server in this process with a fake engine; tests/test_fuzz.py runs some.

`python tests/fuzz_http.py --seconds 600 --seed 1` runs for longer, and prints JSON lines with the counts. Each try is a
connection: some good requests, then damaged ones, in pieces, and the end of the stream. The good ones must be answered
as ever, no answer may be a failure, and nothing may follow an answer that says close. The same data is also read by
the server's RerankHandler alone and by h11, another reader of HTTP: each request that the server sees, h11 must see,
too, with the same body, or requests could be smuggled past a proxy. h11 sees more, as it forgives some of what the
server refuses.

A try that breaks a rule is printed with its seed and number, which repeat it: tries do not depend on each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import h11
from test_http import Running
from test_http_hostile import BODY, GOOD, HEALTH, NOTHING, Answer, Wire, chunked, post, with_length

import rerank_server as server

EXPECTING = GOOD.replace(b"Host: a", b"Host: a\r\nExpect: 100-continue")
ABSOLUTE = GOOD.replace(b"/rerank", b"http://example.com/rerank?a=b")
EXPECTED = {GOOD: 200, HEALTH: 200, NOTHING: 404, chunked(BODY): 200, EXPECTING: 200, ABSOLUTE: 200,
            with_length(b"{}"): 400, chunked(b"[", b"]"): 400}  # fmt: skip
ALLOWED = {200, 204, 400, 404, 405, 411, 413, 414, 417, 431, 501, 505}  # no other 5xx, and no 408 or 503 here either
PIECES = [
    b"\r", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"\x7f", b"\xff", b"\x0b",
    b"0", b"-", b"+", b"0x", b"ffffffffffffffff", b"9" * 30, b"A" * 9000, b"X: y\r\n" * 120, b"HTTP/1.1", b"HTTP/2.0",
    b"Content-Length: 5\r\n", b"Content-Length: 33\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n", b"Transfer-Encoding:\x0bchunked\r\n", b"Transfer-Encoding : chunked\r\n",
    b" folded\r\n", b"Host: b\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Expect: x\r\n",
    b"Expect: 100-continue\r\n", b"0\r\n\r\n", b"5\r\nabcde\r\n", b"1;a=b\r\n", b"GET /health HTTP/1.1\r\n",
    b"OPTIONS * HTTP/1.1\r\n", b"NaN", b"1e999", b'"', b"{", b"[" * 3000, b"\\ud800", b'"query": 1,', b"%00",
    b"Authorization: Bearer x\r\n",
]  # fmt: skip
HEADERS = [
    b"Content-Length: 33", b"Content-Length: 0", b"Content-Length: 34", b"Content-Length: 33, 33", b"Content-Length:",
    b"content-length:33", b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked", b"Transfer-Encoding: x,chunked",
    b"Host: b", b"Connection: close", b"Expect: 100-continue", b"X: \xe9", b"X:", b"X : a", b"X: a\r\n b", b"Accept: *",
]  # fmt: skip


def damage(data: bytearray, generator: random.Random) -> None:
    place, end = generator.randrange(len(data) + 1), generator.randrange(1, 30)
    kind = generator.choice(["flip", "insert", "insert", "insert", "remove", "repeat", "cut", "replace"])
    if kind == "flip" and place < len(data):
        data[place] ^= 1 << generator.randrange(8)
    elif kind == "insert":
        data[place:place] = generator.choice(PIECES)
    elif kind == "replace":
        data[place : place + end] = generator.choice(PIECES)
    elif kind == "remove":
        del data[place : place + end]
    elif kind == "repeat":
        data[place:place] = data[place : place + end]
    elif kind == "cut":
        del data[place:]


def assemble(generator: random.Random) -> bytearray:
    """A request of lines that are each good or bad by themselves, with a body that fits or not."""
    headers = generator.choices(HEADERS, k=generator.randrange(4))
    body = generator.choice([b"", BODY, b"21\r\n" + BODY + b"\r\n0\r\n\r\n", b"0\r\n\r\n"])
    return bytearray(post(*headers, body=body))


def make(generator: random.Random) -> tuple[list[int], bytes]:
    """(statuses of the good requests that come first, everything that is sent)."""
    good = generator.choices(list(EXPECTED), k=generator.choice([0, 0, 1, 2, 5]))
    bad = bytearray()
    for _ in range(generator.choice([0, 1, 1, 1, 2])):
        one = assemble(generator) if generator.random() < 0.3 else bytearray(generator.choice(list(EXPECTED)))
        for _ in range(generator.choice([0, 1, 1, 2, 4])):
            damage(one, generator)
        bad += one
    return [EXPECTED[one] for one in good], b"".join(good) + bad


def exchange(port: int, n_good: int, data: bytes, generator: random.Random) -> list[Answer]:
    """What is answered until the server closes. The rest of the data is sent meanwhile; its end is told when the good
    requests are answered, since a client that has ended its sending counts as gone."""
    wire = Wire(port)
    pieces = generator.choice([1, 1, 1, 3, 10])
    step = len(data) // pieces + 1
    are_answered = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            for start in range(0, len(data), step):
                wire.send(data[start : start + step])
            are_answered.wait(20)
            wire.half_close()

    sender = threading.Thread(target=send)
    sender.start()
    answers: list[Answer] = []
    try:
        while not answers or not answers[-1].says_close:
            if sum(answer.status != 100 for answer in answers) >= n_good:
                are_answered.set()
            answers.append(wire.answer())
    except EOFError:
        pass
    are_answered.set()
    assert wire.ends(), "something follows an answer that says close"
    sender.join()
    wire.close()
    return [answer for answer in answers if answer.status != 100]


def hang_up(port: int, data: bytes, generator: random.Random) -> None:
    """A client that is gone in the middle."""
    with socket.create_connection(("127.0.0.1", port)) as connection, contextlib.suppress(OSError):
        connection.sendall(data[: generator.randrange(len(data) + 1)])


Seen = list[tuple[bytes, bytes]]  # (method, body) of each request


class Recorder(server.RerankHandler):
    """Takes every path and method, and notes what it reads."""

    disable_nagle_algorithm = False  # a socket pair is no TCP

    seen: Seen

    def _handler(self) -> server.Handler:
        return self._note

    def _note(self, raw: bytes, call: server.Call) -> server.Response:
        self.seen.append((self.command.encode(), raw))
        if self.request_version == "HTTP/1.0":  # h11 keeps no connection of HTTP/1.0
            self.close_connection = True
        return server.Response(204, None)


def seen_by_us(running: Running, data: bytes) -> Seen:
    ours, theirs = socket.socketpair()

    def send() -> None:
        with contextlib.suppress(OSError):  # not all of it need be read
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    Recorder.seen = Seen()
    Recorder(ours, ("", 0), running.server)
    ours.close()
    sender.join()
    theirs.close()
    return Recorder.seen


def seen_by_h11(data: bytes) -> Seen:
    """Each request gets a reader of its own: h11 does not skip the empty line before a request line that a server
    should (RFC 9112, 2.2), so it is taken away here; exactly one, as the server does."""
    seen, rest = Seen(), data
    with contextlib.suppress(h11.RemoteProtocolError):
        while True:
            connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
            connection.receive_data(rest.removeprefix(b"\r\n"))
            connection.receive_data(b"")
            method, body = b"", b""
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.ConnectionClosed):
                    return seen
                if isinstance(event, h11.Request):
                    method = event.method
                elif isinstance(event, h11.Data):
                    body += event.data
            seen.append((method, body))
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is h11.MUST_CLOSE:
                return seen
            rest = connection.trailing_data[0]
    return seen


def compare(seed: int, seconds: float, n_tries: int | None = None, first: int = 0) -> Counter[str]:
    """Raises AssertionError for data in which we see a request that h11 does not."""
    logging.disable(logging.ERROR)
    running = Running(max_body_mb=1)
    counts, deadline, number = Counter[str](), time.monotonic() + seconds, first
    while time.monotonic() < deadline and (n_tries is None or number < first + n_tries):
        _, data = make(random.Random(f"{seed}/{number}"))
        ours, theirs = seen_by_us(running, data), seen_by_h11(data)
        assert ours == theirs[: len(ours)], f"seed {seed}, try {number}: {ours}, h11: {theirs}\n{data[:3000]!r}"
        counts.update({"streams": 1, "requests read by both": len(ours), "only by h11": len(theirs) - len(ours)})
        number += 1
    running.close()
    logging.disable(logging.NOTSET)
    return counts


def check(expected: list[int], data: bytes, answers: list[Answer]) -> None:
    """Raises AssertionError."""
    statuses = [answer.status for answer in answers]
    assert statuses[: len(expected)] == expected, f"the good requests were answered {statuses}"
    assert set(statuses) <= ALLOWED, statuses
    n_requests = data.count(b"HTTP/") + data.count(b"\n") + 1  # no request is shorter than a line
    assert len(statuses) <= n_requests, f"{len(statuses)} answers to at most {n_requests} requests"


def run(seed: int, seconds: float, n_tries: int | None = None, first: int = 0) -> Counter[str]:
    """Raises AssertionError that says which try of which seed broke a rule."""
    logging.disable(logging.ERROR)
    running, counts = Running(max_body_mb=1), Counter[str]()
    assert running.rerank({"query": "q", "passages": ["a"]})[0] == 200  # starts the engine's thread, too
    n_threads, deadline, number = threading.active_count(), time.monotonic() + seconds, first
    while time.monotonic() < deadline and (n_tries is None or number < first + n_tries):
        generator = random.Random(f"{seed}/{number}")
        expected, data = make(generator)
        try:
            if generator.random() < 0.1:
                hang_up(running.port, data, generator)
                counts["hang-ups"] += 1
            else:
                answers = exchange(running.port, len(expected), data, generator)
                check(expected, data, answers)
                counts.update(f"answers {answer.status}" for answer in answers)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"seed {seed}, try {number}: {error!r}\n{data[:3000]!r}") from error
        number += 1
    counts["connections"] = number - first
    deadline = time.monotonic() + 20
    while threading.active_count() > n_threads or running.server.bodies._taken:
        assert time.monotonic() < deadline, f"left over: {threading.enumerate()}, {running.server.bodies._taken} bytes"
        time.sleep(0.01)
    assert running.rerank({"query": "q", "passages": ["a"]})[0] == 200
    running.close()
    logging.disable(logging.NOTSET)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--try", type=int, dest="number", help="repeat this one")
    arguments = parser.parse_args()
    n_tries = None if arguments.number is None else 1
    for rule in (run, compare):
        counts = rule(arguments.seed, arguments.seconds / 2, n_tries, arguments.number or 0)
        print(json.dumps({"seed": arguments.seed, **dict(sorted(counts.items()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
