"""Engines that share through a daemon or a remote store, both ways into vLLM, without an engine: what its scheduler asks, and how long it waits."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemons import hold, start
from ram import Ram
from tier import CHUNK_TOKENS, Lab, content, names, request
from vllm.v1.kv_offload.base import LookupResult

KEYS = names(40)

MISSES_WITHIN = 0.25
"""Of a tier that hangs: 50 ms are waited once, and the machine may be busy."""


class Tier:
    """As a tier below vLLM's RAM."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.lab = Lab(root, **settings)
        self.half, self.engine, self.store, self.close = self.lab.tier, self.lab.tier._engine, self.lab.store, self.lab.tier.shutdown

    def look(self, keys: list[bytes], context: Any) -> list[LookupResult]:
        return [self.half.lookup(key, context) for key in keys]

    def found(self, keys: list[bytes], name: str) -> int:
        """How many blocks a request loads, as vLLM's scheduler asks for them."""
        context = request(name, keys)
        self.half.on_new_request(context)
        end = time.monotonic() + 20
        while LookupResult.RETRY in (results := self.look(keys, context)):
            assert time.monotonic() < end
            time.sleep(0.002)
        count = next((at for at, result in enumerate(results) if result is LookupResult.MISS), len(keys))
        if count:
            assert self.lab.load(keys[:count], context=context).success
            assert all(np.array_equal(self.lab.rows[row], content(key)) for row, key in enumerate(keys[:count])), "other bytes than were stored"
        self.half.on_request_finished(context)
        return count


class WithRam:
    """With kvkeep's RAM too."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.ram = Ram(root, rows=128, **settings)
        self.half, self.engine, self.close = self.ram.manager, self.ram.engine, self.ram.manager.shutdown
        self.look, self.found = self.ram.look, self.ram.found

    def store(self, keys: list[bytes]) -> None:
        assert self.ram.store(keys, f"stores {time.monotonic_ns()}") == keys
        self.engine.flush()


Make = Callable[..., Any]


@pytest.fixture(params=[Tier, WithRam], ids=["tier", "ram"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes engines, each with a folder of its own and no disk but where one is asked for."""
    made: list[Any] = []

    def one(**settings: Any) -> Any:
        made.append(request.param(tmp_path / f"engine-{len(made)}", **{"capacity_gb": None, **settings}))
        return made[-1]

    yield one
    for engine in made:
        engine.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    running = start(tmp_path / "s")
    yield running
    running.kill()
    running.wait(30)


def at_daemon(make: Make, tmp_path: Path, **settings: Any) -> Any:
    return make(daemon=str(tmp_path / "s"), **settings)


def looked(engine: Any, keys: list[bytes], name: str) -> tuple[int, float]:
    """How many blocks a request is told of, and the longest that one question took."""
    context, longest, found = request(name, keys), 0.0, 0
    engine.half.on_new_request(context)
    for key in keys:
        began = time.monotonic()
        found += engine.half.lookup(key, context) is not LookupResult.MISS
        longest = max(longest, time.monotonic() - began)
    engine.half.on_request_finished(context)
    return found, longest


@pytest.mark.usefixtures("daemon")
def test_engines_share__what_one_stores_another_one_loads_at_the_same_time(make: Make, tmp_path: Path) -> None:
    one, other = at_daemon(make, tmp_path), at_daemon(make, tmp_path)
    one.store(KEYS)
    assert other.found(KEYS, "asks") == 40
    assert other.half.counters()["hits"] == 40 and list(other.half.rates.measured) == ["daemon"]
    other.store(names(40, salt=1))
    assert one.found(names(40, salt=1), "asks") == 40


@pytest.mark.usefixtures("daemon")
def test_warm_restart__what_an_engine_stored_outlives_it_in_the_daemon(make: Make, tmp_path: Path) -> None:
    first = at_daemon(make, tmp_path)
    first.store(KEYS)
    first.close()
    assert at_daemon(make, tmp_path).found(KEYS, "asks") == 40


