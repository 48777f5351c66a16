"""Several pools of one model: KV, and what must be there beside it. And the records that their pages are kept in."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import LAYERS, PAGE_TOKENS, TOKENS, as_key, begin, config, device_pool, host_pool, model, prompt
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_storage_hash_str

from kvkeep import _kvkeep
from kvkeep.sglang import _settings
from kvkeep.sglang._pager import Pager, record_bytes
from kvkeep.sglang._pages import Page

KEYS = [f"{number:064x}" for number in range(24)]


def mamba_pool(layout: str = "page_first") -> MambaPoolHost:
    slots, state = 32, (torch.float32, (2, 40, 48))
    info = MambaStateBufferInfo(temporal=torch.zeros((LAYERS, slots, *state[1]), dtype=state[0]), conv=(torch.zeros((LAYERS, slots, 7, 33), dtype=torch.bfloat16),))
    return MambaPoolHost(info, 2.0, 0, device_capacity=slots, pin_memory=False, layout=layout)


def pools() -> dict[PoolName, Any]:
    """Real ones: KV, a draft's, and states of another size."""
    return {PoolName.KV: host_pool(device_pool("mha"), "mha", "page_first"), PoolName.DRAFT: host_pool(device_pool("mla"), "mla", "layer_first"), PoolName.MAMBA: mamba_pool()}


def said(tmp_path: Path, **settings: Any) -> HiCacheStorageConfig:
    return HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, str(model(tmp_path / "model")), extra_config=config(tmp_path / "kv", **settings))


def attached(tmp_path: Path, of: dict[PoolName, Any], **settings: Any) -> Any:
    begin(tmp_path / "model")
    storage = StorageBackendFactory.create_backend("dynamic", said(tmp_path, **settings), None)
    register(storage, of)
    storage.on_host_pools_registered()
    return storage


def register(storage: Any, of: dict[PoolName, Any]) -> None:
    storage.register_mem_pool_host(of[PoolName.KV])
    for name, pool in of.items():
        storage.register_mem_host_pool_v2(pool, name)


def fill(pool: Any, count: int, seed: int) -> tuple[torch.Tensor, list[bytes]]:
    """Pages with contents of their own; where they are, and what they are."""
    indices = torch.arange(count * pool.page_size)
    generator, contents = np.random.default_rng(seed), []
    for at in range(count):
        page = pool.get_dummy_flat_data_page()
        data = torch.from_numpy(generator.integers(0, 256, page.numel() * page.element_size(), np.uint8))
        pool.set_from_flat_data_page(at * pool.page_size, data.view(page.dtype))
        contents.append(data.numpy().tobytes())
    return indices, contents


def contents(pool: Any, count: int) -> list[bytes]:
    return [pool.get_data_page(at * pool.page_size).contiguous().view(torch.uint8).numpy().tobytes() for at in range(count)]


def transfer(name: PoolName, keys: list[str], indices: torch.Tensor | None = None, policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES, **more: Any) -> PoolTransfer:
    return PoolTransfer(name=name, keys=keys, host_indices=indices, hit_policy=policy, **more)


def test_never_wrong__pages_of_several_pools_come_back_under_the_same_keys_each_into_its_own(tmp_path: Path) -> None:
    of = pools()
    storage = attached(tmp_path, of)
    filled = {name: fill(pool, 8, seed) for seed, (name, pool) in enumerate(of.items())}
    stored = storage.batch_set_v2([transfer(name, KEYS[:8], indices) for name, (indices, _) in filled.items()])
    assert stored == {name: [True] * 8 for name in of}
    storage.close()

    fresh = pools()
    storage = attached(tmp_path, fresh)
    came = storage.batch_get_v2([transfer(name, KEYS[:9], torch.arange(9 * pool.page_size)) for name, pool in fresh.items()])
    assert came == {name: [True] * 8 + [False] for name in fresh}
    assert {name: contents(pool, 8) for name, pool in fresh.items()} == {name: was for name, (_, was) in filled.items()}
    storage.close()


