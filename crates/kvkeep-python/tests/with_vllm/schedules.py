"""vLLM's own scheduler over kvkeep's connector, without a model: KV is a number for each token and layer, and what each layer reads is checked before it writes.

    PYTHONPATH=<a release's files> python schedules.py '{"root": ..., "early_aborts": true, "runs": [{"connector": "KvkeepConnector", "seed": 1, "blocks": 64, "prefix_caching": true}]}'

Any release whose files are there runs, without its compiled parts. Both halves of the connector run, with a worker that copies in RAM; between them, what the scheduler
says is pickled, as between processes. Prints what was seen of each run: steps, preemptions, loads.
"""

from __future__ import annotations

import json
import pickle
import random
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

BLOCK, LAYERS, HEAD = 16, ["model.layers.0.attn", "model.layers.1.attn", "model.layers.2.attn"], 64


def model_folder(root: Path) -> str:
    folder = root / "model"
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD, "vocab_size": 1000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


def configured(given: dict[str, Any]) -> tuple[Any, Any]:
    from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

    root = Path(given["root"])
    ours = {"root_dir": str(root / "kv"), "capacity_gb": 0.1, "worth": "always"}
    transfer = {
        "kv_connector": given["connector"], "kv_role": "kv_both", "kv_connector_module_path": "kvkeep.vllm" if given["connector"] == "KvkeepConnector" else None,
        "kv_connector_extra_config": {
            "spec_name": "CpuKvkeepOffloadingSpec", "spec_module_path": "kvkeep.vllm.cpu", "cpu_bytes_to_use": 8 << 20, "block_size": 4 * BLOCK, "kvkeep": ours,
        },
    }  # fmt: skip
    model = ModelConfig(model=model_folder(root), skip_tokenizer_init=True, dtype="bfloat16", seed=1, max_model_len=2048)
    scheduler = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 2048, "enable_chunked_prefill": True, "is_encoder_decoder": False}
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=given["prefix_caching"])
    cache.num_gpu_blocks = given["blocks"]
    config = VllmConfig(
        model_config=model, cache_config=cache, scheduler_config=SchedulerConfig(**scheduler), kv_transfer_config=KVTransferConfig(**transfer), device_config=DeviceConfig("cpu")
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=HEAD, dtype=torch.bfloat16)
    size = spec.page_size_bytes * given["blocks"]
    if "shared_by" in {field.name for field in fields(KVCacheTensor)}:
        tensors = [KVCacheTensor(size=size, shared_by=[name]) for name in LAYERS]
    else:
        tensors = [KVCacheTensor(size=size * len(LAYERS), layers=LAYERS, layer_stride=size, block_stride=spec.page_size_bytes)]
    return config, KVCacheConfig(num_blocks=given["blocks"], kv_cache_tensors=tensors, kv_cache_groups=[KVCacheGroupSpec(LAYERS, spec)])