@pytest.mark.usefixtures("daemon")
def test_engines_share__replicas_of_one_engine_too(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tier

    at_daemon(make, tmp_path).store(KEYS)
    made = tier.engine_config

    def replica(*given: Any, **named: Any) -> Any:
        config = made(*given, **named)
        config.parallel_config.data_parallel_index = 1
        return config

    monkeypatch.setattr(tier, "engine_config", replica)
    monkeypatch.setattr("ram.engine_config", replica)
    assert at_daemon(make, tmp_path).found(KEYS, "asks") == 40


@pytest.mark.usefixtures("daemon")
def test_private__another_engine_and_another_salt_find_nothing_in_the_daemon(make: Make, tmp_path: Path) -> None:
    at_daemon(make, tmp_path).store(KEYS)
    assert at_daemon(make, tmp_path, config={"dtype": "torch.float16"}).found(KEYS, "asks") == 0
    assert at_daemon(make, tmp_path, salt="other").found(KEYS, "asks") == 0


@pytest.mark.usefixtures("daemon")
def test_worth_it__each_tier_is_judged_by_its_own_rate(make: Make, tmp_path: Path) -> None:
    """40 blocks take 200 ms to compute. The daemon gives them in less, the disk does not."""
    both = at_daemon(make, tmp_path, capacity_gb=0.1, worth="measured")
    both.store(KEYS)
    size = 40 * 8192
    both.half.rates.prefill_tokens_per_s = 40 * CHUNK_TOKENS / 0.2
    both.half.rates.measured.update(daemon=size / 0.05, disk=size / 5)
    assert looked(both, KEYS, "fast")[0] == 40, "the daemon comes before the disk"
    both.half.rates.measured.update(daemon=size / 5, disk=size / 0.05)
    both.half.on_schedule_end(_step())
    assert _settled(both, KEYS, "slow") == 0
    assert both.half.counters()["not_worth"] == 40


def _step() -> Any:
    from vllm.v1.kv_offload.base import ScheduleEndContext

    return ScheduleEndContext(new_req_ids=(), preempted_req_ids=[])


def _settled(engine: Any, keys: list[bytes], name: str) -> int:
    """How many blocks a request may load in the end; of what is in RAM, none."""
    if isinstance(engine, WithRam):
        engine.engine.evict_all(10)
    context = request(name, keys)
    engine.half.on_new_request(context)
    for _ in range(3):
        results = engine.look(keys, context)
        engine.half.on_schedule_end(_step())
    engine.half.on_request_finished(context)
    return sum(result is not LookupResult.MISS for result in results)


def test_soft_failure__a_daemon_that_hangs_keeps_no_scheduler_waiting(make: Make, tmp_path: Path, daemon: subprocess.Popen[str]) -> None:
    """vLLM's scheduler asks in its own thread, and all requests wait while it does."""
    stores, engine = at_daemon(make, tmp_path), at_daemon(make, tmp_path)
    stores.store(KEYS)
    engine.half.get_stats()  # the first time it imports vLLM's metrics
    hold(daemon)
    found, longest = looked(engine, KEYS, "first")
    assert found == 0 and longest < MISSES_WITHIN, longest
    found, longest = looked(engine, KEYS, "next")
    assert found == 0 and longest < 0.03, "it is known now, and nobody waits again"
    began = time.monotonic()
    engine.half.get_stats()
    assert time.monotonic() - began < 0.05
    daemon.send_signal(signal.SIGCONT)
    end = time.monotonic() + 20
    while engine.found(KEYS, f"again {time.monotonic()}") < 40:
        assert time.monotonic() < end, "it is back, and not asked"
        time.sleep(0.05)


def test_soft_failure__a_daemon_that_dies_costs_misses_and_the_disk_is_still_there(make: Make, tmp_path: Path, daemon: subprocess.Popen[str]) -> None:
    alone, both = at_daemon(make, tmp_path), at_daemon(make, tmp_path, capacity_gb=0.1)
    alone.store(KEYS)
    own = names(40, salt=1)
    both.store(own)
    daemon.kill()
    daemon.wait(30)
    if isinstance(both, WithRam):
        both.engine.evict_all(10)
        alone.engine.evict_all(10)
    assert (alone.found(KEYS, "asks"), both.found(KEYS, "asks"), both.found(own, "asks")) == (0, 0, 40)
    more = names(20, salt=2)
    if isinstance(both, Tier):
        both.store(more)
        assert both.found(more, "asks more") == 20, "one tier that takes it is enough"


def test_soft_failure__no_daemon_yet_is_no_error(make: Make, tmp_path: Path) -> None:
    engine = at_daemon(make, tmp_path)
    assert looked(engine, KEYS, "asks")[0] == 0 and engine.engine.stats()["tiers"]["daemon"]["failing"]
    running = start(tmp_path / "s")
    end = time.monotonic() + 20
    while engine.engine.stats()["tiers"]["daemon"]["failing"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    engine.store(KEYS)
    assert at_daemon(make, tmp_path).found(KEYS, "asks") == 40
    running.kill()
    running.wait(30)


def test_engines_share__through_a_remote_store_that_has_to_be_asked(make: Make, tmp_path: Path) -> None:
    """What another node wrote is known by its name alone until it is asked for: a request waits for that, and no scheduler does."""
    url = f"file://{tmp_path / 'shared'}"
    (tmp_path / "shared").mkdir()
    one = make(remote=url)
    one.store(KEYS)
    other = make(remote={"url": url, "deadline_seconds": 5})
    assert looked(other, KEYS[:1], "looks")[1] < 0.1
    assert other.found(KEYS, "asks") == 40
    assert list(other.half.rates.measured) == ["remote"] and other.half.counters()["hits"] == 40
