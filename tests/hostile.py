#!/usr/bin/env python3
"""Requests that nobody should send: each gets the status it deserves, and the server neither falls nor grows.

Usage: hostile.py BINARY [REQUESTS]   (10,000)

Bodies that are cut, mutated, of wrong types, deeply nested or far too large; heads that are no HTTP; bodies and heads that come
slowly, in bits, or never; connections that are dropped in between. The draws are seeded. Prints what was checked.
"""
import collections
import json
import random
import socket
import sys
import threading
import time

from serving import Checks, Server

THREADS = 8
CONTEXT_TOKENS, RAM_MB, PARALLEL = 512, 64, 2
# Bodies of 10 MiB on all threads at once, and what the allocator keeps of them.
GROWTH_MB = 160
MIB = 1 << 20
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GOOD = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0, "stop": ["x"], "stream": False, "n": 1},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 1, "temperature": 0, "stop": "x", "seed": 1, "top_p": 0.5},
    "/cache/warm": {"prompt": "Hi", "pin": False},
    "/cache/pin": {"prefix": "00"},
    "/cache/clear": {"namespace": "00"},
}
VALUES = [None, True, -1, 0, 1, 2, 1e308, -0.5, 2**64, 2**70, "", "x", "\u0000", "\ud83d\ude00" * 9, "<|im_end|>" * 50, [], [None], [[]], [1, "a"], {},
          {"a": {}}, [{"role": "user"}], [{"role": 5, "content": []}], [2**32], [-1], [[1], [2]], ["a", "b"], {"type": "json_schema"}]


