"""A prefix of 32 layers: stored at once, found at once, and what a hit costs against computing.

    pip install 'kvkeep[torch]' && python examples/example_multilayer.py
"""

import time

import torch

from kvkeep import SimpleKVCache

LAYERS, HEADS, TOKENS, HEAD_DIM = 32, 8, 1024, 64

cache = SimpleKVCache(max_size_gb=2)
prefix = "You are a helpful assistant. " * 140
kv = {
    layer: tuple(torch.randn(1, HEADS, TOKENS, HEAD_DIM, dtype=torch.float32).to(torch.bfloat16) for _ in "kv")
    for layer in range(LAYERS)
}
size_mb = sum(tensor.nbytes for pair in kv.values() for tensor in pair) / 2**20

begin = time.perf_counter()
assert cache.cache_all_layers(prefix, kv)
stored = time.perf_counter() - begin

begin = time.perf_counter()
found = cache.get_all_layers(prefix, num_layers=LAYERS)
hit = time.perf_counter() - begin
assert found is not None
assert all(torch.equal(a, b) for layer in kv for a, b in zip(found[layer], kv[layer]))

# What you write is yours: the cache and the next reader do not see it.
found[0][0].zero_()
assert torch.equal(cache.get_cached_kv(prefix, 0)[0], kv[0][0])

print(f"{LAYERS} layers, {size_mb:.0f} MiB: stored in {stored * 1e3:.0f} ms, found in {hit * 1e6:.0f} µs")
cache.print_stats()
