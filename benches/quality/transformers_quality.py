"""What codecs cost in quality on any causal model of transformers: the twin of `kvkeep bench quality`, which knows one architecture.

    python benches/quality/transformers_quality.py --gguf model.gguf [--windows 3] [--context 1024] [--next 128] [--json]

The model reads the texts of the demos. Its KV, in bfloat16, goes through each codec as `QuantizedKVCache` keeps it, and the model
predicts the text behind it: against the same KV as it was. Ratios are of whole windows with the first four tokens exact; no
rates are given: they are those of the codecs (`kvkeep bench codecs`).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvkeep import QuantizedKVCache

TEXTS = Path(__file__).parents[2] / "crates/kvkeep-cli/texts"
CODECS = ("raw", "lossless", "int8", "fp8", "k8v4", "int4", "nf4")


def tensors(cache: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer, as they lie in a cache of transformers."""
    return {number: (layer.keys, layer.values) for number, layer in enumerate(cache.layers)}


def replaced(cache: Any, kv: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """The same cache with other numbers in it."""
    other = copy.deepcopy(cache)
    for number, (k, v) in tensors(other).items():
        k.copy_(kv[number][0])
        v.copy_(kv[number][1])
    return other


def through(codec: str, kv: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> tuple[dict[int, Any], float]:
    """KV as a cache of this codec gives it back, and how much smaller it is there."""
    with QuantizedKVCache(1.0, codec=codec, exact_tokens=(4, 0)) as cache:  # type: ignore[arg-type]
        assert cache.cache_all_layers("window", kv)
        found = cache.get_all_layers("window", len(kv))
        assert found is not None
        ratios = [cache.measure_quantization_error(k, v).ratio for k, v in kv.values()]
    # Of equal sizes together: the harmonic mean.
    return found, len(ratios) / sum(1 / ratio for ratio in ratios)


def averages(sums: dict[str, dict[str, float]], windows: int, predictions: int) -> list[dict[str, Any]]:
    return [
        {
            "codec": codec,
            "ratio": of["ratio"] / windows,
            "kl": of["kl"] / predictions,
            "top1": of["same"] / predictions,
            "perplexity": math.exp(of["surprise"] / windows),
        }
        for codec, of in sums.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="a model in GGUF format")
    source.add_argument("--model", help="a directory or a name that transformers knows")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--next", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    name, more = (options.model, {}) if options.model else (str(options.gguf.parent), {"gguf_file": options.gguf.name})
    tokenizer = AutoTokenizer.from_pretrained(name, **more)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **more).eval()
    text = "\n\n".join((TEXTS / f"{file}.txt").read_text() for file in ("constitution", "ownership", "declaration", "agent"))
    ids = tokenizer(text, return_tensors="pt").input_ids
    size, stride = options.context + options.next, max(options.context // 2, 1)
    starts = [start for start in range(0, ids.shape[1] - size + 1, stride)][: options.windows]
    sums = {codec: {"kl": 0.0, "same": 0, "surprise": 0.0, "ratio": 0.0} for codec in CODECS}
    predictions, done, file = 0, 0, Path(str(options.gguf or options.model)).name
    for start in starts:
        window = ids[:, start : start + size]
        context, behind = window[:, : options.context], window[:, options.context :]
        with torch.inference_mode():
            cache = model(context, use_cache=True, logits_to_keep=1).past_key_values
            kv = {number: (k.bfloat16(), v.bfloat16()) for number, (k, v) in tensors(cache).items()}
            exact = None
            for codec in CODECS:
                found, ratio = through(codec, kv)
                reused = replaced(cache, found)
                logits = torch.log_softmax(model(behind, past_key_values=reused, use_cache=True).logits[0].double(), -1)
                exact = logits if exact is None else exact
                of = sums[codec]
                of["kl"] += float((exact.exp() * (exact - logits)).sum(-1).clamp(min=0).sum())
                of["same"] += int((exact.argmax(-1) == logits.argmax(-1)).sum())
                of["surprise"] -= float(logits[:-1].gather(1, behind[0, 1:, None]).mean())
                of["ratio"] += ratio
        predictions += behind.shape[1]
        print(f"{file}: {predictions} predictions", file=sys.stderr, flush=True)
        done += 1
        if options.json:
            # A line a window, each with all that was read so far: the last one counts.
            print(json.dumps({"model": file, "predictions": predictions, "results": averages(sums, done, predictions)}), flush=True)
    if options.json:
        return
    results = averages(sums, done, predictions)
    print(f"{'codec':<10} {'ratio':>6} {'KL':>9} {'top 1':>8} {'perplexity':>11}")
    for row in results:
        print(f"{row['codec']:<10} {row['ratio']:>6.2f} {row['kl']:>9.5f} {row['top1']:>8.2%} {row['perplexity']:>11.3f}")


if __name__ == "__main__":
    main()
