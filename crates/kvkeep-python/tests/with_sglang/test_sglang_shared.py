"""Engines that share through a daemon or a remote store, under SGLang's own controller."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import hold, start
from lab import PAGE_TOKENS, Lab, prompt

ALL = 40 * PAGE_TOKENS


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    running = start(tmp_path / "s", ram_gib=0.125)
    yield running
    running.kill()
    running.wait(30)


def engine(tmp_path: Path, name: str, **settings: Any) -> Lab:
    """One with a folder of its own, and no disk but where one is asked for."""
    return Lab(tmp_path / name, **{"capacity_gb": None, "daemon": str(tmp_path / "s"), **settings})


@pytest.mark.usefixtures("daemon")
def test_engines_share__what_one_stores_another_one_loads_also_after_it_has_ended(tmp_path: Path) -> None:
    with engine(tmp_path, "one") as one, engine(tmp_path, "other") as other:
        assert one.store(prompt(40)) == ALL
        assert other.hits(prompt(40)) == other.load(prompt(40)) == ALL
        assert other.storage.counters()["hits"] == 40
    with engine(tmp_path, "third") as third:
        assert third.load(prompt(40)) == ALL
    assert not list(tmp_path.rglob("segment-*")), "nothing of KV on a disk"


@pytest.mark.usefixtures("daemon")
def test_private__ranks_of_one_engine_and_other_salts_find_nothing_of_each_other(tmp_path: Path) -> None:
    """Ranks have parts of a page each, under one key: in a folder each they could not meet, in a daemon they do."""
    first, second = ({"tp_rank": rank, "tp_size": 2} for rank in (0, 1))
    with engine(tmp_path, "one", arguments=first) as one:
        one.store(prompt(40))
    with engine(tmp_path, "rank", arguments=second) as rank:
        assert rank.hits(prompt(40)) == 0
    with engine(tmp_path, "salted", arguments=first, salt="other") as salted:
        assert salted.hits(prompt(40)) == 0
    with engine(tmp_path, "again", arguments=first) as again:
        assert again.load(prompt(40)) == ALL


@pytest.mark.usefixtures("daemon")
def test_clear__it_is_gone_for_all_that_share_it(tmp_path: Path) -> None:
    with engine(tmp_path, "one") as one, engine(tmp_path, "other") as other:
        one.store(prompt(40))
        assert other.hits(prompt(40)) == ALL
        one.storage.clear()
        assert other.hits(prompt(40)) == one.hits(prompt(40)) == 0
        assert one.store(prompt(20)) == other.load(prompt(20)) == 20 * PAGE_TOKENS


def test_soft_failure__a_daemon_that_hangs_costs_misses_and_no_waiting_and_a_disk_goes_on(tmp_path: Path, daemon: subprocess.Popen[str]) -> None:
    with engine(tmp_path, "alone") as alone, engine(tmp_path, "both", capacity_gb=0.1) as both:
        alone.store(prompt(40))
        both.store(prompt(40, salt=1))
        hold(daemon)
        began = time.monotonic()
        assert alone.hits(prompt(40)) == alone.load(prompt(40)) == 0
        assert time.monotonic() - began < 1
        assert both.load(prompt(40, salt=1)) == ALL, "from the disk"
        assert both.store(prompt(20, salt=2)) == 20 * PAGE_TOKENS
        daemon.kill()


@pytest.mark.usefixtures("daemon")
def test_worth_it__each_tier_is_judged_by_its_own_rate(tmp_path: Path) -> None:
    with engine(tmp_path, "both", capacity_gb=0.1, prefill_tokens_per_s=ALL / 0.2) as both:
        both.store(prompt(40))
        size = 40 * both.storage._pool("kv").page_bytes
        both.storage.rates.measured.update(daemon=size / 0.05, disk=size / 5)
        assert both.load(prompt(40)) == ALL, "the daemon comes before the disk"
        both.storage.rates.measured.update(daemon=size / 5, disk=size / 0.05)
        assert both.hits(prompt(40)) == 0 and both.storage.counters()["not_worth"] == 40


def test_engines_share__through_a_remote_store_that_has_to_be_asked(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    remote = f"file://{tmp_path / 'store'}"
    with engine(tmp_path, "one", daemon=None, remote=remote) as one:
        assert one.store(prompt(40)) == ALL
    with engine(tmp_path, "other", daemon=None, remote={"url": remote, "deadline_seconds": 5}) as other:
        assert other.load(prompt(40)) == ALL
