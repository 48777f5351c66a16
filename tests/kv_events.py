#!/usr/bin/env python3
"""KV events of a real `kvkeep serve` and a real `kvkeep daemon`, read with vLLM's own classes, and the server's by Dynamo's indexer where that is installed.

Usage: kv_events.py BINARY   (with vLLM, pyzmq and msgspec; KVKEEP_DYNAMO_PYTHON names a Python with ai-dynamo-runtime)
"""
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import msgspec
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from serving import Checks, Server

TOPIC = "kv-events"
LONG_S = 60
SYSTEM = "You are the librarian of a small town. You know every book on your shelves, who wrote it, when, and why. " * 4
checks = Checks()
check = checks.check
decoder = msgspec.msgpack.Decoder(KVEventBatch)
context = zmq.Context()


class Held:
    """Which blocks are where, for whoever applies every event in its order."""

    def __init__(self):
        self.media, self.kinds, self.stored = {}, {}, []

    def apply(self, batch):
        for event in batch.events:
            self.kinds[type(event)] = self.kinds.get(type(event), 0) + 1
            if isinstance(event, BlockStored):
                self.stored.append(event)
                self.of(event.medium).update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.of(event.medium).difference_update(event.block_hashes)
            else:
                self.media.clear()

    def of(self, medium):
        return self.media.setdefault(medium, set())

    def filled(self):
        return {medium: blocks for medium, blocks in self.media.items() if blocks}


class Reader(Held):
    """Subscribes, and applies what comes."""

    def __init__(self, endpoint, topic=TOPIC):
        super().__init__()
        self.numbers, self.topics, self.lock, self.ends = [], set(), threading.Lock(), threading.Event()
        self.socket = context.socket(zmq.SUB)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.socket.connect(endpoint)
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        while not self.ends.is_set():
            if not self.socket.poll(50):
                continue
            topic, number, payload = self.socket.recv_multipart()
            with self.lock:
                self.topics.add(topic)
                self.numbers.append(int.from_bytes(number, "big"))
                self.apply(decoder.decode(payload))

    def until(self, condition):
        """Waits for what events bring about; says whether they did."""
        end = time.monotonic() + LONG_S
        while time.monotonic() < end:
            with self.lock:
                if condition(self):
                    return True
            time.sleep(0.02)
        return False

    def close(self):
        self.ends.set()
        self.thread.join()
        self.socket.close(linger=0)


def replay(endpoint, first):
    """What a reader is given that missed everything from this number on. vLLM's example asks with a REQ, which can take one answer only."""
    asking = context.socket(zmq.DEALER)
    asking.connect(endpoint)
    asking.send_multipart([b"", first.to_bytes(8, "big")])
    batches, ended = {}, False
    while not ended and asking.poll(LONG_S * 1000):
        _, _, number, payload = asking.recv_multipart()
        ended = number == ZmqEventPublisher.END_SEQ and not payload
        if not ended:
            batches[int.from_bytes(number, "big")] = decoder.decode(payload)
    asking.close(linger=0)
    return batches, ended


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def endpoints():
    return [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]


def flags(events, missed, *more):
    return ["--kv-events", events, "--kv-events-replay", missed, "--kv-events-topic", TOPIC, *more]


