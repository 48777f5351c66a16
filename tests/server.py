#!/usr/bin/env python3
"""`kvkeep serve` from outside: every example of docs/server.md, OpenAI's own client, a restart.

Usage: server.py BINARY   (with the package `openai`)

Blocks marked bash and python in the guide are run as they stand, but for the port: those that use $KEY against a
server with keys, the others against one without.
"""
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import tempfile

import openai

from serving import Checks, Server, key_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "server.md"
KEYS = {"operator": "operator-0123456789abcdef", "alice": "alice-0123456789abcdef", "bob": "bob-0123456789abcdef"}
SYSTEM = ("You are the librarian of a small town. You know every book on your shelves, who wrote it and when, and you "
          "answer questions of visitors in one short and friendly sentence. ")
# Words that are nowhere else: what is asked must not be found on the disk or in the log.
MARK = "quaxilomb"
checks = Checks()
check = checks.check


def client(server, key="none"):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=120)


def chat(user="Who wrote Faust?", **more):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    return {"model": "SmolLM2-135M-Instruct.Q4_1", "messages": messages, "temperature": 0, "max_tokens": 16, **more}


def guide(server, keyed):
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    wanted = [(language, text) for language, text in blocks if ("$KEY" in text or '["KEY"]' in text) == keyed]
    check(f"guide: there are examples {'with' if keyed else 'without'} keys", wanted, len(wanted))
    environment = {**os.environ, "KEY": KEYS["operator"], "ALICE_KEY": KEYS["alice"]}
    for language, text in wanted:
        text = text.replace("http://localhost:8080", server.url)
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
        first = text.strip().splitlines()[0][:70]
        fine = run.returncode == 0 and run.stdout.strip() and '"error"' not in run.stdout
        check(f"guide: {language}: {first}", fine, (run.stdout + run.stderr).strip().replace("\n", " ")[:90])


