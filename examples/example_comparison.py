"""The same questions about one document, without and with the cache.

    pip install 'kvkeep[transformers]' && python examples/example_comparison.py
"""

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvkeep import KVCache
from kvkeep.transformers import CachedGenerator

torch.manual_seed(0)
# Random weights: put your model here, AutoModelForCausalLM.from_pretrained("...").
config = LlamaConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=4096, initializer_range=0.06, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
generator = CachedGenerator(model, KVCache(max_size_gb=1))

document = torch.randint(3, 8192, (1, 1000))
questions = [torch.randint(3, 8192, (1, 20)) for _ in range(5)]
seconds = {"without": 0.0, "with": 0.0}
for question in questions:
    prompt = torch.cat([document, question], dim=1)
    begin = time.perf_counter()
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    seconds["without"] += time.perf_counter() - begin
    begin = time.perf_counter()
    reused = generator.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    seconds["with"] += time.perf_counter() - begin
    assert torch.equal(plain, reused), "the same answer, token by token"
    print(f"{generator.last.cached_tokens:5} of {generator.last.prompt_tokens} prompt tokens from the cache")

print(f"{len(questions)} answers: {seconds['without']:.2f} s without, {seconds['with']:.2f} s with the cache")
generator.cache.print_stats()
