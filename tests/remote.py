#!/usr/bin/env python3
"""Two servers that share a store: a prompt that one has computed is warm on the other, and the answer is the same.

Usage: remote.py BINARY URL...   Each URL is a store; what stores are told comes from the environment. Prints what was
checked and `N passed, N failed`.
"""
import http.client
import json
import os
import sys
import time

from serving import Checks, Server

SYSTEM = "You are the librarian of a small town. You know every book on your shelves, who wrote it and when. " * 24
checks = Checks()


def ask(server):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who wrote Faust?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 24}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    return answer["choices"][0]["message"]["content"], answer["kvkeep"], answer["usage"]["prompt_tokens"]


def tier(server):
    """The remote tier's figures."""
    tiers = json.loads(server.get("/cache/stats"))["tiers"]
    return next(tier for tier in tiers if tier["name"] != "ram")


def wait_for(server, what, at_most_s=30):
    end = time.monotonic() + at_most_s
    while not what(tier(server)) and time.monotonic() < end:
        time.sleep(0.05)


def shared(binary, url):
    name = url.split("://")[0]
    flags = [f"--remote={url}", f"--remote-prefix=e2e-{os.getpid()}", "--no-disk", "--block-tokens=64", "--remote-deadline-ms=500"]
    with Server(binary, *flags) as one:
        said, cold, tokens = ask(one)
        wait_for(one, lambda tier: tier["stored_total"] >= tokens // 64 and tier["queued_bytes"] == 0)
        written = tier(one)
        with Server(binary, *flags) as two:
            # It finds the address space of the store at its opening, or asks.
            again, warm, _ = ask(two)
            read = tier(two)
            checks.check(f"{name}: the answer is the same", said == again, repr(again))
            enough = warm["disk_tokens"] > 0.9 * tokens
            checks.check(f"{name}: node B takes the prompt from the store", enough, f"{warm['disk_tokens']} of {tokens} tokens")
            checks.check(f"{name}: what A wrote, B read", read["hits"] == written["stored_total"] > 0, f"{read['hits']} blocks, {read['read_bytes_total']} bytes")
            sooner = cold["ttft_ms"] / warm["ttft_ms"]
            checks.check(f"{name}: TTFT on B is shorter", sooner > 1, f"{cold['ttft_ms']:.1f} ms computed on A, {warm['ttft_ms']:.1f} ms on B: {sooner:.1f} times sooner")
            metrics = two.get("/metrics")
            checks.check(f"{name}: metrics name the tier", f'tier="{read["name"]}"' in metrics, read["name"])


def main():
    binary, *urls = sys.argv[1:]
    for url in urls:
        shared(binary, url)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
