"""The tier in a real engine: vLLM on the CPU, a random Llama of 100 million parameters, greedy answers compared token by token.

In float32: in bfloat16 an answer depends on how many tokens are computed at once, also with vLLM's own prefix cache alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from daemons import hold, start
from slow_disk import SlowDisk, is_possible

ENGINE = str(Path(__file__).with_name("engine.py"))
SHORT = os.environ.get("KVKEEP_VLLM_SHORT") == "1"
"""A part of it, for where time is short."""

long_run = pytest.mark.skipif(SHORT, reason="not in the short form")
both_ways = pytest.mark.parametrize("whole", [pytest.param(False, id="tier"), pytest.param(True, id="ram", marks=long_run)])
"""As a tier below vLLM's RAM, and with kvkeep's own."""


class Engine:
    """An engine in a process of its own."""

    def __init__(self, model: str, tier: dict[str, Any] | None, hold: bool = False, **more: Any) -> None:
        command = [sys.executable, ENGINE, json.dumps({"model": model, "tier": tier, **more})]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.disk = SlowDisk(command, "/segment-", **pipes) if hold else None
        self.process = self.disk.process if self.disk else subprocess.Popen(command, **pipes)
        self.answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, f"the engine has ended: {self.process.wait(30)}"
        return json.loads(line)

    def generate(self, prompts: list[list[int]], **arguments: Any) -> dict[str, Any]:
        return self.ask("generate", prompts=prompts, **arguments)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.ask("close")
            self.process.stdin.close()
            try:
                self.process.wait(60)
            finally:
                self.process.kill()


def tier_at(root: Path, **settings: Any) -> dict[str, Any]:
    return {"type": "kvkeep", "root_dir": str(root), "capacity_gb": 0.5, "queue_mb": 64, "worth": "always", **settings}


def prompts(count: int, length: int, seed: int = 7) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 16000) for _ in range(length)] for _ in range(count)]


def disk_use(root: Path) -> int:
    return int(subprocess.run(["du", "-s", "-B1", str(root)], check=True, capture_output=True, text=True).stdout.split()[0])


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    kept = os.environ.get("KVKEEP_VLLM_MODELS")
    return models.llama(Path(kept) / "llama" if kept else tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def alone(model: str) -> Iterator[Engine]:
    """Without kvkeep, and without a prefix cache: what every answer must be."""
    with Engine(model, None, prefix_caching=False) as engine:
        yield engine


@pytest.mark.parametrize("whole", [False, True], ids=["tier", "ram"])
@pytest.mark.parametrize("prefix_caching", [True, pytest.param(False, marks=long_run)])
def test_answers_are_the_same_cold_warm_and_in_a_new_process_from_disk(model: str, alone: Engine, tmp_path: Path, whole: bool, prefix_caching: bool) -> None:
    asked = prompts(3, 700)
    expected = alone.generate(asked)["tokens"]
    with Engine(model, tier_at(tmp_path / "kv"), prefix_caching=prefix_caching, whole=whole) as engine:
        assert engine.generate(asked)["tokens"] == expected, "cold"
        engine.ask("flush")
        assert engine.generate(asked)["tokens"] == expected, "warm"
        engine.ask("drop_ram")
        warm = engine.generate(asked)
        assert warm["tokens"] == expected, "from disk"
        assert min(warm["cached"]) >= 640, warm["cached"]
        assert engine.ask("counters")["hits"] >= 30
    with Engine(model, tier_at(tmp_path / "kv"), prefix_caching=prefix_caching, whole=whole) as engine:
        warm = engine.generate(asked)
        assert warm["tokens"] == expected, "in a new process"
        assert min(warm["cached"]) >= 640, warm["cached"]
        counters = engine.ask("counters")
        assert counters["hits"] == 30 and counters["damaged"] == 0


@long_run
def test_the_tier_is_found_by_its_class_where_its_plugin_is_not_loaded(model: str, tmp_path: Path) -> None:
    asked = prompts(1, 700)
    by_class = tier_at(tmp_path / "kv") | {"type": "KvkeepTier", "module_path": "kvkeep.vllm"}
    os.environ["VLLM_PLUGINS"] = "none-of-ours"
    try:
        for cached in (0, 640):
            with Engine(model, by_class) as engine:
                assert engine.generate(asked)["cached"] == [cached]
                engine.ask("flush")
    finally:
        del os.environ["VLLM_PLUGINS"]


@both_ways
@long_run
def test_eight_requests_at_once_that_share_prefixes(model: str, alone: Engine, tmp_path: Path, whole: bool) -> None:
    (shared,) = prompts(1, 512)
    asked = [shared + tail for tail in prompts(8, 200, seed=8)]
    expected = alone.generate(asked)["tokens"]
    with Engine(model, tier_at(tmp_path / "kv"), whole=whole) as engine:
        assert engine.generate(asked)["tokens"] == expected
        engine.ask("drop_ram")
        assert engine.generate(asked)["tokens"] == expected
        assert engine.ask("counters")["hits"] > 0


@both_ways
@long_run
def test_requests_that_are_aborted_while_their_kv_is_on_its_way_harm_nobody(model: str, alone: Engine, tmp_path: Path, whole: bool) -> None:
    asked = prompts(6, 700)
    expected = alone.generate(asked)["tokens"]
    with Engine(model, tier_at(tmp_path / "kv"), whole=whole) as engine:
        engine.ask("abort", prompts=asked)
        assert engine.generate(asked)["tokens"] == expected
        for _ in range(3):
            engine.ask("drop_ram")
            engine.ask("abort", prompts=asked)
        engine.ask("drop_ram")
        assert engine.generate(asked)["tokens"] == expected
        assert engine.ask("settle") == {"pending": False}


@both_ways
def test_a_byte_that_flips_under_a_running_engine_is_computed_again_and_counted(model: str, alone: Engine, tmp_path: Path, whole: bool) -> None:
    asked = prompts(2, 700)
    expected = alone.generate(asked)["tokens"]
    with Engine(model, tier_at(tmp_path / "kv"), whole=whole) as engine:
        engine.generate(asked)
        engine.ask("flush")
        for path in (tmp_path / "kv").glob("kv-0/segment-*"):
            with path.open("r+b") as file:
                size = os.path.getsize(path)
                for at in range(300_000, size, 500_000):
                    file.seek(at)
                    byte = file.read(1)
                    file.seek(at)
                    file.write(bytes([byte[0] ^ 0x10]))
        engine.ask("drop_ram")
        assert engine.generate(asked)["tokens"] == expected
        assert engine.ask("counters")["damaged"] > 0
        engine.ask("drop_ram")
        assert engine.generate(asked)["tokens"] == expected


@both_ways
def test_after_kill_9_a_new_engine_is_warm(model: str, alone: Engine, tmp_path: Path, whole: bool) -> None:
    asked = prompts(3, 700)
    expected = alone.generate(asked)["tokens"]
    engine = Engine(model, tier_at(tmp_path / "kv"), whole=whole)
    engine.generate(asked)
    engine.ask("flush")
    engine.kill()
    with Engine(model, tier_at(tmp_path / "kv"), whole=whole) as engine:
        warm = engine.generate(asked)
        assert warm["tokens"] == expected
        assert min(warm["cached"]) >= 640, warm["cached"]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    running = start(tmp_path / "s", ram_gib=0.5)
    yield running
    running.kill()
    running.wait(30)


def at_daemon(root: Path, **settings: Any) -> dict[str, Any]:
    """An engine without a disk: what it has outlives it in the daemon."""
    return {"type": "kvkeep", "root_dir": str(root / "kv"), "daemon": str(root / "s"), "queue_mb": 64, "worth": "always", **settings}


@both_ways
def test_an_engine_that_was_killed_leaves_its_successor_warm_in_the_daemon(model: str, alone: Engine, tmp_path: Path, daemon: Any, whole: bool) -> None:
    asked = prompts(2, 900)
    expected = alone.generate(asked, tokens=1)
    with Engine(model, at_daemon(tmp_path), whole=whole) as first:
        cold = first.generate(asked)["tokens"]  # of a few tokens: with the last step's end nothing is stored any more
        assert [tokens[:1] for tokens in cold] == expected["tokens"]
        first.ask("flush")
        first.kill()
    with Engine(model, at_daemon(tmp_path), whole=whole) as second:
        second.generate(prompts(1, 300, seed=9), tokens=1)  # as the first one, it has compiled what there is to compile
        warm = second.generate(asked, tokens=1)
        counters = second.ask("counters")
        assert warm["tokens"] == expected["tokens"] and warm["cached"] == [896] * 2, counters
        assert counters["hits"] == 28
    assert not list((tmp_path / "kv").glob("kv-*")), "nothing of KV on a disk of its own"
    print(f"\nprefill of two prompts of 900 tokens: {expected['seconds']:.3f} s cold, {warm['seconds']:.3f} s from the daemon")
    assert warm["seconds"] < expected["seconds"]
    assert daemon.poll() is None


@long_run
def test_two_engines_at_the_same_time_share_through_the_daemon_and_go_on_without_it(model: str, alone: Engine, tmp_path: Path, daemon: Any) -> None:
    asked, later = prompts(2, 700), prompts(2, 700, seed=8)
    expected, expected_later = alone.generate(asked)["tokens"], alone.generate(later)["tokens"]
    with Engine(model, at_daemon(tmp_path)) as tier, Engine(model, at_daemon(tmp_path), whole=True) as other, Engine(model, at_daemon(tmp_path)) as third:
        assert tier.generate(asked)["tokens"] == expected
        tier.ask("flush")
        # One as a tier below vLLM's RAM, one with kvkeep's RAM: a row is the same row.
        for engine in (other, third):
            found = engine.generate(asked)
            assert found["tokens"] == expected and found["cached"] == [640] * 2, "what the first one has computed"
        assert other.generate(later)["tokens"] == expected_later
        other.ask("flush")
        daemon.kill()
        daemon.wait(30)
        for engine in (tier, other, third):
            engine.ask("drop_ram")
            began = time.monotonic()
            answered = engine.generate(asked + later)
            assert answered["tokens"] == expected + expected_later and answered["cached"] == [0] * 4
            assert time.monotonic() - began < 60
        assert third.ask("counters")["damaged"] == 0


@both_ways
@long_run
def test_a_daemon_that_hangs_holds_no_request(model: str, alone: Engine, tmp_path: Path, daemon: Any, whole: bool) -> None:
    asked = prompts(2, 700)
    expected = alone.generate(asked)
    with Engine(model, at_daemon(tmp_path), whole=whole) as engine:
        assert engine.generate(asked)["tokens"] == expected["tokens"]
        engine.ask("flush")
        engine.ask("drop_ram")
        hold(daemon)
        hung = engine.generate(asked)
        assert hung["tokens"] == expected["tokens"] and hung["cached"] == [0, 0]
        assert hung["seconds"] < expected["seconds"] + 5
        daemon.send_signal(signal.SIGCONT)


@both_ways
@long_run
def test_the_cap_holds_as_du_sees_it(model: str, tmp_path: Path, whole: bool) -> None:
    cap = 24 << 20
    with Engine(model, tier_at(tmp_path / "kv", capacity_gb=cap / (1 << 30)), ram_mib=64, whole=whole) as engine:
        for seed in range(6):
            engine.generate(prompts(8, 700, seed), tokens=1)
            engine.ask("settle")
            assert disk_use(tmp_path / "kv") <= cap, seed
        engine.ask("flush")
        assert engine.ask("counters")["evictions"] > 0
    assert disk_use(tmp_path / "kv") <= cap


@both_ways
@long_run
@pytest.mark.skipif(not is_possible(), reason="needs root on x86-64 Linux")
def test_a_disk_that_hangs_holds_no_request_longer_than_its_deadline(model: str, alone: Engine, tmp_path: Path, whole: bool) -> None:
    asked = prompts(3, 700)
    expected = alone.generate(asked)["tokens"]
    settings = {"load_timeout_s": 2, "store_timeout_s": 2, "flush_timeout_s": 2}
    with Engine(model, tier_at(tmp_path / "kv", **settings), hold=True, whole=whole) as engine:
        cold = engine.generate(asked)
        assert cold["tokens"] == expected
        engine.ask("flush")
        engine.ask("drop_ram")
        engine.disk.hang()
        held = engine.generate(asked)
        assert held["tokens"] == expected
        assert held["seconds"] < 2 + 1.5 * cold["seconds"] + 2, (held["seconds"], cold["seconds"])
        again = engine.generate(prompts(2, 700, seed=9))
        assert again["seconds"] < 2 * cold["seconds"] + 1, "a disk that is known to hang is not waited for"
        assert engine.disk.held > 0
        engine.disk.go_on()
        time.sleep(1)
        engine.ask("drop_ram")
        back = engine.generate(asked)
        assert back["tokens"] == expected and min(back["cached"]) >= 640, back["cached"]


@both_ways
@long_run
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a tmpfs")
def test_a_disk_that_is_full_fails_no_request(model: str, alone: Engine, tmp_path: Path, whole: bool) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        asked = prompts(4, 700)
        expected = alone.generate(asked)["tokens"]
        with Engine(model, tier_at(mount / "kv", capacity_gb=1), whole=whole) as engine:
            for _ in range(2):
                assert engine.generate(asked)["tokens"] == expected
                engine.ask("drop_ram")
            (mount / "others").write_bytes(bytes(_free(mount)))
            assert engine.generate(prompts(4, 700, seed=11))["cached"]
            assert engine.generate(asked)["tokens"] == expected
            assert engine.ask("settle") == {"pending": False}
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


def _free(mount: Path) -> int:
    free = os.statvfs(mount)
    return free.f_bavail * free.f_bsize


@both_ways
@long_run
def test_what_is_computed_faster_is_not_loaded_and_the_answer_is_the_same(model: str, alone: Engine, tmp_path: Path, whole: bool) -> None:
    """The next engine knows what the last one measured: it does not have to load once to find out that loading is slow."""
    asked = prompts(3, 700)
    expected = alone.generate(asked)["tokens"]
    with Engine(model, tier_at(tmp_path / "kv", worth="measured"), whole=whole) as engine:
        assert engine.generate(asked)["tokens"] == expected
        engine.ask("flush")
        engine.generate(prompts(1, 100))
    rates = tmp_path / "kv" / "rates.json"
    for disk, known in ((1e3, False), (1e12, True)):
        (measured,) = json.loads(rates.read_text()).items()
        assert measured[1]["seconds_by_length"] and measured[1]["bytes_per_s"]["disk"], measured
        rates.write_text(json.dumps({measured[0]: measured[1] | {"bytes_per_s": {"disk": disk}, "step_seconds": 0.001}}))
        with Engine(model, tier_at(tmp_path / "kv", worth="measured"), whole=whole) as engine:
            found = engine.generate(asked)
            assert found["tokens"] == expected
            assert (min(found["cached"]) >= 640) if known else (found["cached"] == [0, 0, 0]), found["cached"]
            counters = engine.ask("counters")
            assert (counters["hits"], counters["not_worth"]) == ((30, 0) if known else (0, 30))


class Server:
    """vLLM's own server: the engine in one process, the front door in another."""

    def __init__(self, model: str, tier: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        extra = {"spec_name": "CpuTieringOffloadingSpec", "spec_module_path": "kvkeep.vllm.cpu", "cpu_bytes_to_use": 256 << 20, "block_size": 64}
        transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                    "kv_connector_extra_config": {**extra, "secondary_tiers": [tier]}}  # fmt: skip
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1", "--port", str(self.port),
                   "--dtype", "float32", "--block-size", "64", "--max-model-len", "1536", "--enforce-eager", "--served-model-name", "m",
                   "--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer)]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        end = time.monotonic() + 300
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return bool(self.get("/health") is not None)
        except OSError:
            return False

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def complete(self, ids: list[int]) -> tuple[str, int]:
        """The answer, and how many tokens of the prompt were not computed."""
        body = {"model": "m", "prompt": ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as answer:
            done = json.load(answer)
        return done["choices"][0]["text"], (done["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith((f"{name}{{", f"{name}_total{{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else -1

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@long_run
def test_vllms_server_is_warm_after_kill_9_and_publishes_the_figures(model: str, tmp_path: Path) -> None:
    models.tokenizer(Path(model))
    (asked,) = prompts(1, 700)
    server = Server(model, tier_at(tmp_path / "kv"))
    try:
        text, cached = server.complete(asked)
        assert cached == 0
        end = time.monotonic() + 60
        while server.metric("vllm:kvkeep_written") < 10 and time.monotonic() < end:
            time.sleep(0.5)
        assert server.metric("vllm:kvkeep_written") == 10
        assert 0 < server.metric("vllm:kvkeep_used_bytes") < server.metric("vllm:kvkeep_capacity_bytes")
    finally:
        server.kill()
    server = Server(model, tier_at(tmp_path / "kv"))
    try:
        assert server.complete(asked) == (text, 640)
        assert server.metric("vllm:kvkeep_hits") == 10
    finally:
        server.kill()


@both_ways
@long_run
def test_another_dtype_and_other_weights_under_the_same_name_find_nothing(model: str, tmp_path: Path, whole: bool) -> None:
    asked = prompts(2, 700)
    place = tmp_path / "model"
    place.symlink_to(model)
    with Engine(str(place), tier_at(tmp_path / "kv"), whole=whole) as engine:
        engine.generate(asked)
        engine.ask("flush")
    with Engine(str(place), tier_at(tmp_path / "kv"), dtype="bfloat16", whole=whole) as engine:
        assert engine.generate(asked, tokens=1)["cached"] == [0, 0]
    other = models.llama(tmp_path / "other", seed=2)
    place.unlink()
    place.symlink_to(other)
    with Engine(other, None, prefix_caching=False) as engine:
        expected = engine.generate(asked)["tokens"]
    with Engine(str(place), tier_at(tmp_path / "kv"), whole=whole) as engine:
        found = engine.generate(asked)
        assert found["cached"] == [0, 0] and found["tokens"] == expected
    place.unlink()
    place.symlink_to(model)
    with Engine(str(place), tier_at(tmp_path / "kv"), whole=whole) as engine:
        assert min(engine.generate(asked)["cached"]) >= 640


@both_ways
@long_run
def test_an_adapter_that_was_trained_on_finds_nothing_of_what_it_was(model: str, tmp_path: Path, whole: bool) -> None:
    """vLLM knows an adapter by its name and path. One that was trained further has both from before, and other KV."""
    asked = prompts(2, 700)
    adapter = tmp_path / "adapter"
    with_lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    models.lora(adapter, seed=1)
    with Engine(model, tier_at(tmp_path / "kv"), **with_lora, whole=whole) as engine:
        base = engine.generate(asked)["tokens"]
        first = engine.generate(asked, lora=["a", str(adapter)])
        assert first["cached"] == [0, 0], "the base model's KV is not the adapter's"
        assert first["tokens"] != base
        engine.ask("flush")
    with Engine(model, tier_at(tmp_path / "kv"), **with_lora, whole=whole) as engine:
        again = engine.generate(asked, lora=["a", str(adapter)])
        assert min(again["cached"]) >= 640 and again["tokens"] == first["tokens"]
    models.lora(adapter, seed=2)
    with Engine(model, None, prefix_caching=False, **with_lora) as engine:
        expected = engine.generate(asked, lora=["a", str(adapter)])["tokens"]
    with Engine(model, tier_at(tmp_path / "kv"), **with_lora, whole=whole) as engine:
        trained = engine.generate(asked, lora=["a", str(adapter)])
        assert trained["cached"] == [0, 0] and trained["tokens"] == expected
