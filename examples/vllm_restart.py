"""A vLLM engine that is warm after a restart, with kvkeep behind it. Needs vLLM, on a GPU or on the CPU, and nothing else.

    python examples/vllm_restart.py [MODEL]

Without a model it makes a small random one. The engine is started twice: the second one has read nothing, and finds it all.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT_TOKENS = 1000


def random_model(folder: Path) -> str:
    """A Llama of about 100 million parameters: a configuration and weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=16384, hidden_size=640, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=10, num_key_value_heads=2,
                         head_dim=64, max_position_embeddings=4096)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def engine(model: str, cache: str) -> None:
    """One life of the engine: the same prompt, twice."""
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
    import torch
    from vllm import LLM, SamplingParams

    # vLLM's own spec knows GPUs alone; on the CPU kvkeep has the missing part.
    spec, dtype = {"spec_name": "TieringOffloadingSpec"}, "bfloat16"
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        spec, dtype = {"spec_name": "CpuTieringOffloadingSpec", "spec_module_path": "kvkeep.vllm.cpu"}, "float32"
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            **spec,
            "cpu_bytes_to_use": 256 << 20,
            "block_size": 128,
            "secondary_tiers": [{"type": "kvkeep", "root_dir": cache, "capacity_gb": 1}],
        },
    }
    llm = LLM(model=model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=2048, dtype=dtype, kv_transfer_config=transfer)
    draw = random.Random(1)
    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    llm.generate([{"prompt_token_ids": [5] * 100}], params, use_tqdm=False)  # whatever is done once
    prompt = [draw.randrange(3, 16000) for _ in range(PROMPT_TOKENS)]
    began = time.perf_counter()
    (done,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    first_token_ms = (time.perf_counter() - began) * 1000
    time.sleep(3)  # the engine hands its KV on, and the disk writes it, in the background
    llm.llm_engine.engine_core.shutdown()
    print(json.dumps({"cached": done.num_cached_tokens, "first_token_ms": first_token_ms, "token": done.outputs[0].token_ids[0]}), flush=True)
    os._exit(0)


def life(model: str, cache: str) -> dict[str, float]:
    started = subprocess.run([sys.executable, __file__, "--engine", model, cache], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(next(line for line in started.stdout.splitlines() if line.startswith('{"cached"')))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = sys.argv[1] if len(sys.argv) > 1 else random_model(Path(folder, "model"))
        first, second = (life(model, f"{folder}/kvkeep") for _ in range(2))
        for name, seen in (("the first engine", first), ("after a restart", second)):
            print(f"{name}: {seen['cached']} of {PROMPT_TOKENS} tokens known, first token after {seen['first_token_ms']:.0f} ms")
        assert first["token"] == second["token"], "the answer must not change"


if __name__ == "__main__":
    engine(*sys.argv[2:]) if sys.argv[1:2] == ["--engine"] else main()
