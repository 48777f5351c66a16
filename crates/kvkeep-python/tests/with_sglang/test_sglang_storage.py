"""The backend under SGLang's own controller, factory and abstract classes: the eight promises."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lab import LAYERS, PAGE_TOKENS, Lab, begin, config, flip, model, page_bytes, prompt, segments
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, HiCacheStorageExtraInfo, HiCacheStorageFailureInjector
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from slow_disk import SlowDisk, is_possible

from kvkeep import DiskLockedError
from kvkeep.sglang import KvkeepStorage

HERE = Path(__file__).parent
LAYOUTS = [("mha", layout) for layout in ("layer_first", "page_first", "page_first_direct", "page_head")]
LAYOUTS += [("mla", layout) for layout in ("layer_first", "page_first", "page_first_direct")]
PAGE_BYTES = 2 * LAYERS * PAGE_TOKENS * 2 * 64 * 2


def disk_use(root: Path) -> int:
    """As `du` sees it."""
    return sum(path.lstat().st_blocks * 512 for path in [root, *root.rglob("*")])


def child(root: Path, program: str, **settings: object) -> list[str]:
    """A process with a lab of its own."""
    text = f"import sys; sys.path.insert(0, {str(HERE)!r})\nfrom pathlib import Path\nfrom lab import Lab, prompt\n"
    return [sys.executable, "-W", "ignore", "-c", f"{text}root, settings = Path({str(root)!r}), {settings!r}\n{program}"]


def test_it_is_a_backend_of_sglang_with_the_parameters_of_every_method() -> None:
    assert issubclass(KvkeepStorage, HiCacheStorage)
    assert not KvkeepStorage.__abstractmethods__
    for name, theirs in inspect.getmembers(HiCacheStorage, inspect.isfunction):
        ours = getattr(KvkeepStorage, name)
        if not name.startswith("_") and ours is not theirs:
            expected, found = (list(inspect.signature(function).parameters) for function in (theirs, ours))
            assert found[: len(expected)] == expected, name


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
@pytest.mark.parametrize("v1", [True, False])
def test_never_wrong__what_comes_back_is_what_was_stored_in_every_layout(tmp_path: Path, kind: str, layout: str, v1: bool) -> None:
    with Lab(tmp_path / "kv", kind, layout, v1) as lab:
        assert lab.store(prompt(40)) == 40 * PAGE_TOKENS
        assert lab.load(prompt(40)) == 40 * PAGE_TOKENS
        assert lab.load(prompt(40, salt=1)) == 0
        assert lab.storage.counters()["hits"] == 40


def test_never_wrong__a_prompt_of_several_batches_comes_back_and_ends_where_another_begins(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        assert lab.store(prompt(200)) == 200 * PAGE_TOKENS  # SGLang asks for 128 pages at a time
        assert lab.load(prompt(200)) == 200 * PAGE_TOKENS
        assert lab.load(prompt(150) + prompt(50, salt=1)) == 150 * PAGE_TOKENS


@pytest.mark.parametrize("v1", [True, False])
def test_never_wrong__a_flipped_byte_is_a_miss_that_is_counted_and_what_is_before_it_is_kept(tmp_path: Path, v1: bool) -> None:
    with Lab(tmp_path / "kv", v1=v1) as lab:
        lab.store(prompt(40))
        keys = lab.keys(prompt(40))
        flip(tmp_path / "kv", page_bytes(keys[7], PAGE_BYTES)[: PAGE_BYTES // 2].numpy().tobytes())
        assert lab.hits(prompt(40)) == 40 * PAGE_TOKENS, "nobody has read it yet"
        assert lab.load(prompt(40)) == 7 * PAGE_TOKENS
        assert lab.storage.counters()["damaged"] == 1
        assert lab.hits(prompt(40)) == 7 * PAGE_TOKENS, "a gap ends a prefix"
        assert lab.store(prompt(40)) == 40 * PAGE_TOKENS
        assert lab.load(prompt(40)) == 40 * PAGE_TOKENS, "it was computed and stored again"


def test_never_wrong__what_was_swapped_between_two_pages_is_found_out(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(prompt(2))
        (path,) = segments(tmp_path / "kv")
        data = bytearray(path.read_bytes())
        whole = PAGE_BYTES
        one, other = (data.index(page_bytes(key, whole).numpy().tobytes()) for key in lab.keys(prompt(2)))
        data[one : one + whole], data[other : other + whole] = data[other : other + whole], data[one : one + whole]
        path.write_bytes(data)
        assert lab.load(prompt(2)) == 0
        assert lab.storage.counters()["damaged"] >= 1


def test_never_wrong__a_page_that_did_not_come_leaves_its_place_in_ram_as_it_was(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(prompt(4))
        keys = lab.keys(prompt(4))
        flip(tmp_path / "kv", page_bytes(keys[2], PAGE_BYTES).numpy().tobytes())
        indices = lab.put(["other"] * 4)
        assert lab.storage.batch_get_v1(keys, indices) == [True, True, False, True] or lab.storage.batch_get_v1(keys, indices)[:3] == [True, True, False]
        assert lab.right(["other"] * 4, indices)[2]


def test_never_stuck__behind_a_page_that_is_missing_nothing_more_is_read_or_written(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", buffer_mb=0.05) as lab:  # of two pages
        keys = lab.keys(prompt(40))
        lab.store(prompt(40))
        indices = lab.put(["other"] * 41)
        came = lab.storage.batch_get_v1(["missing", *keys], indices)
        assert not came[0] and sum(came) <= 1, "what was under way with it"
        assert lab.storage.counters()["hits"] <= 1


def test_never_over__the_folder_stays_under_its_cap_as_du_sees_it(tmp_path: Path) -> None:
    root, cap = tmp_path / "kv", 12 << 20
    with Lab(root, capacity_gb=cap / (1 << 30)) as lab:
        for salt in range(20):
            assert lab.store(prompt(60, salt)) == 60 * PAGE_TOKENS
            assert disk_use(root) <= cap, salt
        assert lab.storage.counters()["evictions"] > 500
        assert lab.load(prompt(60, 19)) == 60 * PAGE_TOKENS, "it evicts and admits"
    assert disk_use(root) <= cap


def test_never_stuck__readers_and_writers_in_several_threads_are_all_served(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", buffer_mb=0.05) as lab:  # of two pages
        wrong: list[object] = []

        def work(salt: int) -> None:
            keys = lab.keys(prompt(10, salt))
            indices = lab.put(keys)
            for _ in range(5):
                if lab.storage.batch_set_v1(keys, indices) != [True] * 10 or lab.storage.batch_exists(keys) != 10:
                    wrong.append(("stored", salt))
                target = lab.put(["other"] * 10)
                if lab.storage.batch_get_v1(keys, target) != [True] * 10 or lab.right(keys, target) != [True] * 10:
                    wrong.append(("loaded", salt))
                lab.host.free(target)

        threads = [threading.Thread(target=work, args=(salt,)) for salt in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads) and not wrong, wrong
        assert lab.storage._pager is not None and [len(free) for free in lab.storage._pager._free.values()] == [2, 2], "no row is lost"


def test_read_your_writes__what_was_stored_is_there_at_once(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        for salt in range(10):
            lab.store(prompt(30, salt), flush=False)
            assert lab.load(prompt(30, salt)) == 30 * PAGE_TOKENS


def test_warm_restart__another_life_finds_it_and_it_is_written_once(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(prompt(40))
    with Lab(tmp_path / "kv") as lab:
        assert lab.load(prompt(40)) == 40 * PAGE_TOKENS
        assert lab.store(prompt(40)) == 40 * PAGE_TOKENS
        assert lab.storage.counters()["written"] == 0


def test_warm_restart__after_kill_9_what_was_flushed_is_there(tmp_path: Path) -> None:
    program = "lab = Lab(root, **settings)\nlab.store(prompt(40))\nprint('stored', flush=True)\nfor salt in range(1, 100): lab.store(prompt(20, salt), flush=False)"
    process = subprocess.Popen(child(tmp_path / "kv", program), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.strip() == "stored" for line in iter(process.stdout.readline, ""))
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -9, "it was at work"
    with Lab(tmp_path / "kv") as lab:
        assert lab.load(prompt(40)) == 40 * PAGE_TOKENS
        assert disk_use(tmp_path / "kv") <= 0.1 * (1 << 30)


def test_one_folder_belongs_to_one_process(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv"), pytest.raises(DiskLockedError):
        Lab(tmp_path / "kv")


@pytest.mark.skipif(not is_possible(), reason="needs root on Linux, x86-64")
def test_soft_failure__a_disk_that_hangs_holds_a_call_for_its_deadline_and_no_late_read_touches_a_page(tmp_path: Path) -> None:
    """A read that the kernel has begun cannot be called back: if it went into SGLang's page, it would write over what is there by then."""
    program = """
import time
lab = Lab(root, **settings)
lab.store(prompt(40))
keys, other = lab.keys(prompt(40)), lab.keys(prompt(10, 1))
target, source = lab.put(["other"] * 40), lab.put(other)
print("ready", flush=True); input()
began = time.monotonic(); came = lab.storage.batch_get_v1(keys, target); took = time.monotonic() - began
again = time.monotonic(); there = lab.storage.batch_exists(keys); took_again = time.monotonic() - again
writing = time.monotonic(); lab.storage.batch_set_v1(other, source); wrote = time.monotonic() - writing
print("waited", round(took, 2), round(took_again, 2), round(wrote, 2), sum(came), there, flush=True); input()
time.sleep(1)
print("pages", sum(lab.right(["other"] * 40, target)), flush=True)
end = time.monotonic() + 30
while lab.load(prompt(40)) != 640 and time.monotonic() < end: time.sleep(0.2)
print("back", lab.load(prompt(40)), flush=True)
lab.controller.detach_storage_backend()
"""
    settings = {"load_timeout_s": 2, "store_timeout_s": 2, "flush_timeout_s": 2}
    disk = SlowDisk(child(tmp_path / "kv", program, **settings), "/segment-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stdin, stdout = disk.process.stdin, disk.process.stdout
    assert stdin is not None and stdout is not None

    def said(word: str) -> list[str]:
        while line := stdout.readline().split():
            if line[0] == word:
                return line[1:]
        raise AssertionError(f"it never said {word}")

    def go() -> None:
        stdin.write("\n")
        stdin.flush()

    said("ready")
    disk.hang()
    go()
    took, looked, wrote, came, there = said("waited")
    assert 0.9 < float(took) < 2.5 and float(looked) < 0.5 and float(wrote) < 2.5, (took, looked, wrote)
    assert (came, there) == ("0", "0"), "what hangs is a miss"
    assert disk.held > 0
    disk.go_on()
    go()
    assert said("pages") == ["40"], "a late read has written into a page"
    assert said("back") == ["640"]
    assert disk.process.wait(30) == 0


def test_soft_failure__under_sglangs_failure_injector_a_call_is_right_or_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.3")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.01")
    with Lab(tmp_path / "kv") as lab:
        assert isinstance(lab.storage, HiCacheStorageFailureInjector)
        lab.storage._opened = lab.storage._backend._opened  # what the lab flushes
        stored = loaded = 0
        for salt in range(30):
            stored += lab.store(prompt(20, salt))
            loaded += lab.load(prompt(20, salt))  # the lab compares each page that came
        assert 0 < loaded < stored < 30 * 20 * PAGE_TOKENS
        assert lab.storage.get_stats().prefetch_pgs