def test_never_wrong__a_pool_whose_pages_sglang_does_not_point_to_is_copied_flat(tmp_path: Path) -> None:
    of = {PoolName.KV: host_pool(device_pool("mha"), "mha", "page_first"), PoolName.MAMBA: mamba_pool()}
    of[PoolName.MAMBA].slot_state_device_tensors = (torch.zeros(1),)  # then SGLang refuses to say where a page is
    of[PoolName.MAMBA].slot_state_buffers = ()
    storage = attached(tmp_path, of)
    indices, was = fill(of[PoolName.MAMBA], 4, 1)
    assert storage.batch_set_v2([transfer(PoolName.MAMBA, KEYS[:4], indices)]) == {PoolName.MAMBA: [True] * 4}
    fill(of[PoolName.MAMBA], 4, 2)
    assert storage.batch_get_v2([transfer(PoolName.MAMBA, KEYS[:4], indices)]) == {PoolName.MAMBA: [True] * 4}
    assert contents(of[PoolName.MAMBA], 4) == was
    storage.close()


@pytest.mark.parametrize("seed", range(20))
def test_exists__every_length_of_a_prefix_that_is_legal_is_named_as_sglangs_own_backend_names_it(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path / "files"))
    generator = random.Random(seed)
    of = pools()
    storage = attached(tmp_path, of)
    theirs = HiCacheFile(said(tmp_path))
    register(theirs, of)
    for name, pool in of.items():
        keys = [key for key in KEYS if generator.random() < (0.97 if name == PoolName.KV else 0.7)]
        what = [transfer(name, keys, torch.arange(len(keys) * pool.page_size))]
        assert all(storage.batch_set_v2(what)[name]) and all(theirs.batch_set_v2(what)[name])
    for policies in ((PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES), (PoolHitPolicy.TRAILING_PAGES, PoolHitPolicy.TRAILING_PAGES)):
        asked = [transfer(name, KEYS[: generator.randint(1, 3)], policy=policy) for name, policy in zip((PoolName.DRAFT, PoolName.MAMBA), policies)]
        expected, found = (backend.batch_exists_v2(KEYS, asked) for backend in (theirs, storage))
        assert (found.kv_hit_pages, found.restorable_prefix_pages) == (expected.kv_hit_pages, expected.restorable_prefix_pages)
        if expected.restorable_prefix_pages:
            assert found.extra_pool_hit_pages == expected.extra_pool_hit_pages
    assert storage.batch_exists_v2(KEYS).kv_hit_pages == theirs.batch_exists_v2(KEYS).kv_hit_pages == storage.batch_exists(KEYS)
    storage.close()


def test_exists__groups_of_pages_are_a_verdict_of_their_own_and_forbid_nothing(tmp_path: Path) -> None:
    of = pools()
    storage = attached(tmp_path, of)
    groups = [f"{number:x}" for number in range(6)]
    storage.batch_set_v2([transfer(PoolName.KV, KEYS, torch.arange(24 * PAGE_TOKENS)), transfer(PoolName.DRAFT, groups[:5], torch.arange(5 * PAGE_TOKENS))])
    asked = transfer(PoolName.DRAFT, groups, policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=8, group_pages=2)
    found = storage.batch_exists_v2(KEYS, [asked])
    assert found.kv_hit_pages == 24 and found.extra_pool_hit_pages[PoolName.DRAFT] == 16, "two whole groups of three"
    storage.close()


def test_exists__of_an_anchor_that_holds_nothing_the_pools_beside_it_decide(tmp_path: Path) -> None:
    anchor, beside = LogicalHostPool(512, PAGE_TOKENS), host_pool(device_pool("mla"), "mla", "page_first")
    storage = attached(tmp_path, {PoolName.KV: anchor, PoolName.INDEXER: beside})
    indices = torch.arange(8 * PAGE_TOKENS)
    assert storage.batch_set_v1(KEYS[:8], indices) == [True] * 8
    storage.batch_set_v2([transfer(PoolName.INDEXER, KEYS[:5], indices[: 5 * PAGE_TOKENS])])
    found = storage.batch_exists_v2(KEYS[:8], [transfer(PoolName.INDEXER, KEYS[:8])])
    assert found.kv_hit_pages == 5
    storage.close()