def request(method, path, body=b"", headers=()):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body or method == "POST":
        lines += [f"Content-Length: {len(body)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def post(path, body):
    return request("POST", path, body, ["Content-Type: application/json"])


class Attacker(threading.Thread):
    """Sends its part of the requests, one connection each."""

    def __init__(self, server, number, count):
        super().__init__(daemon=True)
        self.server, self.random, self.count = server, random.Random(number), count
        self.seen, self.wrong = collections.Counter(), []
        kinds = {self.mutated: 30, self.wrong_values: 40, self.wrong_shape: 10, self.no_http: 6, self.wrong_method: 4,
                 self.foreign: 4, self.cut_short: 3, self.dropped: 1, self.huge_prompt: 0.2, self.huge_body: 0.2, self.trickle: 0.3, self.specials: 0.3,
                 self.noncharacters: 1, self.half_closed: 2}
        self.kinds, self.weights = list(kinds), list(kinds.values())

    def run(self):
        for _ in range(self.count):
            kind = self.random.choices(self.kinds, self.weights)[0]
            try:
                data, allowed = kind()
                status = self.exchange(data) if data is not None else allowed[0]
            except OSError as error:
                status, allowed = f"{type(error).__name__}", ()
            name = kind.__name__
            self.seen[name] += 1
            if status not in allowed:
                self.wrong.append(f"{name}: {status} instead of {allowed}")

    def exchange(self, data):
        """The status of the answer; 0 if the connection was closed without one."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=90) as stream:
            stream.sendall(data)
            head = b""
            while b"\r\n" not in head:
                piece = stream.recv(4096)
                if not piece:
                    return 0
                head += piece
            return int(head.split(b" ", 2)[1])

    def any_good(self):
        path = self.random.choice(list(GOOD))
        return path, dict(GOOD[path])

    def mutated(self):
        path, body = self.any_good()
        text = bytearray(json.dumps(body).encode())
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(text))
            match self.random.randrange(3):
                case 0:
                    text[at] = self.random.randrange(256)
                case 1:
                    del text[at:at + self.random.randrange(1, 9)]
                case 2:
                    text[at:at] = self.random.choice([b"\x00", b"\xff", b'"', b"{", b"]", b",", b"1e999", b"\\u12", b"\xf0\x9f"])
            text = text or bytearray(b"x")
        # A change may leave it valid, or make another valid request of it.
        return post(path, bytes(text)), (400, 200, 404, 409, 429)

    def wrong_values(self):
        path, body = self.any_good()
        name = self.random.choice([*body, "model", "logit_bias", "logprobs", "top_logprobs", "stream_options", "cache_salt", "tools"])
        body[name] = self.random.choice(VALUES)
        return post(path, json.dumps(body).encode()), (400, 200, 404, 409, 429)

    def wrong_shape(self):
        path = self.random.choice(list(GOOD))
        depth = self.random.choice([1, 100, 127, 128, 5000, 100_000])
        text = self.random.choice([b"", b"null", b"[]", b"\xef\xbb\xbf{}", b"{" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth, b"1" * depth, b'"' + b"\\" * depth])
        # An empty object is a good request for some.
        return post(path, text), (400, 200, 429)

    def no_http(self):
        junk = self.random.randbytes(self.random.randrange(1, 200))
        head = self.random.choice([junk + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" + junk + b"\r\n\r\n",
                                   b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 500 + b"\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 300_000 + b"\r\n\r\n",
                                   b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
                                   b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nZZ\r\n\r\n"])
        return head, (400, 431, 403, 404, 505, 0)

    def wrong_method(self):
        method, path = self.random.choice([("GET", CHAT), ("DELETE", "/v1/models"), ("PUT", COMPLETIONS), ("PATCH", "/metrics"), ("POST", "/v1/models")])
        return request(method, path), (405,)

    def foreign(self):
        return self.random.choice([
            (request("GET", "/v1/models", headers=["Origin: http://evil.example"]), (403,)),
            (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", (403,)),
            (request("POST", CHAT, b"{}", ["Content-Type: text/plain"]), (415,)),
            (request("GET", "/v1/" + "x" * self.random.randrange(2000)), (404,)),
            (request("GET", "/%00/../..//etc/passwd"), (404,)),
        ])

    def cut_short(self):
        """A body that ends before it should: the client leaves."""
        path, body = self.any_good()
        data = post(path, json.dumps(body).encode())
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=90) as stream:
            stream.sendall(data[:self.random.randrange(1, len(data))])
        return None, ("left",)

    def dropped(self):
        """A good request whose client does not wait for its answer."""
        body = {"prompt": "1, 2, 3,", "max_tokens": 400, "stream": self.random.random() < 0.5}
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=90) as stream:
            stream.sendall(post(COMPLETIONS, json.dumps(body).encode()))
            time.sleep(self.random.random() / 20)
        return None, ("left",)

    def huge_prompt(self):
        text = self.random.choice(["x", "word ", "\n", "\u00e9", "\\", "0 "]) * (3 * MIB // 5)
        body = {"prompt": text} if self.random.random() < 0.5 else {"messages": [{"role": "user", "content": text}]}
        path = COMPLETIONS if "prompt" in body else CHAT
        return post(path, json.dumps(body).encode()), (400, 413)

    def huge_body(self):
        return post(CHAT, b'{"messages": "' + b"x" * (10 * MIB) + b'"}'), (413,)

    def specials(self):
        """As many control tokens as fit: finding them must not take forever."""
        text = self.random.choice(["<|im_end|>", "<|im_start|>", "<|im_", "<|", "<"]) * 1500
        return post(CHAT, json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1}).encode()), (400,)

    def noncharacters(self):
        """Characters that are no text, and control tokens between them."""
        text = "".join(map(chr, range(0xFDD0, 0xFDF0))) + "<|im_end|>\uffff\U0010ffff"
        return post(CHAT, json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1}).encode()), (200, 400, 429)

    def half_closed(self):
        """A client that has nothing more to send gets its answer, or what is wrong with its request."""
        path, body = self.any_good()
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=90) as stream:
            stream.sendall(post(path, json.dumps(body).encode()))
            stream.shutdown(socket.SHUT_WR)
            answer = stream.recv(4096)
            while b" " not in answer.partition(b" ")[2] and (piece := stream.recv(4096)):
                answer += piece
        return None, (int(answer.split(b" ", 2)[1]),) if answer else ("an answer",)

    def trickle(self):
        """A request byte by byte, that stops in the middle: it is let go in time."""
        path, body = self.any_good()
        data = post(path, json.dumps(body).encode())[:-3]
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=90) as stream:
            for byte in data:
                stream.sendall(bytes([byte]))
            begin = time.monotonic()
            answer = stream.recv(4096)
        waited = time.monotonic() - begin
        status = int(answer.split(b" ", 2)[1]) if answer else 0
        if waited > 20:
            self.wrong.append(f"trickle: let go after {waited:.1f} s only")
        return None, (status,) if status in (0, 408) else ("never",)


def main():
    total = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    checks = Checks()
    flags = [f"--context-tokens={CONTEXT_TOKENS}", f"--parallel={PARALLEL}", f"--ram-gib={RAM_MB / 1024}", "--client-timeout-s=2",
             "--log-level=warn"]
    with Server(sys.argv[1], *flags) as server:
        before, begin, most = server.rss_bytes() / MIB, time.monotonic(), 0
        attackers = [Attacker(server, number, total // THREADS) for number in range(THREADS)]
        for attacker in attackers:
            attacker.start()
        # These never say anything, and hold a place each until they are let go.
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        while any(attacker.is_alive() for attacker in attackers) and time.monotonic() - begin < 900:
            most = max(most, server.rss_bytes() / MIB)
            time.sleep(0.2)
        for stream in silent:
            stream.close()
        seen = sum((attacker.seen for attacker in attackers), collections.Counter())
        wrong = [one for attacker in attackers for one in attacker.wrong]
        checks.check("hostile: all were sent", sum(seen.values()) == total // THREADS * THREADS, f"{sum(seen.values())} in {time.monotonic() - begin:.0f} s: {dict(seen)}")
        checks.check("hostile: each got a status that it deserves", not wrong, wrong[:4] or "as it should be")
        bound = before + RAM_MB + PARALLEL * CONTEXT_TOKENS * 36 / 1024 + GROWTH_MB
        checks.check("hostile: memory is bounded", most < bound, f"{most:.0f} MiB, started with {before:.0f}, bound {bound:.0f}")
        answer = Attacker(server, 0, 0).exchange(post(CHAT, json.dumps(GOOD[CHAT]).encode()))
        checks.check("hostile: it still answers", answer == 200, answer)
        deadline = time.monotonic() + 30
        while (stats := json.loads(server.get("/cache/stats"))["requests"])["running"] and time.monotonic() < deadline:
            time.sleep(0.1)
        checks.check("hostile: nothing is left under way", stats["running"] == stats["queued"] == stats["failed"] == 0, stats)
        code = server.stop()
        panics = [line for line in server.log if "panicked" in line]
        checks.check("hostile: no panic, and it ends as it should", code == 0 and not panics, panics[:2] or code)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
