#!/usr/bin/env python3
"""Many clients at once: nothing but answers and "come back later", bounded memory, an operator who still sees.

Usage: load.py BINARY [SECONDS [CLIENTS]]   (60 s, 32 clients)

Clients share some system prompts, ask whole and as streams, and one in ten leaves early. Meanwhile /metrics is asked ten times
a second. Prints what was checked and `N passed, N failed`.
"""
import collections
import http.client
import json
import multiprocessing
import random
import sys
import threading
import time

from serving import Checks, Server, rss_bytes

CONTEXT_TOKENS, PARALLEL, RAM_MB = 2048, 4, 256
# Model, buffers and queues: what a server that has answered one request takes, with room for the arena to fill.
GROWTH_MB = 96
# Compute threads and clients take all cores, and tests run beside other work. docs/benchmarks.md has what was measured alone.
METRICS_P99_MS = 100
SYSTEMS = [f"You are assistant number {n}. " + "You answer politely, briefly and truthfully, and say so if you do not know. " * (4 + 12 * n) for n in range(6)]


class Client(threading.Thread):
    def __init__(self, server, number, until):
        super().__init__(daemon=True)
        self.server, self.until, self.random = server, until, random.Random(number)
        self.outcomes, self.errors, self.ttft, self.cached = collections.Counter(), [], [], [0, 0]

    def run(self):
        while time.monotonic() < self.until:
            try:
                self.ask()
            except Exception as error:  # Whatever it is, it is what this test looks for.
                self.errors.append(repr(error))

    def ask(self):
        draw = self.random
        stream = draw.random() < 0.5
        body = {
            "messages": [{"role": "system", "content": draw.choice(SYSTEMS)}, {"role": "user", "content": f"Tell me about the number {draw.randrange(50)}."}],
            "max_tokens": draw.randrange(4, 40),
            "stream": stream,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            if draw.random() < 0.1:
                time.sleep(draw.random())
                self.outcomes["left"] += 1
                return
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        self.outcomes[response.status] += 1
        if response.status == 429:
            time.sleep(min(int(response.headers["Retry-After"]), 2))
            return
        if response.status != 200:
            self.errors.append(f"{response.status} {text[:200]}")
            return
        lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        if stream and lines[-1] != "[DONE]":
            self.errors.append(f"a stream that ends with {lines[-1][:200]}")
            return
        answer = json.loads(lines[-2] if stream else text)
        self.ttft.append(answer["kvkeep"]["ttft_ms"])
        self.cached[0] += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.cached[1] += answer["usage"]["prompt_tokens"]


def percentile(values, percent):
    values = sorted(values)
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else 0.0


def watch(pid, port, until):
    """Times of /metrics, and memory, until then."""
    times, memory = [], []
    while time.monotonic() < until:
        begin = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        connection.getresponse().read()
        connection.close()
        times.append((time.monotonic() - begin) * 1e3)
        memory.append(rss_bytes(pid) / 2**20)
        time.sleep(0.1)
    return times, memory


def main():
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    checks = Checks()
    flags = [f"--context-tokens={CONTEXT_TOKENS}", f"--parallel={PARALLEL}", f"--ram-gib={RAM_MB / 1024}", "--queue=20"]
    with Server(sys.argv[1], *flags) as server:
        before = server.rss_bytes() / 2**20
        until = time.monotonic() + seconds
        clients = [Client(server, number, until) for number in range(count)]
        # A process of its own: in this one it would wait for the clients' threads.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            watched = pool.apply_async(watch, (server.process.pid, server.port, until))
            for client in clients:
                client.start()
            times, memory = watched.get(seconds + 60)
        for client in clients:
            client.join(150)
        outcomes = sum((client.outcomes for client in clients), collections.Counter())
        errors = [error for client in clients for error in client.errors]
        ttft = [one for client in clients for one in client.ttft]
        cached, tokens = (sum(client.cached[n] for client in clients) for n in (0, 1))
        checks.check("load: answers, and otherwise only 429", not errors and outcomes[200] > 0, errors[:3] or dict(outcomes))
        checks.check("load: every client has ended", not any(client.is_alive() for client in clients), count)
        checks.check("load: most prompt tokens come from the cache", cached > 0.5 * tokens, f"{100 * cached / max(1, tokens):.1f}%")
        buffers = PARALLEL * CONTEXT_TOKENS * 36 / 1024
        bound = before + RAM_MB + buffers + GROWTH_MB
        checks.check("load: memory is bounded", max(memory) < bound, f"{max(memory):.0f} MiB, started with {before:.0f}, bound {bound:.0f}")
        p99 = percentile(times, 99)
        checks.check(f"load: p99 of /metrics is under {METRICS_P99_MS} ms", p99 < METRICS_P99_MS, f"p50 {percentile(times, 50):.1f} ms, p99 {p99:.1f} ms of {len(times)}")
        stats = json.loads(server.get("/cache/stats"))["requests"]
        counted = stats["served"] + stats["cancelled"]
        checks.check("load: nothing is left under way", stats["running"] == stats["queued"] == 0 and stats["failed"] == 0, stats)
        checks.check("load: every answer was counted", counted >= outcomes[200], counted)
        code = server.stop()
        panics = [line for line in server.log if "panicked" in line]
        checks.check("load: it ends as it should", code == 0 and not panics, panics[:1] or code)
        print(f"TTFT p50 {percentile(ttft, 50):.0f} ms, p99 {percentile(ttft, 99):.0f} ms; {len(ttft) / seconds:.1f} answers/s")
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