def hybrid(tmp_path: Path, of: dict[PoolName, Any], **settings: Any) -> HybridCacheController:
    """SGLang's controller of several pools, as its servers have it."""
    begin(tmp_path / "model")
    device = device_pool("mha")
    entries = [PoolEntry(name, pool, device, lambda layer: layer, is_primary_index_anchor=name == PoolName.KV) for name, pool in of.items()]
    return HybridCacheController(
        PagedTokenToKVPoolAllocator(TOKENS, PAGE_TOKENS, torch.bfloat16, "cpu", device, False), HostPoolGroup(entries), PAGE_TOKENS, torch.distributed.group.WORLD,
        threading.Event(), write_policy="write_through", io_backend="direct", storage_backend="dynamic", model_name=str(tmp_path / "model"),
        storage_backend_extra_config=config(tmp_path / "kv", **settings),
    )  # fmt: skip


def test_hybrid__sglangs_controller_stores_and_restores_kv_with_the_state_at_its_end(tmp_path: Path) -> None:
    of = {PoolName.KV: host_pool(device_pool("mha"), "mha", "page_first"), PoolName.MAMBA: mamba_pool()}
    key = as_key(prompt(12))
    keys = list(get_storage_hash_str(key, None, page_size=PAGE_TOKENS))
    controller = hybrid(tmp_path, of)
    kv = fill(of[PoolName.KV], 8, 1)
    state = fill(of[PoolName.MAMBA], 1, 2)
    last = lambda indices: transfer(PoolName.MAMBA, [keys[7]], indices, PoolHitPolicy.TRAILING_PAGES)  # noqa: E731
    controller.write_storage(kv[0], key, hash_value=keys[:8], extra_pools=[last(state[0])])
    assert controller.ack_backup_queue.get(timeout=60).completed_tokens == 8 * PAGE_TOKENS
    controller.detach_storage_backend()

    of = {PoolName.KV: host_pool(device_pool("mha"), "mha", "page_first"), PoolName.MAMBA: mamba_pool()}
    controller = hybrid(tmp_path, of)
    controller.prefetch(CacheRequestHandle("r", 0), key, extra_pools=[transfer(PoolName.MAMBA, [keys[11]], torch.tensor([3]), PoolHitPolicy.TRAILING_PAGES)])
    operation = controller.prefetch_hit_queue.get(timeout=60)
    assert operation.storage_hit_count == 8 * PAGE_TOKENS and operation.pool_storage_result.restorable_prefix_pages == [8], "there is one state"
    operation.host_indices = torch.arange(8 * PAGE_TOKENS)
    controller.prefetch_buffer.put(operation)
    acks: list[Any] = []
    while not acks or not acks[-1].completed_req:
        acks.append(controller.ack_prefetch_queue.get(timeout=60))
    assert max(ack.completed_tokens or 0 for ack in acks) == 8 * PAGE_TOKENS
    assert [ack.pool_hits[PoolName.MAMBA] for ack in acks if ack.pool_hits] == [1]
    assert contents(of[PoolName.KV], 8) == kv[1] and contents(of[PoolName.MAMBA], 4)[3] == state[1][0]
    controller.detach_storage_backend()


def test_a_pool_that_comes_late_is_served_from_the_same_folder(tmp_path: Path) -> None:
    of = pools()
    late = of.pop(PoolName.MAMBA)
    storage = attached(tmp_path, of)
    storage.register_mem_host_pool_v2(late, PoolName.MAMBA)
    indices, was = fill(late, 4, 1)
    assert all(storage.batch_set_v2([transfer(PoolName.MAMBA, KEYS[:4], indices)])[PoolName.MAMBA])
    fill(late, 4, 2)
    assert all(storage.batch_get_v2([transfer(PoolName.MAMBA, KEYS[:4], indices)])[PoolName.MAMBA])
    assert contents(late, 4) == was
    storage.close()