class Lab:
    def __init__(self, given: dict[str, Any]) -> None:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        config, kv_config = configured(given)
        self.scheduler = Scheduler(vllm_config=config, kv_cache_config=kv_config, structured_output_manager=StructuredOutputManager(config), block_size=BLOCK)
        self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv_config)
        self.kv = {name: torch.zeros((given["blocks"], 2, BLOCK, 1, HEAD), dtype=torch.int16) for name in LAYERS}
        self.worker.register_kv_caches(dict(self.kv))
        self.steps = self.preemptions = 0
        self.sums: dict[tuple[int, ...], list[int]] = {}

    def add(self, name: str, tokens: list[int], answer: int) -> None:
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True, detokenize=False)
        hasher = get_request_block_hasher(BLOCK, sha256)
        given = {"request_id": name, "prompt_token_ids": tokens, "sampling_params": params, "pooling_params": None, "block_hasher": hasher}
        self.scheduler.add_request(Request(**given))

    def values(self, tokens: list[int], layer: int) -> torch.Tensor:
        """What the KV of each of these tokens is: it depends on all tokens before it."""
        sums, total = [], 0
        for token in tokens:
            total = (total * 31 + token + 1) % 1_000_003
            sums.append((total * (layer + 7)) % 30011)
        return torch.tensor(sums, dtype=torch.int16)

    def step(self) -> None:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output = self.scheduler.schedule()
        self.steps += 1
        self.preemptions += len(output.preempted_req_ids or ())
        metadata = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        self.worker.handle_preemptions(metadata)
        self.worker.bind_connector_metadata(metadata)
        has_forward = bool(output.num_scheduled_tokens)
        context = SimpleNamespace(attn_metadata={LAYERS[0]: object()} if has_forward else None, cudagraph_runtime_mode=SimpleNamespace(name="NONE"))
        # Newer releases begin loads behind the step, unless it reads them.
        is_before = getattr(output, "has_sync_kv_loads", True)
        if is_before:
            self.worker.start_load_kv(context)
        sampled = self.forward(output) if has_forward else {}
        if not is_before:
            self.worker.start_load_kv(context)
        self.worker.wait_for_save()
        sent, received = self.worker.get_finished(output.finished_req_ids)
        known = {field.name for field in fields(KVConnectorOutput)}
        connector = {"finished_sending": sent, "finished_recving": received, "kv_connector_worker_meta": self.worker.build_connector_worker_meta()}
        told = KVConnectorOutput(**{name: value for name, value in connector.items() if name in known})
        self.worker.clear_connector_metadata()
        names = list(output.num_scheduled_tokens)
        result = {
            "req_ids": names, "req_id_to_index": {name: at for at, name in enumerate(names)}, "sampled_token_ids": [sampled[name] for name in names],
            "logprobs": None, "prompt_logprobs_dict": {}, "pooler_output": [None] * len(names), "kv_connector_output": told,
        }  # fmt: skip
        known = {field.name for field in fields(ModelRunnerOutput)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(**{name: value for name, value in result.items() if name in known}))

    def forward(self, output: Any) -> dict[str, list[int]]:
        asked = []
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            end = request.num_computed_tokens
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
            asked.append((name, list(request.all_token_ids)[:end], end - count, torch.tensor(blocks), request.num_tokens))
        for number, layer in enumerate(LAYERS):
            # New KV is written before vLLM's hook, and all of it is read behind it.
            for _, tokens, begin, blocks, _ in asked:
                at = torch.arange(begin, len(tokens))
                self.kv[layer][blocks[at // BLOCK], :, at % BLOCK] = self.values(tokens, number)[begin:].view(-1, 1, 1, 1)
            self.worker.wait_for_layer_load(layer)
            for name, tokens, _, blocks, _ in asked:
                at = torch.arange(len(tokens))
                read = self.kv[layer][blocks[at // BLOCK], :, at % BLOCK]
                wrong = (read != self.values(tokens, number).view(-1, 1, 1, 1)).any(-1).any(-1).any(-1).nonzero()
                assert not len(wrong), f"step {self.steps}, {name}, {layer}: other KV than was computed, first at token {int(wrong[0])} of {len(tokens)}: {read[int(wrong[0]), 0, 0, 0]}"
        return {name: [(sum(tokens) * 7) % 997] if len(tokens) == total else [] for name, tokens, _, _, total in asked}

    def run(self, at_most_s: float = 60) -> None:
        idle, end = 0, time.monotonic() + at_most_s
        while time.monotonic() < end:  # not so many steps: where they have nothing to do, a busy machine makes thousands until a copy has ended
            is_idle = not self.scheduler.has_unfinished_requests() and not self.scheduler.connector.has_pending_push_work()
            idle = idle + 1 if is_idle else 0
            if idle > 3:  # what ended with the last step is stored with the next
                return
            self.step()
        raise AssertionError("it does not come to an end")

    def abort(self, name: str, early: bool) -> None:
        """`early`: also before it answers, which ends vLLM 0.26 with its own connector, too."""
        from vllm.v1.request import RequestStatus

        request = self.scheduler.requests.get(name)
        if request is not None and (early or request.num_output_tokens):
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def drop_gpu(self) -> None:
        assert self.scheduler.reset_prefix_cache()
        for kv in self.kv.values():
            kv.fill_(-1)


def main(given: dict[str, Any]) -> None:
    draw, lab = random.Random(given["seed"]), Lab(given)
    shared = [[draw.randrange(1000) for _ in range(400)] for _ in range(3)]
    for round_number in range(given.get("rounds", 6)):
        for number in range(6):
            begin = draw.choice(shared)[: draw.choice([64, 128, 200, 256, 320, 400])]
            tail = [draw.randrange(1000) for _ in range(draw.choice([0, 1, 16, 40, 64, 150]))]
            lab.add(f"{round_number}-{number}", begin + tail, draw.choice([1, 3, 70]))
            for _ in range(draw.randrange(3)):
                lab.step()
            if draw.random() < 0.2:
                lab.abort(f"{round_number}-{draw.randrange(number + 1)}", given["early_aborts"])
        lab.run()
        if given["prefix_caching"]:
            lab.drop_gpu()
        if round_number == 3:
            lab.scheduler.connector.reset_cache()
    manager, made = lab.scheduler.connector.connector_scheduler.manager, lab.worker.connector_worker.worker._made[0]
    print(json.dumps({"steps": lab.steps, "preemptions": lab.preemptions, **made.by_layer}))
    lab.worker.shutdown()
    lab.scheduler.shutdown()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    for at, each in enumerate(asked.pop("runs")):
        main({**asked, **each, "root": f"{asked['root']}/{at}"})