def chat(server, text, tokens=4):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body = {"messages": messages, "temperature": 0, "max_tokens": tokens}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(server.url + "/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def command(binary, server, *words):
    run = subprocess.run([binary, *words, "--url", server.url], capture_output=True, text=True, timeout=120)
    if run.returncode:
        raise RuntimeError(f"kvkeep {' '.join(words)}: {run.stderr}")
    return run.stdout


def connected(reader, server):
    """A subscriber hears nothing that was sent before it was known: until it hears something, it is not."""
    for number in range(50):
        chat(server, f"Say {number}.", 1)
        if reader.until(lambda held: held.stored) and reader.stored:
            return
    raise RuntimeError("nothing was published")


def stored_and_removed(binary):
    events, missed = endpoints()
    with Server(binary, *flags(events, missed, "--kv-events-tokens")) as server:
        reader = Reader(events)
        connected(reader, server)
        usage = chat(server, "Who wrote Faust?")["usage"]
        blocks = usage["prompt_tokens"] // 16
        both = reader.until(lambda held: len(held.of("CPU")) >= blocks and held.of("CPU") == held.of("STORAGE"))
        check("a chat's blocks are in RAM and on disk", both, {medium: len(held) for medium, held in reader.filled().items()})
        ram = [event for event in reader.stored if event.medium == "CPU"]
        sizes = all(event.block_size == 16 and len(event.token_ids) == 16 * len(event.block_hashes) for event in reader.stored)
        check("each block has its tokens", sizes, f"{sum(len(event.token_ids) for event in ram)} tokens in RAM")
        known = {block for event in reader.stored for block in event.block_hashes}
        parents = {event.parent_block_hash for event in ram}
        check("a block names the one before it", parents - {None} <= known and None in parents, f"{len(parents)} parents")
        check("the topic is the one that was asked for", reader.topics == {TOPIC.encode()}, reader.topics)
        tree = json.loads(command(binary, server, "prefixes", "--json"))["prefixes"]
        first = next(branch for branch in tree if branch["parent"] is None)
        check("a prefix is known by the last eight bytes of its hash", int(first["id"][-16:], 16) in reader.of("CPU"), first["id"])
        command(binary, server, "remove", first["id"], "--yes")
        gone = reader.until(lambda held: not held.filled())
        check("what is removed is told for every tier", gone and reader.kinds[BlockRemoved], reader.kinds.get(BlockRemoved))
        chat(server, "Who wrote Hamlet?")
        check("what is stored again is told again", reader.until(lambda held: held.of("CPU")), len(reader.of("CPU")))
        dynamo(reader, events, missed, server, binary)
        command(binary, server, "clear", "--yes")
        cleared = reader.until(lambda held: held.kinds.get(AllBlocksCleared) and not held.filled())
        check("clearing all is told as such", cleared, reader.kinds.get(AllBlocksCleared))
        replayed(reader, missed, server)
        reader.close()
        tier = [line for line in server.get("/metrics").splitlines() if line.startswith("kvkeep_kv_events_")]
        published = next(float(line.split()[1]) for line in tier if "published" in line)
        check("batches are counted", published == max(reader.numbers) + 1, tier)


def replayed(reader, missed, server):
    batches, ended = replay(missed, 0)
    last = max(reader.numbers)
    check("a reader misses nothing", reader.numbers == list(range(reader.numbers[0], last + 1)), f"{reader.numbers[0]} to {last}")
    check("a replay is whole and has an end", ended and sorted(batches)[:last + 1] == list(range(last + 1)), len(batches))
    late = Held()
    for number in sorted(batches):
        late.apply(batches[number])
    check("who comes late knows the same", late.filled() == reader.filled() and late.kinds[AllBlocksCleared], late.kinds[BlockStored])
    some, ended = replay(missed, last - 1)
    check("a replay begins where it is asked to", ended and min(some) == last - 1, sorted(some))
    none, ended = replay(missed, last + 1000)
    check("a replay of what was not missed is its end", ended and not none, ended)
    asking = context.socket(zmq.REQ)
    asking.connect(missed)
    asking.send(last.to_bytes(8, "big"))
    first = asking.recv_multipart() if asking.poll(LONG_S * 1000) else None
    check("a REQ is given the first of what it missed", first and first[:2] == [TOPIC.encode(), last.to_bytes(8, "big")], first and first[:2])
    asking.send(b"nonsense that is no number")
    chat(server, "Are you well?")
    check("nonsense harms nobody", replay(missed, 0)[1], "still answering")
    asking.close(linger=0)


def get(port, path, body=None):
    data, headers = None if body is None else json.dumps(body).encode(), {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers), timeout=10) as response:
        return json.load(response)


