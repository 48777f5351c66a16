"""A vLLM engine in a process of its own, asked in lines of JSON: so it can be killed, and its disk held.

    python engine.py '{"model": ..., "tier": {...} or null, "prefix_caching": true}'
    python engine.py '{"model": ..., "tier": {...}, "whole": true}'    kvkeep's RAM as well, with these settings
    python engine.py '{"model": ..., "tier": {...}, "whole": true, "layers": true}'    and loads by layer

Requests: {"do": "generate", "prompts": [[ids], ...], "tokens": 8, "params": {...}, "lora": [name, path]} → {"tokens": [[ids], ...], "cached": [...]};
{"do": "abort", "prompts": ...}: begins them and aborts each after a few steps; {"do": "drop_gpu"}: the engine's own prefix cache is emptied;
{"do": "drop_ram"}: and vLLM's RAM, so that what is found is from the disk; {"do": "counters"}; {"do": "flush"}; {"do": "close"};
{"do": "by_layer"}: loads in the step that read them, and how many of those were copied by their layers' waits alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

ANSWERS = os.dup(1)
"""vLLM writes to standard output, too."""


def make(
    model: str, tier: dict[str, Any] | None, prefix_caching: bool = True, ram_mib: int = 256, whole: bool = False, layers: bool = False, **more: Any
) -> Any:
    os.dup2(2, 1)
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    transfer = {
        **({"kv_connector": "KvkeepConnector", "kv_connector_module_path": "kvkeep.vllm"} if layers else {"kv_connector": "OffloadingConnector"}),
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "CpuKvkeepOffloadingSpec" if whole else "CpuTieringOffloadingSpec",
            "spec_module_path": "kvkeep.vllm.cpu",
            "cpu_bytes_to_use": ram_mib << 20,
            "block_size": 64,
            **({"kvkeep": {name: value for name, value in tier.items() if name != "type"}} if whole else {"secondary_tiers": [tier]}),
        },
    }
    extra = {"kv_transfer_config": transfer} if tier else {}
    settings = {"dtype": "float32", "block_size": 64, "max_model_len": 1536, "max_num_batched_tokens": 1024, "max_num_seqs": 8, **more}
    return LLM(model=model, skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=prefix_caching, seed=0, **settings, **extra)


class Engine:
    def __init__(self, **arguments: Any) -> None:
        self.llm = make(**arguments)
        self.core = self.llm.llm_engine.engine_core.engine_core
        connector = self.core.scheduler.connector
        self.manager = connector.connector_scheduler.manager if connector else None
        self.tier = self.manager.secondary_tiers[0] if hasattr(self.manager, "secondary_tiers") else self.manager

    def _params(self, tokens: int, more: dict[str, Any] | None) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True, extra_args=more)

    def generate(self, prompts: list[list[int]], tokens: int = 8, params: dict[str, Any] | None = None, lora: Any = None) -> dict[str, Any]:
        more = {"kv_transfer_params": params} if params else None
        request = None
        if lora:
            from vllm.lora.request import LoRARequest

            request = LoRARequest(lora[0], 1, lora[1])
        began = time.monotonic()
        done = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], self._params(tokens, more), use_tqdm=False, lora_request=request)
        seconds = time.monotonic() - began
        return {"tokens": [list(r.outputs[0].token_ids) for r in done], "cached": [r.num_cached_tokens for r in done], "seconds": seconds}

    def abort(self, prompts: list[list[int]], steps: int = 3) -> dict[str, Any]:
        engine = self.llm.llm_engine
        names = [f"abort-{time.monotonic_ns()}-{number}" for number in range(len(prompts))]
        for name, ids in zip(names, prompts):
            engine.add_request(name, {"prompt_token_ids": ids}, self._params(8, None))
        for number, name in enumerate(names):
            for _ in range(number % (steps + 1)):
                engine.step()
            engine.abort_request([name])
        while engine.has_unfinished_requests():
            engine.step()
        return {}

    def settle(self) -> dict[str, Any]:
        """Lets the engine step until no transfer is under way, and the disk has all of it."""
        end = time.monotonic() + 60
        while self.manager and self.manager.has_pending_work() and time.monotonic() < end:
            self.core.step_fn()
            time.sleep(0.005)
        return {"pending": bool(self.manager and self.manager.has_pending_work())}

    def flush(self) -> dict[str, Any]:
        settled = self.settle()
        self.tier._engine.flush()
        return settled

    def drop_gpu(self) -> dict[str, Any]:
        return {"dropped": bool(self.llm.reset_prefix_cache())}

    def drop_ram(self) -> dict[str, Any]:
        self.settle()
        dropped = self.llm.reset_prefix_cache()
        self.manager.reset_cache()
        return {"dropped": bool(dropped)}

    def by_layer(self) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group().connector_worker.worker
        return {"modes": sorted(get_kv_transfer_group()._waits.trusted), **worker._made[0].by_layer}

    def counters(self) -> dict[str, Any]:
        return self.tier.counters() | {"identity": self.tier.identity, "rates": vars(self.tier.rates)}

    def close(self) -> dict[str, Any]:
        self.core.shutdown()
        return {}


def main() -> None:
    began = time.monotonic()
    engine = Engine(**json.loads(sys.argv[1]))
    _say({"ready": time.monotonic() - began})
    for line in sys.stdin:
        request = json.loads(line)
        _say(getattr(engine, request.pop("do"))(**request))


def _say(answer: dict[str, Any]) -> None:
    os.write(ANSWERS, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
