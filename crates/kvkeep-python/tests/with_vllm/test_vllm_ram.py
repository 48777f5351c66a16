"""`KvkeepOffloadingSpec`'s halves by themselves: the manager that vLLM's scheduler asks, and the rows that its workers copy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ram import Ram
from tier import ROW_BYTES, Lab, content, names
from vllm.v1.kv_offload.base import LookupResult

from kvkeep.vllm import _compat, _rows

HIT, MISS, PENDING, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING, LookupResult.RETRY
KEYS = names(6)


def test_never_wrong__what_comes_back_is_what_was_stored_from_ram_and_from_disk(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv") as ram:
        assert ram.store(KEYS) == KEYS
        assert ram.found(KEYS) == 6
        ram.on_disk()
        assert ram.found(KEYS, "again") == 6
        assert ram.manager.counters()["hits"] == 6


def test_never_wrong__a_block_is_no_hit_before_its_copy_has_ended(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv") as ram:
        context, other = ram.begin("stores", KEYS), ram.begin("asks", KEYS)
        stored = ram.manager.prepare_store(KEYS, context)
        assert ram.look(KEYS[:2], other) == [PENDING, PENDING]
        assert ram.manager.prepare_store(KEYS, other).keys_to_store == [], "somebody stores these already"
        ram.write(stored)
        ram.manager.complete_store(set(KEYS), context)
        assert ram.look(KEYS, other) == [HIT] * 6


def test_never_wrong__what_was_not_written_is_never_found(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv") as ram:
        context = ram.begin("stores", KEYS)
        assert ram.manager.prepare_store(KEYS, context).keys_to_store == KEYS
        ram.manager.complete_store(set(KEYS), context, success=False)
        assert ram.found(KEYS) == 0


def test_never_wrong__a_hit_stays_true_until_vllm_has_taken_it(tmp_path: Path) -> None:
    """A look-up and the load that follows it are two calls. What was evicted between them ended the engine."""
    with Ram(tmp_path / "kv", rows=8) as ram:
        ram.store(KEYS)
        context = ram.begin("asks", KEYS)
        assert ram.look(KEYS, context) == [HIT] * 6
        assert len(ram.store(names(8, salt=1), "floods")) == 2, "the rest has no room as long as those are promised"
        ram.manager.prepare_load(KEYS, context)
        ram.step("asks")
        ram.store(names(8, salt=2), "floods again")
        assert ram.manager.prepare_load(KEYS, context).block_ids.tolist(), "nor while they are copied"
        ram.manager.complete_load(set(KEYS), context)
        ram.manager.complete_load(set(KEYS), context)
        ram.engine.flush()
        assert len(ram.store(names(8, salt=3), "floods at last")) == 8


def test_never_wrong__what_expires_after_it_was_a_hit_is_still_loaded(tmp_path: Path) -> None:
    """The load asked the index once more. A block whose time ended in between was gone, and the engine with it."""
    with Ram(tmp_path / "kv") as ram:
        ram.store(KEYS, kv_transfer_params={"kvkeep": {"ttl": {"ttl_s": 0.2}}})
        context = ram.begin("asks", KEYS)
        assert ram.look(KEYS, context) == [HIT] * 6
        time.sleep(0.3)
        assert ram.look(KEYS[:1], ram.begin("later", KEYS)) == [MISS]
        spec = ram.manager.prepare_load(KEYS, context)
        assert all(np.array_equal(ram.rows[row], content(key)) for key, row in zip(KEYS, spec.block_ids))
        ram.manager.complete_load(set(KEYS), context)


def test_never_wrong__a_flipped_byte_is_a_miss_that_is_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv") as ram:
        ram.manager.rates.measured["disk"] = 1e9  # a probe would read the damaged block, too, and it would count twice
        ram.store(KEYS)
        ram.on_disk()
        (segment,) = (tmp_path / "kv" / "kv-0").glob("segment-*")
        with segment.open("r+b") as file:
            at = segment.read_bytes().index(content(KEYS[3]).tobytes())
            file.seek(at + 77)
            byte = segment.read_bytes()[at + 77]
            file.write(bytes([byte ^ 1]))
        assert ram.found(KEYS) == 3
        assert ram.manager.counters()["damaged"] == 1


def test_never_wrong__rows_under_a_copy_that_vllm_forgot_are_not_used_again_before_it_has_ended(tmp_path: Path) -> None:
    """vLLM forgets its copies when its caches are reset, and only later makes sure that the workers have ended them."""
    with Ram(tmp_path / "kv", rows=8) as ram:
        context = ram.begin("stores", KEYS)
        rows = set(ram.manager.prepare_store(KEYS, context).store_spec.block_ids.tolist())
        ram.manager.reset_cache()
        others = names(8, salt=1)
        again = ram.manager.prepare_store(others, ram.begin("others", others))
        assert len(again.keys_to_store) == 2 and not rows & set(again.store_spec.block_ids.tolist())
        for _ in range(ram.manager._steps_in_flight):
            ram.step()
        more = names(6, salt=2)
        assert ram.store(more, "more") == more


def test_never_over_and_never_stuck__a_full_ram_evicts_and_what_has_no_room_is_refused(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv", rows=8) as ram:
        for salt in range(20):
            keys = names(6, salt)
            assert ram.store(keys, f"stores {salt}") == keys
            ram.engine.flush()  # what is being written cannot go
        assert ram.engine.stats()["used_bytes"] <= 8 * ROW_BYTES
        context = ram.begin("copies", names(8, 30))
        assert len(ram.manager.prepare_store(names(8, 30), context).keys_to_store) == 8
        assert ram.manager.prepare_store(names(1, 31), ram.begin("late", names(1, 31))) is None
        ram.manager.complete_store(set(names(8, 30)), context)
        assert ram.found(names(6, 19)) == 6, "from the disk"


def test_never_stuck__a_request_that_ends_while_its_blocks_come_up_leaves_nothing_behind(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv", rows=8) as ram:
        ram.store(KEYS)
        ram.on_disk()
        context = ram.begin("asks", KEYS)
        assert ram.look(KEYS, context) == [RETRY] * 6
        ram.step()
        assert ram.look(KEYS, context)[0] in (RETRY, HIT)
        ram.manager.on_request_finished(context)
        while ram.manager.has_pending_work():
            ram.step()
        assert len(ram.store(names(8, salt=1), "floods")) == 8


def test_never_stuck__blocks_that_do_not_come_up_in_time_are_computed_and_nobody_waits_for_them_for_ever(tmp_path: Path) -> None:
    """A fetch whose request had ended was waited for as long as the engine lived, which then never rested."""
    with Ram(tmp_path / "kv", load_timeout_s=0.2) as ram:
        ram.store(KEYS)
        ram.on_disk()
        ram.manager._engine = Held(ram.engine)
        context, ended = ram.begin("asks", KEYS), ram.begin("ends", KEYS)
        assert ram.look(KEYS, context) == ram.look(KEYS, ended) == [RETRY] * 6
        ram.step()
        ram.manager.on_request_finished(ended)
        assert ram.manager.has_pending_work() and ram.look(KEYS, context) == [RETRY] * 6
        time.sleep(0.3)
        assert not ram.manager.has_pending_work()
        assert ram.look(KEYS, context) == [MISS] * 6
        assert ram.manager.counters()["late_jobs"] == 2


class Held:
    """Memory whose disk says nothing."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def fetch(self, number: int, keys: list[bytes]) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_never_stuck__a_request_that_vllm_did_not_announce_gets_a_miss(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv") as ram:
        from tier import request

        ram.store(KEYS)
        ram.on_disk()
        assert ram.look(KEYS, request("unknown", KEYS)) == [MISS] * 6


