"""kvkeep's RAM as vLLM's scheduler and one worker see it, without an engine: a manager, and the rows mapped as a worker maps them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from tier import CHUNK_TOKENS, ROW_BYTES, content, engine_config, offloading_spec, request
from vllm.v1.kv_offload.base import LookupResult, ScheduleEndContext

from kvkeep import _kvkeep
from kvkeep._engines.worth import RatesFile
from kvkeep.vllm import _identity, _rows
from kvkeep.vllm._manager import KvkeepManager
from kvkeep.vllm._settings import RamSettings


class Ram:
    def __init__(self, root: Path, rows: int = 16, events: bool = False, config: dict[str, Any] | None = None, **settings: Any) -> None:
        made = RamSettings.read({"root_dir": str(root), "capacity_gb": 0.1, "worth": "always", **settings})
        vllm_config = engine_config(root.parent / "model", **config or {})
        namespace, identity = _identity.namespace(made, vllm_config, offloading_spec(), ROW_BYTES)
        times = (made.load_timeout_s, made.flush_timeout_s)
        self.engine = _kvkeep.EngineRam(namespace, (rows * ROW_BYTES, made.eviction_policy), made.tiers(vllm_config, rows * ROW_BYTES), times, events)
        descriptor, count = self.engine.memory()
        assert count == rows
        place = _rows.publish(root, "lab", descriptor, rows)
        file = RatesFile(root / "rates.json", identity)
        self.manager = KvkeepManager(
            self.engine, made, vllm_config, ROW_BYTES, [CHUNK_TOKENS], file, identity, closed=lambda: place.unlink(missing_ok=True)
        )
        mapped = _rows.Rows(_rows.find(root, "lab", rows, lambda: False), rows, ROW_BYTES, 0, ROW_BYTES)
        self.rows = mapped.create_next_worker_view(ROW_BYTES).numpy()

    def __enter__(self) -> Ram:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.shutdown()

    def begin(self, name: str, keys: list[bytes], **fields: Any) -> Any:
        context = request(name, keys, **fields)
        self.manager.on_new_request(context)
        return context

    def step(self, *new: str) -> None:
        self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=new, preempted_req_ids=[]))

    def look(self, keys: list[bytes], context: Any) -> list[LookupResult]:
        return [self.manager.lookup(key, context) for key in keys]

    def write(self, stored: Any) -> None:
        """What a worker does with the output of `prepare_store`."""
        for key, row in zip(stored.keys_to_store, stored.store_spec.block_ids):
            self.rows[row] = content(key)

    def store(self, keys: list[bytes], name: str = "stores", **fields: Any) -> list[bytes]:
        """A request that computes these; says which were stored."""
        context = self.begin(name, keys, **fields)
        stored = self.manager.prepare_store(keys, context)
        if stored is not None:
            self.write(stored)
            self.manager.complete_store(set(stored.keys_to_store), context)
        self.manager.on_request_finished(context)
        return stored.keys_to_store if stored is not None else []

    def found(self, keys: list[bytes], name: str = "asks", at_most: float = 20) -> int:
        """A request that loads what there is from the first block on, as vLLM's scheduler asks for it; says how many blocks that were."""
        context = self.begin(name, keys)
        end = time.monotonic() + at_most
        while True:
            results = self.look(keys, context)
            count = next((at for at, result in enumerate(results) if result is LookupResult.MISS), len(keys))
            if all(result is LookupResult.HIT for result in results[:count]):
                break
            assert time.monotonic() < end, results
            self.step()
            time.sleep(0.002)
        if count:
            spec = self.manager.prepare_load(keys[:count], context)
            self.step(name)
            for key, row in zip(keys, spec.block_ids):
                assert np.array_equal(self.rows[row], content(key)), "other bytes than were stored"
            self.manager.complete_load(set(keys[:count]), context)
        self.manager.on_request_finished(context)
        return count

    def on_disk(self) -> None:
        """From here on, what is found is from the disk."""
        self.engine.flush()
        assert self.engine.evict_all(10) == 0
