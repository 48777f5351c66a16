"""Clients that people use, against `kvkeep serve`, directly and through nginx: a chat, a stream, and a prompt that does not fit.

    python clients.py KVKEEP

What a client must get: the same answer as from every other one, a stream in parts, and an error by which it knows that the prompt is too
long: agents then shorten the conversation and go on.
"""

import getpass
import grp
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from serving import Checks, Server, key_file  # noqa: E402

# LiteLLM would fetch a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
KEY = "key-of-the-clients"
QUESTION = "What is the capital of France?"
CONTEXT = 3072
TOO_LONG = "one two three four " * 1500
SLOW = "Count these words: " + "one two three four five six seven " * 360
"""A prompt whose prefill takes long."""
OPTIONS = {"temperature": 0, "max_tokens": 12}


def with_openai(url, model):
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    ask = lambda text, **more: client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **OPTIONS, **more)  # noqa: E731
    parts = [chunk.choices[0].delta.content for chunk in ask(QUESTION, stream=True) if chunk.choices and chunk.choices[0].delta.content]
    try:
        overflow = ask(TOO_LONG)
    except openai.BadRequestError as error:
        overflow = error.code
    return ask(QUESTION).choices[0].message.content, parts, overflow == "context_length_exceeded", overflow


def with_litellm(url, model):
    import litellm

    litellm.suppress_debug_info = True
    ask = lambda text, **more: litellm.completion(  # noqa: E731
        model=f"openai/{model}", api_base=f"{url}/v1", api_key=KEY, messages=[{"role": "user", "content": text}], num_retries=0, **OPTIONS, **more
    )
    parts = [chunk.choices[0].delta.content for chunk in ask(QUESTION, stream=True) if chunk.choices[0].delta.content]
    try:
        overflow = ask(TOO_LONG)
    except Exception as error:
        overflow = error
    return ask(QUESTION).choices[0].message.content, parts, isinstance(overflow, litellm.ContextWindowExceededError), type(overflow).__name__


def with_langchain(url, model):
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key=KEY, model=model, max_retries=0, **OPTIONS)
    parts = [part.content for part in chat.stream(QUESTION) if part.content]
    try:
        overflow = chat.invoke(TOO_LONG)
    except Exception as error:
        overflow = error
    return chat.invoke(QUESTION).content, parts, isinstance(overflow, ContextOverflowError), type(overflow).__name__


def with_llama_index(url, model):
    import openai
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(api_base=f"{url}/v1", api_key=KEY, model=model, is_chat_model=True, max_retries=0, context_window=CONTEXT, **OPTIONS)
    ask = lambda text: [ChatMessage(role="user", content=text)]  # noqa: E731
    parts = [part.delta for part in chat.stream_chat(ask(QUESTION)) if part.delta]
    try:
        overflow = chat.chat(ask(TOO_LONG))
    except openai.BadRequestError as error:
        overflow = error.code
    return chat.chat(ask(QUESTION)).message.content, parts, overflow == "context_length_exceeded", overflow


def with_llm(url, model, folder):
    """The command `llm`, with a model of its own in its settings."""
    settings = [{"model_id": "warm", "model_name": model, "api_base": f"{url}/v1", "api_key_name": "warm"}]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(settings))
    (folder / "keys.json").write_text(json.dumps({"warm": KEY}))
    environment = os.environ | {"LLM_USER_PATH": str(folder)}
    command = [pathlib.Path(sys.executable).parent / "llm", "-m", "warm", "-o", "temperature", "0", "-o", "max_tokens", "12", "--no-log"]
    ask = lambda text, *more: subprocess.run([*command, *more, text], env=environment, capture_output=True, text=True)  # noqa: E731
    chat, stream, overflow = ask(QUESTION, "--no-stream"), ask(QUESTION), ask(TOO_LONG)
    said = overflow.stdout + overflow.stderr
    # In how many parts a text came, a pipe does not say.
    return chat.stdout.strip(), [stream.stdout], overflow.returncode != 0 and "context length" in said, said.strip()[-60:]


