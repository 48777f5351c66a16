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


def figures(server):
    """What /metrics says of the remote tier, by name."""
    found, names = {}, set()
    for line in server.get("/metrics").splitlines():
        if line.startswith("kvkeep_tier_") and 'tier="ram"' not in line and "kind=" not in line:
            name, rest = line.removeprefix("kvkeep_tier_").split("{", 1)
            names.add(rest.split('"')[1])
            found[name] = float(rest.rsplit(" ", 1)[1])
    return found, names


def wait_for(server, blocks, at_most_s=60):
    """Until so many blocks lie in the store."""
    end = time.monotonic() + at_most_s
    while time.monotonic() < end:
        told, _ = figures(server)
        if told["entries"] >= blocks and told["queued_bytes"] == 0:
            return
        time.sleep(0.05)


def shared(binary, url):
    name = url.split("://")[0]
    flags = [f"--remote={url}", f"--remote-prefix=e2e-{os.getpid()}", "--no-disk", "--block-tokens=64", "--remote-deadline-ms=500"]
    with Server(binary, *flags) as one:
        said, cold, tokens = ask(one)
        wait_for(one, tokens // 64)
        with Server(binary, *flags) as two:
            # It lists the store when it opens, or asks.
            again, warm, _ = ask(two)
            told, names = figures(two)
            checks.check(f"{name}: the answer is the same", said == again, repr(again))
            # All whole blocks but the one of the last token, which is computed.
            gave = {tier["name"]: tier["tokens"] for tier in warm["tiers"] if tier["name"] != "ram"}
            enough = sum(gave.values()) >= (tokens - 1) // 64 * 64
            checks.check(f"{name}: node B takes the prompt from the store", enough, f"{gave} of {tokens} tokens")
            checks.check(f"{name}: B has read it there", told["read_bytes_total"] > 0, f"{told['read_bytes_total'] / 1e6:.1f} MB")
            sooner = cold["ttft_ms"] / warm["ttft_ms"]
            checks.check(f"{name}: the first token on B comes sooner", sooner > 1, f"{cold['ttft_ms']:.1f} ms computed on A, {warm['ttft_ms']:.1f} ms on B: {sooner:.1f} times sooner")
            checks.check(f"{name}: metrics name the tier", names == {name}, names)


def main():
    binary, *urls = sys.argv[1:]
    for url in urls:
        shared(binary, url)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