def test_worth_it__of_states_only_the_last_ones_are_loaded_and_counted(tmp_path: Path) -> None:
    of = pools()
    storage = attached(tmp_path, of, prefill_tokens_per_s=10_000)
    storage.batch_set_v2([transfer(name, KEYS, torch.arange(24 * pool.page_size)) for name, pool in of.items()])
    state, kv = 46_080 + 1_386, 24_576
    asked = transfer(PoolName.MAMBA, KEYS[-1:], policy=PoolHitPolicy.TRAILING_PAGES)
    # Computing 384 tokens takes 38 ms. Enough for all KV and one state, and not for a state of each page.
    storage.rates.measured["disk"] = (24 * kv + 2 * state) / 0.0115
    assert storage.batch_exists_v2(KEYS, [asked]).kv_hit_pages == 24
    asked.hit_policy = PoolHitPolicy.ALL_PAGES
    assert storage.batch_exists_v2(KEYS, [asked]).kv_hit_pages == 0
    storage.close()


def test_records__any_pages_in_any_pieces_come_back(tmp_path: Path) -> None:
    generator = random.Random(1)
    settings = _settings.read(config(tmp_path / "kv", buffer_mb=0.1))
    for turn, record in enumerate((4096, 12288, 65536)):
        namespace = _kvkeep.Namespace("m", (1, 1, record // 2, record // 2, 1), _kvkeep.DTYPES.index("u8"), False, (str(turn), "sglang", "", ""))
        pager = Pager(str(tmp_path / str(turn)), record, namespace, settings, lambda *_: None)
        memory = np.random.default_rng(turn).integers(0, 256, 1 << 20, np.uint8)
        target = np.zeros_like(memory)
        written, read, at = [], [], 0
        for number in range(30):
            sizes = [generator.randint(1, 9000) for _ in range(generator.randint(1, 4))]
            starts = [at + sum(sizes[:place]) for place in range(len(sizes))]
            at += sum(sizes)
            for pages, array in ((written, memory), (read, target)):
                pages.append(Page(number.to_bytes(32, "big"), [(array.ctypes.data + start, size) for start, size in zip(starts, sizes)]))
        assert pager.write(written) == [True] * 30
        assert pager.read(read) == [True] * 30
        assert (target[:at] == memory[:at]).all() and not target[at:].any(), "not a byte beside them"
        pager.close()


def test_private__a_record_has_nothing_in_it_of_the_page_that_was_in_its_place_before(tmp_path: Path) -> None:
    """Pages go to the disk through memory that is used again. What a short page left free of it held the end of a longer one, of whomever that was."""
    settings = _settings.read(config(tmp_path / "kv", buffer_mb=0.001))  # of two records
    namespace = _kvkeep.Namespace("m", (1, 1, 4096, 4096, 1), _kvkeep.DTYPES.index("u8"), False, ("x", "sglang", "", ""))
    pager = Pager(str(tmp_path / "kv"), 8192, namespace, settings, lambda *_: None)
    long, short = np.full(8192, 0xAB, np.uint8), np.full(100, 0xCD, np.uint8)
    for name, array in [(b"a", long), (b"b", long), (b"c", short), (b"d", short)]:
        assert pager.write([Page(name * 32, [(array.ctypes.data, array.nbytes)])]) == [True]
    pager.close()
    written = b"".join(path.read_bytes() for path in sorted((tmp_path / "kv").glob("segment-*")))
    assert written.count(short.tobytes()) == 2 and written.count(long.tobytes()) == 2
    assert written.count(short.tobytes() + bytes(8192 - 100)) == 2


def test_records__they_waste_little_whatever_pools_there_are() -> None:
    generator = random.Random(1)
    for _ in range(500):
        sizes = [int(2 ** generator.uniform(12, 28)) for _ in range(generator.randint(1, 4))]
        record = record_bytes(sizes)
        assert record % 4096 == 0 and 0 < record <= (4 << 20) + 4096
        taken, whole = (sum(size * -(-page // size) for page in sizes) for size in (record, 4096))
        assert taken <= 1.3 * whole, (sizes, record)
    assert record_bytes([8 << 20]) == 4 << 20 and record_bytes([1 << 20]) == 1 << 20 and record_bytes([9000]) == 12288