def with_the_ai_sdk(url, model):
    run = subprocess.run(["node", HERE / "aisdk.js", url, KEY, model, QUESTION, TOO_LONG], capture_output=True, text=True, check=True)
    said = json.loads(run.stdout)
    overflow = said["overflow"] or {}
    known = overflow.get("known") and overflow.get("status") == 400 and "context length" in overflow.get("message", "")
    return said["chat"], said["parts"], known, overflow.get("message", "")[:60]


def with_curl(url, model):
    def ask(text, *more, **options):
        body = {"model": model, "messages": [{"role": "user", "content": text}], **OPTIONS, **options}
        command = ["curl", "--silent", "--no-buffer", *more, f"{url}/v1/chat/completions", "-H", f"Authorization: Bearer {KEY}"]
        return subprocess.run([*command, "-H", "Content-Type: application/json", "-d", "@-"], input=json.dumps(body), capture_output=True, text=True).stdout

    lines = [line[6:] for line in ask(QUESTION, stream=True).splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    parts = [text for line in lines for choice in json.loads(line)["choices"] if (text := choice["delta"].get("content"))]
    overflow, status = ask(TOO_LONG, "--write-out", "\n%{http_code}").rsplit("\n", 1)
    known = status == "400" and json.loads(overflow)["error"]["code"] == "context_length_exceeded"
    return json.loads(ask(QUESTION))["choices"][0]["message"]["content"], parts, known, status


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Nginx:
    def __init__(self, folder, port):
        self.port = free_port()
        text = (HERE / "nginx.conf").read_text()
        for word, value in {"USER": f"{getpass.getuser()} {grp.getgrgid(os.getgid()).gr_name}", "FOLDER": folder, "PORT_NGINX": self.port, "PORT_KVKEEP": port}.items():
            text = text.replace(word, str(value))
        (folder / "nginx.conf").write_text(text)
        self.process = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-p", folder, "-e", folder / "error.log"])
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"nginx did not start:\n{(folder / 'error.log').read_text()}")

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def slow_stream(url, model):
    """A long prompt's stream: seconds until anything came, until an event, the longest silence, and whether it ended well."""
    body = {"model": model, "messages": [{"role": "user", "content": SLOW}], "stream": True, **OPTIONS}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    began = time.monotonic()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers), timeout=300) as response:
        lines = [(time.monotonic() - began, line) for line in response]
    times = [0, *(when for when, _ in lines)]
    event = next(when for when, line in lines if line.startswith(b"data: "))
    return times[1], event, max(after - before for before, after in zip(times, times[1:])), any(line.startswith(b"data: [DONE]") for _, line in lines)


def main(binary):
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        flags = [f"--api-key-file={key_file(folder, KEY)}", f"--context-tokens={CONTEXT}", "--parallel=1"]
        with Server(binary, *flags) as server:
            (folder / "nginx").mkdir()
            nginx = Nginx(folder / "nginx", server.port)
            try:
                model = json.loads(server.get("/v1/models", KEY))["data"][0]["id"]
                through = f"http://127.0.0.1:{nginx.port}"
                first, event, silence, done = slow_stream(through, model)
                # nginx gives up after 60 s of silence.
                figures = f"first byte after {first:.1f} s, first token after {event:.1f} s, silent for {silence:.1f} s at most"
                checks.check("through nginx a stream says something long before its first token", done and first < 8 and silence < 20, figures)
                answers = set()
                for client in (with_openai, with_litellm, with_langchain, with_llama_index, with_llm, with_the_ai_sdk, with_curl):
                    for way, url in (("directly", server.url), ("through nginx", through)):
                        name = f"{client.__name__.removeprefix('with_').replace('_', ' ')} {way}"
                        (folder / "llm").mkdir(exist_ok=True)
                        more = [folder / "llm"] if client is with_llm else []
                        answer, parts, known, said = client(url, model, *more)
                        answers.add(answer.strip())
                        in_parts = len(parts) > 1 or client is with_llm
                        checks.check(f"{name}: a stream is the chat's answer, in parts", in_parts and "".join(parts).strip() == answer.strip() != "", repr(answer))
                        checks.check(f"{name}: a prompt that is too long is known as one", known, said)
                checks.check("all clients got one answer", len(answers) == 1, answers)
            finally:
                nginx.stop()
    return checks.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