def test_warm_restart__another_engine_finds_it_and_a_tier_over_the_same_folder_too(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv") as ram:
        ram.store(KEYS)
    with Ram(tmp_path / "kv") as ram:
        assert ram.found(KEYS) == 6
    with Lab(tmp_path / "kv") as lab:
        assert lab.hits(KEYS) == [True] * 6
        assert lab.load(KEYS).success


def test_private__an_engine_whose_weights_may_change_finds_nothing_from_before_a_reset(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv", config={"enable_sleep_mode": True}) as ram:
        ram.store(KEYS)
        ram.engine.flush()
        ram.manager.reset_cache()
        assert ram.found(KEYS) == 0
        ram.store(KEYS, "again")
        assert ram.found(KEYS, "asks again") == 6


def test_soft_failure__a_reset_drops_ram_and_what_is_on_the_disk_is_still_found(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv") as ram:
        ram.store(KEYS)
        ram.manager.reset_cache()
        assert ram.engine.stats()["used_bytes"] == 0
        assert ram.found(KEYS) == 6


def test_worth_it__what_is_computed_faster_is_a_miss_as_a_whole_and_counted(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv", worth="measured", prefill_tokens_per_s=1e9, disk_gb_per_s=1e-6) as ram:
        ram.store(KEYS)
        assert ram.found(KEYS) == 6, "from RAM, which is always worth it"
        ram.on_disk()
        assert ram.found(KEYS, "again") == 0
        assert ram.manager.counters()["not_worth"] == 6


def test_worth_it__the_disk_is_measured_before_anything_was_loaded(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv", worth="measured") as ram:
        ram.store(KEYS)
        ram.engine.flush()
        end = time.monotonic() + 20
        while not ram.manager.rates.measured:
            assert time.monotonic() < end
            ram.step()
            time.sleep(0.01)
        assert ram.manager.counters()["hits"] == 0
        measured = dict(ram.manager.rates.measured)
    with Ram(tmp_path / "kv", worth="measured") as ram:
        assert ram.manager.rates.measured == measured


def test_worth_it__what_is_computed_behind_a_load_is_no_measure(tmp_path: Path) -> None:
    """vLLM 0.26 does not say where blocks lie. The step that loaded a long prefix and computed one block behind it counted as that block's time."""
    with Ram(tmp_path / "kv") as ram:
        ram.store(KEYS)
        context = ram.begin("loads", [])
        assert ram.look(KEYS, context) == [HIT] * 6
        ram.manager.prepare_load(KEYS, context)
        ram.step("loads")
        ram.manager.complete_load(set(KEYS), context)
        behind = names(1, salt=1)
        stored = ram.manager.prepare_store(behind, context)
        ram.step()
        ram.manager.complete_store(set(stored.keys_to_store), context)
        assert not ram.manager.rates.seconds_by_length


def test_hints__what_is_not_to_be_stored_is_not_and_a_prefetch_loads_anyway(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv", worth="measured", prefill_tokens_per_s=1e9, disk_gb_per_s=1e-6) as ram:
        assert ram.store(KEYS, kv_transfer_params={"kvkeep": {"store": False}}) == []
        ram.store(KEYS, "stores")
        ram.on_disk()
        context = ram.begin("prefetches", KEYS, kv_transfer_params={"kvkeep": {"prefetch": True}})
        assert ram.look(KEYS, context) == [RETRY] * 6
        ram.step()
        while ram.manager.has_pending_work():
            pass
        assert ram.look(KEYS, context) == [HIT] * 6


def test_hints__what_is_pinned_outlives_what_is_not_in_ram(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv", rows=12) as ram:
        ram.store(KEYS, kv_transfer_params={"kvkeep": {"pin": True}})
        for salt in range(1, 8):
            ram.store(names(6, salt), f"stores {salt}")
        hits = ram.manager.counters()["hits"]
        assert ram.found(KEYS) == 6
        assert ram.manager.counters()["hits"] == hits, "none of it from the disk"


def told(ram: Ram, there: dict[Any, set[bytes]]) -> dict[Any, set[bytes]]:
    """Applies what was told to what a listener believes to be there: blocks by medium."""
    for event in ram.manager.take_events():
        blocks = there.setdefault(event.medium, set())
        if event.removed:
            blocks.difference_update(event.keys)
        else:
            blocks.update(event.keys)
    return there


def eventually(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_events__whoever_applies_them_knows_what_is_in_ram_and_on_the_disk(tmp_path: Path) -> None:
    there: dict[Any, set[bytes]] = {}
    with Ram(tmp_path / "kv", rows=8, events=True) as ram:
        ram.store(KEYS)
        ram.engine.flush()
        eventually(lambda: told(ram, there) == {_compat.MEDIUM_OF_RAM: set(KEYS), _compat.MEDIUM: set(KEYS)})
        others = names(8, salt=1)
        ram.store(others, "others")
        ram.engine.flush()
        eventually(lambda: told(ram, there) == {_compat.MEDIUM_OF_RAM: set(others), _compat.MEDIUM: {*KEYS, *others}})
        ram.manager.reset_cache()
        eventually(lambda: told(ram, there)[_compat.MEDIUM_OF_RAM] == set())
        assert ram.found(KEYS) == 6
        eventually(lambda: told(ram, there)[_compat.MEDIUM_OF_RAM] >= set(KEYS))


def test_events__what_an_earlier_process_left_is_told_once_it_comes_up_and_goes_untold_from_the_disk(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv", events=True) as ram:
        ram.store(KEYS)
        ram.engine.flush()
    there: dict[Any, set[bytes]] = {}
    with Ram(tmp_path / "kv", rows=8, events=True) as ram:
        assert told(ram, there) == {}
        assert ram.found(KEYS) == 6
        eventually(lambda: told(ram, there) == {_compat.MEDIUM_OF_RAM: set(KEYS)})
        assert ram.engine.evict_all(10) == 0
        eventually(lambda: told(ram, there) == {_compat.MEDIUM_OF_RAM: set()})


def test_events__nobody_is_told_who_did_not_ask(tmp_path: Path) -> None:
    with Ram(tmp_path / "kv") as ram:
        ram.store(KEYS)
        ram.engine.flush()
        assert not list(ram.manager.take_events())


def test_figures__vllm_gets_each_that_is_declared(tmp_path: Path) -> None:
    from kvkeep.vllm import KvkeepOffloadingSpec

    with Ram(tmp_path / "kv") as ram:
        ram.store(KEYS)
        told = ram.manager.get_stats()
        declared = KvkeepOffloadingSpec.build_metric_definitions({})
        assert {"vllm:kvkeep_ram_used_bytes", "vllm:kvkeep_used_bytes", "vllm:kvkeep_hits"} <= set(declared)
        assert ram.engine.stats()["used_bytes"] == 6 * ROW_BYTES
        assert told is not None


class Driver:
    """Registers memory, as far as it is let."""

    def __init__(self, refuses_after: int = 1 << 30) -> None:
        self.pieces: dict[int, int] = {}
        self._left = refuses_after

    def register(self, address: int, size: int) -> None:
        if not self._left:
            raise RuntimeError("out of lockable memory")
        self._left -= 1
        assert all(other + theirs <= address or address + size <= other for other, theirs in self.pieces.items()), "twice"
        self.pieces[address] = size

    def unregister(self, address: int) -> None:
        del self.pieces[address]


def mapped(rows: int, row_bytes: int) -> Any:
    return _rows.Rows(os.memfd_create("rows"), 0, row_bytes, 0, row_bytes) if not rows else _rows.Rows(_sized(rows * row_bytes), rows, row_bytes, 0, row_bytes)


def _sized(size: int) -> int:
    descriptor = os.memfd_create("rows")
    os.truncate(descriptor, size)
    return descriptor


def test_rows__no_row_lies_in_two_pieces_and_all_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "PIECE_BYTES", 5 * 4096)
    rows, driver = mapped(11, 3 * 4096), Driver()
    registered = _rows.Registered(rows, driver.register, driver.unregister)
    registered.need([10, 0, 5])
    registered._thread.join()
    assert sum(driver.pieces.values()) == 11 * 3 * 4096
    assert all((address - rows.address) % (3 * 4096) == 0 for address in driver.pieces)
    registered.release()
    assert not driver.pieces


def test_rows__what_is_needed_now_is_registered_now_and_a_refusal_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "PIECE_BYTES", 4096)
    monkeypatch.setattr(_rows.threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(_rows.threading.Thread, "join", lambda _: None)
    rows, driver = mapped(8, 4096), Driver(refuses_after=2)
    registered = _rows.Registered(rows, driver.register, driver.unregister)
    registered.need([7])
    assert list(driver.pieces) == [rows.address + 7 * 4096]
    registered.need([3, 4, 5])
    registered.need([6])
    assert len(driver.pieces) == 2
    registered.release()
    assert not driver.pieces


def test_rows__what_engines_left_that_were_killed_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "memory-dead").write_text(f"{dead.pid} 3 8")
    (tmp_path / "memory-nonsense").write_text("")
    place = _rows.publish(tmp_path, "an engine/1", 3, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name] == ["memory-an_engine_1"]


def test_rows__memory_that_does_not_come_is_an_error_that_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="memory-none"):
        _rows.find(tmp_path, "none", 8, lambda: True)
    _rows.publish(tmp_path, "other", 3, 9)
    with pytest.raises(RuntimeError, match="9 rows"):
        _rows.find(tmp_path, "other", 8, lambda: True)
