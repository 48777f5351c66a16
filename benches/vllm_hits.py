#!/usr/bin/env python3
"""Hits in RAM at the same bytes: vLLM's own manager with its policies, and kvkeep's, driven with one trace as vLLM's scheduler drives them.

    vllm_hits.py TRACE.jsonl --blocks 1000,2500 [--policies lru,arc,adaptive]

A line of the trace has `hash_ids`: a request's blocks, of which equal numbers mean equal blocks and equal everything before. Both managers are the real
ones, of the vLLM that is installed, without an engine: each request is looked up from its beginning until the first miss, what was found is loaded, the
rest stored. Prints, for each, the share of all blocks that was found. A row has 4 KiB here; how many there are is what counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvkeep import _kvkeep
from kvkeep._engines.worth import RatesFile
from kvkeep.vllm._manager import KvkeepManager
from kvkeep.vllm._settings import RamSettings

ROW_BYTES, TOKENS = 4096, 16
THEIRS = ("lru", "arc")


def kvkeeps(blocks: int, policy: str, folder: Path) -> Any:
    namespace = _kvkeep.Namespace("m", (1, 1, ROW_BYTES // 2, ROW_BYTES // 2, 1), _kvkeep.DTYPES.index("u8"), False, ("trace", "vllm", "", ""))
    engine = _kvkeep.EngineRam(namespace, (blocks * ROW_BYTES, policy), None, (10, 5))
    config = SimpleNamespace(
        model_config=SimpleNamespace(), parallel_config=SimpleNamespace(), scheduler_config=SimpleNamespace(max_num_batched_tokens=8192)
    )
    settings = RamSettings.read({"root_dir": str(folder), "capacity_gb": 1})
    return KvkeepManager(engine, settings, config, ROW_BYTES, [TOKENS], RatesFile(folder / "rates.json", "trace"), "trace")


def drive(manager: Any, requests: list[list[bytes]]) -> float:
    hits = blocks = 0
    for number, keys in enumerate(requests):
        context = ReqContext(req_id=str(number))
        for position, key in enumerate(keys):
            context.set_offload_key_position(key, (position + 1) * TOKENS)
        manager.on_new_request(context)
        found = 0
        while found < len(keys) and manager.lookup(keys[found], context) is LookupResult.HIT:
            found += 1
        if found:
            manager.prepare_load(keys[:found], context)
        manager.on_schedule_end(ScheduleEndContext(new_req_ids=[str(number)], preempted_req_ids=[]))
        if found:
            manager.complete_load(set(keys[:found]), context)
        if found < len(keys) and (stored := manager.prepare_store(keys[found:], context)) is not None and stored.keys_to_store:
            manager.complete_store(set(stored.keys_to_store), context)
        manager.on_request_finished(context)
        hits, blocks = hits + found, blocks + len(keys)
    return hits / blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--blocks", default="1000,2500")
    parser.add_argument("--policies", default="lru,arc,adaptive")
    given = parser.parse_args()
    lines = given.trace.read_text().splitlines()
    requests = [list(dict.fromkeys(make_offload_key(block.to_bytes(32, "big"), 0) for block in json.loads(line)["hash_ids"])) for line in lines]
    for blocks in map(int, given.blocks.split(",")):
        for policy in given.policies.split(","):
            with tempfile.TemporaryDirectory() as folder:
                whose = "vllm" if policy in THEIRS else "kvkeep"
                manager = CPUOffloadingManager(blocks, policy) if policy in THEIRS else kvkeeps(blocks, policy, Path(folder))
                began = time.perf_counter()
                share = drive(manager, requests)
                microseconds = (time.perf_counter() - began) / sum(map(len, requests)) * 1e6
                row = {"trace": given.trace.stem, "blocks": blocks, "manager": whose, "policy": policy, "found_percent": round(100 * share, 1)}
                print(json.dumps(row | {"us_per_block": round(microseconds, 2)}), flush=True)
                manager.shutdown()


if __name__ == "__main__":
    main()
