#!/usr/bin/env python3
"""Time to first token in vLLM, by where the prefix is: one GPU, one request at a time, random weights.

    ttft.py none                                 # no offloading
    ttft.py native                               # vLLM's own offloading to RAM
    ttft.py tiering                              # vLLM's tiering without a tier
    ttft.py fs --dir /data/fs                    # vLLM's tier of files
    ttft.py kvkeep --dir /data/kvkeep            # kvkeep's tier, as docs/vllm.md says
    ttft.py kvkeep --dir /data/kvkeep --phase restart
    ttft.py lossless --dir /data/kvkeep          # the same, with that codec
    ttft.py daemon --dir /data/kvkeep --socket S # kvkeep's tier over `kvkeep daemon --socket S`, without a disk
    ttft.py ram --dir /data/kvkeep               # kvkeep's RAM as well: KvkeepOffloadingSpec
    ttft.py layers --dir /data/kvkeep            # and loads layer by layer: KvkeepConnector

For each prompt length: `cold` (nobody knows the prefix), `gpu` (it is still in the GPU) and `below` (the GPU's own cache was emptied: RAM, or
a tier). With `--phase restart`, in a process after the first one with the same seed: `restart` (the first process stored it; RAM is empty),
beside `cold` prefixes that are new. `ram` and `layers` take `--socket S`, too: then the daemon is below RAM, in place of the disk.

`answers` are the token after each prompt that is asked twice, and with `--bits` its log probability, which says more of the prefix's KV than a token.
One JSON object a line; `table.py` makes a table and a plot of several runs, and says whether answers were the same in both processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

QUESTION_TOKENS = 32

Answer = tuple[int, float | None]

SHAPES = {"8b": (4096, 14336, 32), "70b": (8192, 28672, 64), "405b": (16384, 53248, 128)}
"""Hidden size, intermediate size and heads of a layer; all have 8 KV heads of 128."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["none", "native", "tiering", "fs", "kvkeep", "lossless", "daemon", "ram", "layers"])
    parser.add_argument("--phase", choices=["first", "restart"], default="first")
    parser.add_argument("--dir", help="where a tier keeps its files")
    parser.add_argument("--socket", help="of a daemon")
    parser.add_argument("--worth", choices=["measured", "always"], default="measured", help="kvkeep: also load what is slower than computing?")
    parser.add_argument("--capacity-gb", type=float, default=40.0)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a block of the tiers; of `native`, vLLM's own default")
    parser.add_argument("--lens", default="2048,8192,32768")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of a Llama's layers")
    parser.add_argument("--layers", type=int, default=32, help="32: all that a Llama of 8B has")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cpu-gib", type=int, default=24)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--bits", action="store_true", help="log probabilities, too: each step is then a little slower")
    parser.add_argument("--first-pause", type=float, default=15.0, help="seconds between the start and the first request: kvkeep's RAM is registered meanwhile")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds for stores to end")
    given = parser.parse_args()
    if (given.mode == "daemon") > bool(given.socket):
        parser.error("daemon needs --socket: start `kvkeep daemon --socket S` first")
    return given