def openai_client(server):
    api = client(server)
    check("client: lists the model", [m.id for m in api.models.list()] == [chat()["model"]], api.models.list().data[0].id)
    whole = api.chat.completions.create(**chat())
    again = api.chat.completions.create(**chat())
    check("client: the answer is text", whole.choices[0].message.content, repr(whole.choices[0].message.content))
    check("client: the warm answer is the cold one", again.choices[0].message.content == whole.choices[0].message.content, "same")
    cached = again.usage.prompt_tokens_details.cached_tokens
    check("client: cached tokens are in the usage", 0 < cached < again.usage.prompt_tokens, f"{cached} of {again.usage.prompt_tokens}")
    stream = api.chat.completions.create(**chat(), stream=True, stream_options={"include_usage": True})
    parts = list(stream)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    check("client: a stream is the whole answer", text == whole.choices[0].message.content, f"{len(parts)} events")
    check("client: a stream ends with its usage", parts[-1].usage.prompt_tokens_details.cached_tokens == cached, cached)
    raw = api.chat.completions.with_raw_response.create(**chat(), logprobs=True, top_logprobs=2)
    check("client: the time to the first token is in a header", float(raw.headers["x-kvkeep-ttft-ms"]) > 0, raw.headers["x-kvkeep-ttft-ms"])
    check("client: log probabilities", len(raw.parse().choices[0].logprobs.content[0].top_logprobs) == 2, "2 for each token")
    plain = api.completions.create(model=chat()["model"], prompt="1, 2, 3,", max_tokens=6, temperature=0)
    check("client: completions", plain.choices[0].text, repr(plain.choices[0].text))
    several = api.chat.completions.create(**{**chat(), "temperature": 1.2}, n=2, seed=1, presence_penalty=0.5, logit_bias={"504": -100})
    check("client: several answers", [choice.index for choice in several.choices] == [0, 1], [choice.message.content for choice in several.choices])
    lists = api.completions.create(model=chat()["model"], prompt=["1, 2,", "a, b,"], max_tokens=4, temperature=0, echo=True)
    check("client: several prompts, echoed", [choice.text[:4] for choice in lists.choices] == ["1, 2", "a, b"], [choice.text for choice in lists.choices])
    for name, error, call in [
        ("a wrong value", openai.BadRequestError, lambda: api.chat.completions.create(**{**chat(), "temperature": 3})),
        ("an unknown model", openai.NotFoundError, lambda: api.chat.completions.create(**{**chat(), "model": "gpt-4"})),
        ("embeddings", openai.APIStatusError, lambda: api.embeddings.create(model=chat()["model"], input="x")),
    ]:
        try:
            call()
            check(f"client: {name} is an error", False, "no error")
        except error as raised:
            check(f"client: {name} is an error", raised.body["message"], raised.body["message"])
    stream = api.completions.create(model=chat()["model"], prompt="1, 2,", max_tokens=3000, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    api.chat.completions.create(**chat())
    outcomes = [line["outcome"] for line in server.events("served")]
    check("client: a stream that is closed is cancelled", "Cancelled" in outcomes, outcomes[-2:])


def keys(server):
    for key, name in [("wrong-0123456789abcdef", "a wrong key"), ("", "no key")]:
        try:
            client(server, key or "x").models.list()
            check(f"keys: {name} is refused", False, "answered")
        except openai.AuthenticationError as error:
            check(f"keys: {name} is refused", True, error.body["message"])
    cached = {}
    for tenant in ("alice", "alice", "bob"):
        answer = client(server, KEYS[tenant]).chat.completions.create(**chat("What is a tenant?"))
        cached.setdefault(tenant, []).append(answer.usage.prompt_tokens_details.cached_tokens)
    check("keys: tenants share nothing", cached["alice"][0] == 0 < cached["alice"][1] and cached["bob"] == [0], cached)


def restart(binary):
    with tempfile.TemporaryDirectory() as directory:
        body = chat(f"What is a {MARK}?")
        with Server(binary, disk=directory) as first:
            cold = client(first).chat.completions.create(**body)
            second = subprocess.run([binary, "serve", "--port=0", f"--disk={first.disk}"], capture_output=True, text=True, timeout=120)
            says = second.returncode == 1 and "--no-disk" in second.stderr
            check("restart: a second server on the same directory says what to do", says, second.stderr.strip()[-150:])
            stream = client(first).chat.completions.create(**chat("Count.", max_tokens=60), stream=True)
            parts = iter(stream)
            next(parts)
            first.process.terminate()
            rest = list(parts)
            check("restart: what is under way is finished", rest[-1].choices[0].finish_reason, rest[-1].choices[0].finish_reason)
            check("restart: SIGTERM is a clean end", first.stop() == 0, first.process.returncode)
            check("restart: one line of log for each request", len(first.events("served")) == 2, len(first.events("served")))
        with Server(binary, disk=directory) as after:
            warm = client(after).chat.completions.create(**body)
            took = {tier["name"]: tier["tokens"] for tier in warm.model_extra["kvkeep"]["tiers"]}
            check("restart: the prompt comes from the disk", took["disk"] > 0 and took["ram"] == 0, took)
            check("restart: the answer is the same", warm.choices[0].message.content == cold.choices[0].message.content, "same")
            after.stop()
            modes = {oct(stat.S_IMODE(path.stat().st_mode)) for path in after.disk.iterdir()}
            check("restart: the directory is its owner's alone", stat.S_IMODE(after.disk.stat().st_mode) == 0o700 and modes == {"0o600"}, modes)
            written = b"".join(path.read_bytes() for path in after.disk.iterdir())
            check("private: what was asked is not on the disk", MARK.encode() not in written and len(written) > 1 << 20, f"{len(written)} bytes")
            logged = "".join(first.log + after.log)
            check("private: what was asked is not in the log", MARK not in logged and "served" in logged, f"{len(logged)} characters")


def settings(binary):
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "kvkeep.toml"
        path.write_text("parallel = 3\nqueue = 7\n")
        environment = {**os.environ, "KVKEEP_SERVE_QUEUE": "8", "KVKEEP_SERVE_CONFIG": str(path)}
        show = [binary, "serve", "--print-config", "--port=1234"]
        printed = subprocess.run(show, capture_output=True, text=True, env=environment, check=True).stdout
        lines = printed.splitlines()
        fine = all(line in lines for line in ("port = 1234", "queue = 8", "parallel = 3", "ram_gib = 1.0"))
        check("settings: flags over environment over file over default", fine, "port 1234, queue 8, parallel 3, ram_gib 1.0")
        open_keys = key_file(directory, KEYS["alice"])
        os.chmod(open_keys, 0o644)
        refused = subprocess.run([binary, "serve", f"--api-key-file={open_keys}"], capture_output=True, text=True, timeout=60)
        check("settings: keys that others can read are refused", refused.returncode == 1 and "chmod 600" in refused.stderr, refused.stderr.strip())
        refused = subprocess.run([binary, "serve", "--host=0.0.0.0", "--no-disk"], capture_output=True, text=True, timeout=60)
        check("settings: other machines need keys", refused.returncode == 1 and "--api-key-file" in refused.stderr, refused.stderr.strip())
    completions = subprocess.run([binary, "completions", "bash"], capture_output=True, text=True, check=True).stdout
    check("settings: completions for the shell", "--api-key-file" in completions, f"{len(completions)} characters")


def main():
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    with Server(binary) as server:
        guide(server, keyed=False)
        openai_client(server)
    with tempfile.TemporaryDirectory() as directory:
        lines = f"{KEYS['operator']}\n{KEYS['alice']} alice\n{KEYS['bob']} bob\n"
        with Server(binary, f"--api-key-file={key_file(directory, lines)}") as server:
            guide(server, keyed=True)
            keys(server)
    restart(binary)
    settings(binary)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