@contextlib.contextmanager
def indexer(python):
    port = free_port()
    options = ["--block-size", "16", "--threads", "1", "--port", str(port)]
    process = subprocess.Popen([python, "-m", "dynamo.indexer", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                get(port, "/workers")
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def dynamo(reader, events, missed, server, binary):
    """The indexer of Dynamo's router: which part of a prompt is where."""
    python = os.environ.get("KVKEEP_DYNAMO_PYTHON")
    if not python:
        print("left out: Dynamo's indexer (KVKEEP_DYNAMO_PYTHON is not set)")
        return
    with indexer(python) as port:
        worker = {"instance_id": 1, "endpoint": events, "replay_endpoint": missed, "model_name": "m", "block_size": 16}
        get(port, "/register", worker)
        usage = chat(server, "Who wrote the Odyssey, and in which language?")["usage"]
        whole = usage["prompt_tokens"] // 16 * 16
        reader.until(lambda held: held.of("CPU") == held.of("STORAGE"))
        prompt = longest(reader)

        def finds(tokens):
            found = get(port, "/query", {"token_ids": prompt, "model_name": "m"})["instances"].get("1", {})
            return found.get("longest_matched", 0) >= tokens if tokens else not found.get("longest_matched")

        found = waits(lambda: finds(whole))
        answer = get(port, "/query", {"token_ids": prompt, "model_name": "m"})["instances"]
        check("Dynamo's indexer finds the prompt", found, f"{answer.get('1')} of {whole} tokens")
        command(binary, server, "clear", "--yes")
        check("Dynamo's indexer forgets what was cleared", waits(lambda: finds(0)), "nothing is left")
        chat(server, "Who wrote Hamlet?")


def longest(reader):
    """The tokens of the newest chain in RAM, from its beginning on."""
    with reader.lock:
        chains = {}
        for event in reader.stored:
            tokens = chains.get(event.parent_block_hash, []) if event.parent_block_hash is not None else []
            for at, block in enumerate(event.block_hashes):
                tokens = tokens + event.token_ids[at * 16:at * 16 + 16]
                chains[block] = tokens
        newest = [event for event in reader.stored if event.medium == "CPU"][-1]
        return chains[newest.block_hashes[-1]]


def waits(condition):
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def evicted_and_restarted(binary):
    events, missed = endpoints()
    with Server(binary, *flags(events, missed, "--ram-gib=0.02")) as server:
        reader = Reader(events)
        connected(reader, server)
        for number in range(40):
            chat(server, f"{number}: tell me about a book, its author, its year, its country and its language. " * 3, 1)
            if reader.kinds.get(BlockRemoved):
                break
        evicted = reader.until(lambda held: held.of("STORAGE") - held.of("CPU"))
        check("what RAM evicts is still on disk", evicted, {medium: len(held) for medium, held in reader.filled().items()})
        check("without the word no tokens are published", not any(event.token_ids for event in reader.stored), len(reader.stored))
        on_disk = set(reader.of("STORAGE"))
        code = server.stop()
        check("the server ends well", code == 0, code)
        reader.close()
        again = server.disk.parent
        with Server(binary, *flags(events, missed), disk=again) as second:
            batches, ended = replay(missed, 0)
            held = Held()
            for number in sorted(batches):
                held.apply(batches[number])
            whole = ended and held.of("STORAGE") >= on_disk
            check("after a restart what the disk kept is told", whole, f"{len(held.of('STORAGE'))} blocks")
            check("of which nobody knows the tokens yet", all(event.block_size == 0 for event in held.stored), len(held.stored))
            second.stop()


@contextlib.contextmanager
def daemon(binary, socket_path, *words):
    process = subprocess.Popen([binary, "daemon", f"--socket={socket_path}", "--ram-gib=0.05", *words])
    try:
        if not waits(lambda: pathlib.Path(socket_path).exists()):
            raise RuntimeError("the daemon did not start")
        yield process
    finally:
        process.terminate()
        process.wait(30)


def shared(binary):
    """What a daemon tells of the memory that two servers share. Of a server without events of its own."""
    events, missed = endpoints()
    with tempfile.TemporaryDirectory(prefix="kvkeep-daemon-") as folder:
        path = f"{folder}/daemon.sock"
        with daemon(binary, path, *flags(events, missed)), Server(binary, f"--daemon={path}", "--no-disk") as first:
            reader = Reader(events)
            connected(reader, first)
            blocks = chat(first, "Who wrote Faust?")["usage"]["prompt_tokens"] // 16
            told = reader.until(lambda held: len(held.of("CPU")) >= blocks)
            check("a daemon tells what a server stored in it", told and set(reader.filled()) == {"CPU"}, f"{len(reader.of('CPU'))} blocks")
            check("and of no tokens", not any(event.token_ids for event in reader.stored), len(reader.stored))
            before = len(reader.of("CPU"))
            with Server(binary, f"--daemon={path}", "--no-disk") as second:
                usage = chat(second, "Who wrote Faust?")["usage"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                check("another server finds what was told", cached >= 16 * (blocks - 1), f"{cached} of {usage['prompt_tokens']} tokens")
                for number in range(60):
                    chat(second, f"{number}: tell me about a book, its author, its year, its country and its language. " * 3, 1)
                    if reader.kinds.get(BlockRemoved):
                        break
            told = reader.until(lambda held: held.kinds.get(BlockRemoved))
            check("a daemon tells what it evicts", told, f"{before} blocks before, {len(reader.of('CPU'))} after")
            command(binary, first, "clear", "--yes")
            check("and that nothing is left", reader.until(lambda held: not held.filled()), reader.kinds)
            late = Held()
            batches, ended = replay(missed, 0)
            for number in sorted(batches):
                late.apply(batches[number])
            check("who comes late to a daemon knows the same", ended and late.filled() == reader.filled(), len(batches))
            reader.close()


def refused(binary):
    for words, says in [
        (["--kv-events", "tcp://*:0"], "--kv-events-anyone"),
        (["--kv-events", "ipc:///tmp/x"], "tcp://127.0.0.1:5557"),
        (["--kv-events-replay", "tcp://127.0.0.1:0"], "--kv-events"),
    ]:
        run = subprocess.run([binary, "serve", "--port=0", "--no-disk", *words], capture_output=True, text=True, timeout=120)
        check(f"{' '.join(words)} is refused", run.returncode in (1, 2) and says in run.stderr, run.stderr.strip()[-120:])


def main(binary):
    refused(binary)
    stored_and_removed(binary)
    evicted_and_restarted(binary)
    shared(binary)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
