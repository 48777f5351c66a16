"""kvkeep serve beside llama-server: the time to the first token (TTFT) of the same chats, in turns, from the same GGUF file.

    servers.py KVKEEP LLAMA_SERVER

Each round starts both servers anew, with nothing cached: a chat is asked cold, the same chat goes on (warm), the server is stopped and
started again, and the chat is asked once more. Two threads each, temperature 0. Prints medians.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROUNDS, THREADS, CONTEXT_TOKENS = 3, 2, 4096
TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "disk.md").read_text()[:7800]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def demo_model(kvkeep: str) -> str:
    """Where the model of `kvkeep demo` is; fetched if it is not there yet."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kvkeep"
    if not list(cache.rglob("*.gguf")):
        subprocess.run([kvkeep, "demo", "comparison", "--requests", "2"], check=True, stdout=subprocess.DEVNULL)
    return str(next(cache.rglob("SmolLM2*.gguf")))


@contextlib.contextmanager
def running(command: list[str], port: int, log: pathlib.Path):
    with log.open("ab") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out)
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > until:
                        raise SystemExit(f"{command[0]} did not start:\n{log.read_text()[-2000:]}") from None
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def ask(port: int, messages: list[dict[str, str]]) -> tuple[float, str, int]:
    """Seconds to the first token, the answer, and the prompt's tokens."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 16, "stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("GET", "/v1/models")
    body["model"] = json.loads(connection.getresponse().read())["data"][0]["id"]
    began, first, answer, tokens = time.perf_counter(), 0.0, "", 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read().decode()[:500]}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                first = first or time.perf_counter() - began
                answer += text
        tokens = (event.get("usage") or {}).get("prompt_tokens", tokens)
    connection.close()
    return first, answer, tokens


def round_of(command: list[str], log: pathlib.Path, number: int) -> dict[str, float]:
    chat = [{"role": "system", "content": f"Document {number}.\n{TEXT}"}, {"role": "user", "content": "What is this text about?"}]
    times = {}
    with running(command, free_port(), log) as port:
        # The first request of a process also brings the weights into memory: a short one does that.
        ask(port, [{"role": "user", "content": "Hello"}])
        times["cold"], answer, times["tokens"] = ask(port, chat)
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "What happens when the disk is full?"}]
        times["warm"], answer, _ = ask(port, chat)
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And when it dies?"}]
    with running(command, free_port(), log) as port:
        ask(port, [{"role": "user", "content": "Hello"}])
        times["after a restart"], _, _ = ask(port, chat)
    return times


def main() -> None:
    kvkeep, llama = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as home:
        folder = pathlib.Path(home)
        model = demo_model(kvkeep)
        names = {"kvkeep serve": [], "llama-server": []}
        for number in range(ROUNDS):
            commands = {
                "kvkeep serve": [kvkeep, "serve", f"--model={model}", f"--disk={folder / str(number)}", f"--threads={THREADS}", f"--context-tokens={CONTEXT_TOKENS}"],
                "llama-server": [llama, "-m", model, "-t", str(THREADS), "-tb", str(THREADS), "-c", str(CONTEXT_TOKENS), "-np", "1", "--cache-ram", "1024"],
            }
            for name, command in list(commands.items())[:: 1 if number % 2 else -1]:
                names[name].append(round_of(command, folder / f"{name}.log", number))
        print(f"\nTTFT in ms, {names['kvkeep serve'][0]['tokens']} tokens at first, medians of {ROUNDS}, in turns")
        print("| | cold | warm | after a restart |\n|---|---|---|---|")
        for name, rounds in names.items():
            print(f"| {name} | " + " | ".join(f"{1e3 * statistics.median(r[kind] for r in rounds):,.0f}" for kind in ("cold", "warm", "after a restart")) + " |")


if __name__ == "__main__":
    main()