def test_memory__a_backend_can_be_detached_and_attached_while_the_engine_lives(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(prompt(20))
        for _ in range(3):
            storage = lab.storage
            lab.controller.detach_storage_backend()
            with pytest.raises(RuntimeError, match="closed"):
                storage.batch_exists(lab.keys(prompt(20)))
            storage.close()
            lab.controller.attach_storage_backend("dynamic", 256, str(tmp_path / "model"), config(tmp_path / "kv"))
            lab.storage = lab.controller.storage_backend
            assert lab.load(prompt(20)) == 20 * PAGE_TOKENS


def test_clear__nothing_is_left_also_for_the_next_life(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv") as lab:
        lab.store(prompt(40))
        lab.storage.clear()
        assert lab.hits(prompt(40)) == 0
        assert lab.store(prompt(20)) == 20 * PAGE_TOKENS
    with Lab(tmp_path / "kv") as lab:
        assert lab.hits(prompt(40)) == lab.load(prompt(40)) == 20 * PAGE_TOKENS


def test_single_pages__they_are_set_and_got_as_tensors_and_a_wrong_size_is_an_error(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", v1=False) as lab:
        page = torch.arange(PAGE_BYTES // 2, dtype=torch.int16).view(torch.bfloat16)
        assert lab.storage.set("a", page) and lab.storage.exists("a") and not lab.storage.exists("b")
        target = torch.zeros_like(page)
        assert lab.storage.get("a", target) is target
        got = lab.storage.get("a")
        assert got is not None
        assert all(bool((one.view(torch.int16) == page.view(torch.int16)).all()) for one in (target, got))
        assert lab.storage.get("b", target) is None
        with pytest.raises(ValueError, match="bytes"):
            lab.storage.set("c", page[:-1])
    with Lab(tmp_path / "kv") as lab:
        with pytest.raises(ValueError, match="interface_v1"):
            lab.storage.get("a", target)
        with pytest.raises(ValueError, match="indices"):
            lab.storage.batch_set_v1(["a", "b"], torch.arange(PAGE_TOKENS))


def test_settings__what_is_missing_or_unknown_or_nonsense_is_named(tmp_path: Path) -> None:
    begin(tmp_path / "model")
    for wrong, match in (({"capacity_mb": 1}, "capacity_mb"), ({"worth": "maybe"}, "worth"), ({"load_timeout_s": 0}, "load_timeout_s"),
                         ({"buffer_mb": "x"}, "buffer_mb"), ({"prefill_tokens_per_s": -1}, "prefill_tokens_per_s"), ({"ttl_s": True}, "ttl_s")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            made(tmp_path, **wrong)
    with pytest.raises(ValueError, match="root_dir"):
        made(tmp_path, root_dir=None)
    with pytest.raises(ValueError, match="tp_lcm_size"):
        made(tmp_path, split=True)


def made(tmp_path: Path, split: bool = False, **settings: object) -> HiCacheStorage:
    """A backend from SGLang's factory, without pools."""
    extra = {name: value for name, value in config(tmp_path / "kv", **settings).items() if value is not None}
    said = HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, str(model(tmp_path / "model")), should_split_heads=split, extra_config=extra)
    return StorageBackendFactory.create_backend("dynamic", said, None)


def test_worth_it__a_load_slower_than_computing_is_a_miss_and_a_few_pages_show_when_the_disk_is_faster(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", prefill_tokens_per_s=10_000) as lab:
        lab.store(prompt(40))
        rates = lab.storage.rates
        rates.measured["disk"] = 1e5
        assert lab.hits(prompt(40)) == 0
        assert lab.storage.counters()["not_worth"] == 40
        end = time.monotonic() + 20
        while lab.hits(prompt(40)) == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert lab.load(prompt(40)) == 40 * PAGE_TOKENS, "the disk was found to be fast"
        measured = dict(rates.measured)
    with Lab(tmp_path / "kv", prefill_tokens_per_s=10_000) as lab:
        assert lab.storage.rates.measured == pytest.approx(measured, rel=0.5)


def test_worth_it__where_nobody_said_how_fast_the_engine_is_every_load_is_made(tmp_path: Path) -> None:
    for settings in ({}, {"worth": "always", "prefill_tokens_per_s": 1e9}):
        with Lab(tmp_path / "kv", **settings) as lab:
            lab.store(prompt(40))
            lab.storage.rates.measured["disk"] = 1.0
            assert lab.load(prompt(40)) == 40 * PAGE_TOKENS


def test_worth_it__what_lies_behind_a_prefix_is_judged_with_it(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", prefill_tokens_per_s=10_000) as lab:
        lab.store(prompt(40))
        keys, rates = lab.keys(prompt(40)), lab.storage.rates
        rates.measured["disk"] = 20e6
        # Computing is fast at the beginning, and slow far behind.
        rates.seconds_by_length = {bucket: 1e-5 if bucket < 8 else 1e-3 for bucket in range(13)}
        assert lab.storage.batch_exists(keys[:8], HiCacheStorageExtraInfo(prefix_keys=None)) == 0
        assert lab.storage.batch_exists(keys[8:], HiCacheStorageExtraInfo(prefix_keys=keys[:8])) == 32


def test_figures__sglang_is_told_of_each_transfer_once_and_its_metrics_have_the_rest(tmp_path: Path) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    from sglang.srt.observability.metrics_collector import StorageMetrics, StorageMetricsCollector

    with Lab(tmp_path / "kv", metrics=True) as lab:
        lab.store(prompt(40))
        lab.load(prompt(40))
        told = lab.storage.get_stats()
        assert isinstance(told, StorageMetrics)
        assert (told.prefetch_pgs, told.backup_pgs) == ([40], [40])
        assert len(told.prefetch_bandwidth) == 1 and told.prefetch_bandwidth[0] > 0 and told.backup_bandwidth[0] > 0
        StorageMetricsCollector({"storage_backend": "dynamic"}).log_storage_metrics(told)
        assert lab.storage.get_stats().prefetch_pgs == []
        said = prometheus.generate_latest().decode()
        assert 'sglang:kvkeep_written_total{dp_rank="0",pp_rank="0",storage_backend="kvkeep",tp_rank="0"} 40.0' in said
        assert "sglang:kvkeep_used_bytes{" in said and "sglang:kvkeep_damaged_total{" in said


def test_ttl__what_was_written_is_gone_after_it(tmp_path: Path) -> None:
    with Lab(tmp_path / "kv", ttl_s=0.5) as lab:
        lab.store(prompt(10))
        assert lab.hits(prompt(10)) == 10 * PAGE_TOKENS
        time.sleep(0.6)
        assert lab.hits(prompt(10)) == 0


def test_encrypted__what_is_on_the_disk_says_nothing_and_another_key_finds_nothing(tmp_path: Path) -> None:
    for name, key in (("one", "11" * 32), ("other", "22" * 32)):
        (tmp_path / name).write_text(key)
        (tmp_path / name).chmod(0o600)
    with Lab(tmp_path / "kv", key_file=str(tmp_path / "one")) as lab:
        lab.store(prompt(10))
        assert lab.load(prompt(10)) == 10 * PAGE_TOKENS
        content = page_bytes(lab.keys(prompt(10))[0], PAGE_BYTES).numpy().tobytes()[:4096]
        assert not any(content in path.read_bytes() for path in segments(tmp_path / "kv"))