def model(shape: str, layers: int) -> str:
    """A folder with a configuration and no weights."""
    folder = Path(f"/tmp/llama-{shape}-{layers}")
    folder.mkdir(exist_ok=True)
    hidden, intermediate, heads = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def transfer_config(given: argparse.Namespace) -> dict[str, Any] | None:
    extra: dict[str, Any] = {"cpu_bytes_to_use": given.cpu_gib << 30}
    if given.mode == "none":
        return None
    if given.mode != "native":
        extra |= {"spec_name": "TieringOffloadingSpec", "block_size": given.chunk}
    if given.mode == "fs":
        extra["secondary_tiers"] = [{"type": "fs", "root_dir": given.dir}]
    below = {"daemon": given.socket} if given.socket else {"capacity_gb": given.capacity_gb}
    ours = {"root_dir": given.dir, "worth": given.worth, **below}
    if given.mode in ("kvkeep", "lossless", "daemon"):
        codec = {"codec": "lossless"} if given.mode == "lossless" else {}
        extra["secondary_tiers"] = [{"type": "kvkeep", **ours, **codec}]
    if given.mode in ("ram", "layers"):
        extra |= {"spec_name": "KvkeepOffloadingSpec", "spec_module_path": "kvkeep.vllm", "kvkeep": ours}
    connector = {"kv_connector": "KvkeepConnector", "kv_connector_module_path": "kvkeep.vllm"} if given.mode == "layers" else {"kv_connector": "OffloadingConnector"}
    return {**connector, "kv_role": "kv_both", "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra}


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        self.given, self.lens = given, [int(length) for length in given.lens.split(",")]
        config = transfer_config(given)
        began = time.time()
        self.llm = LLM(
            model=model(given.shape, given.layers), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=max(self.lens) + 512,
            gpu_memory_utilization=0.85, enforce_eager=True, max_num_batched_tokens=16384, enable_prefix_caching=True, seed=1,
            tensor_parallel_size=given.tp, **({"kv_transfer_config": config} if config else {}),
        )  # fmt: skip
        self.llm.collective_rpc(enlarge)
        self.params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, ignore_eos=True, logprobs=0 if given.bits else None)
        self.say({"start_s": round(time.time() - began, 1)})
        time.sleep(given.first_pause)

    def say(self, what: dict[str, Any]) -> None:
        given = self.given
        unusual = [(given.worth, given.worth != "measured"), (given.shape, given.shape != "8b"), (f"tp{given.tp}", given.tp > 1), ("daemon", given.socket and given.mode != "daemon")]
        name = "-".join([given.mode, *(word for word, is_so in unusual if is_so)])
        print(json.dumps({"mode": name, "phase": self.given.phase, **what}), flush=True)

    def ttft(self, ids: list[int]) -> tuple[float, int, Answer]:
        """Milliseconds, tokens that were not computed, and what came."""
        began = time.perf_counter()
        (done,) = self.llm.generate([{"prompt_token_ids": ids}], self.params, use_tqdm=False)
        return (time.perf_counter() - began) * 1e3, done.num_cached_tokens or 0, (done.outputs[0].token_ids[0], done.outputs[0].cumulative_logprob)

    def settle(self) -> None:
        """Lets stores end. In this process the engine steps only while it has a request, and stores are begun and passed on at steps."""
        for number in range(3):
            self.ttft([100 + number] * 8)
            time.sleep(self.given.pause / 3)
        self.ttft([99] * 8)

    def warm_up(self) -> None:
        draw = random.Random(99)
        for length in (64, 3000, 16000):
            self.ttft([draw.randrange(3, 31000) for _ in range(min(length, max(self.lens)))])

    def run(self) -> None:
        self.warm_up()
        known, fresh = random.Random(self.given.seed), random.Random(self.given.seed + 1000)
        for length in self.lens:
            self.measure(length, known, fresh)
        self.say({"tier": figures(self.llm)})

    def measure(self, length: int, known: random.Random, fresh: random.Random) -> None:
        first = self.given.phase == "first"
        times: dict[str, list[float]] = {}
        cached: dict[str, int] = {}
        answers: dict[str, list[Answer]] = {"gpu": [], "below": []}

        def ask(what: str, ids: list[int]) -> None:
            ms, hit, answer = self.ttft(ids)
            times.setdefault(what, []).append(ms)
            cached[what] = hit
            if what in answers:
                answers[what].append(answer)
            self.settle()

        for _ in range(self.given.rounds):
            prefix, other, question = tokens(known, length), tokens(known, QUESTION_TOKENS), tokens(known, QUESTION_TOKENS)
            if first:
                ask("cold", prefix + other)
            else:
                ask("cold", tokens(fresh, length) + tokens(fresh, QUESTION_TOKENS))
                ask("restart", prefix + other)
            ask("gpu", prefix + question)
            assert self.llm.reset_prefix_cache()
            ask("below", prefix + question)
        medians = {f"{what}_ms": round(statistics.median(all_ms), 1) for what, all_ms in times.items()}
        rounded = {what: [round(ms, 1) for ms in all_ms] for what, all_ms in times.items()}
        self.say({"prefix": length, **medians, "cached": cached, "seed": self.given.seed, "answers": answers, "all_ms": rounded})


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, 31000) for _ in range(count)]


def enlarge(worker: Any) -> None:
    """Weights as large as a trained model's. vLLM's random ones, norms included, are below 0.001: in bfloat16 attention adds nothing then, and no answer depends on KV."""
    for weight in worker.model_runner.model.parameters():
        weight.data.fill_(1) if weight.dim() == 1 else weight.data.mul_(35)


def figures(llm: Any) -> Any:
    """What kvkeep's tier counted and measured."""
    try:
        core = llm.llm_engine.engine_core.engine_core
        manager = core.scheduler.connector.connector_scheduler.manager
        (tier,) = getattr(manager, "secondary_tiers", (manager,))
        return {**tier.counters(), "rates": vars(tier.rates), "by_layer": llm.collective_rpc(by_layer)}
    except (AttributeError, ValueError):
        return None


def by_layer(worker: Any) -> Any:
    """The ways to run a step in which this worker waits for layers one by one."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    waits = getattr(get_kv_transfer_group(), "_waits", None) if has_kv_transfer_group() else None
    return waits and sorted(waits.trusted)


def end(llm: Any) -> None:
    """What waits is written, as when an engine is told to end."""
    core = llm.llm_engine.engine_core.engine_core
    core.shutdown()


if __name__ == "__main__":
    bench = Bench(arguments())
    bench.run()
    end(bench.llm)
    sys.stdout.flush()
    os._exit(0)
