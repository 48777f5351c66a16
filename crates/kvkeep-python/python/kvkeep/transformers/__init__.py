"""Reuse for `generate` of Hugging Face transformers: what a model has read once it does not read again.

    from kvkeep import KVCache
    from kvkeep.transformers import CachedGenerator

    generator = CachedGenerator(model, KVCache(max_size_gb=10))
    output = generator.generate(input_ids, max_new_tokens=64)      # as model.generate(input_ids, ...)
    generator.last.cached_tokens                                   # of the prompt, not read again

The promise: `generator.generate(...)` returns what `model.generate(...)` returns, and raises only what that raises. The
generator finds the longest stored prefix of each prompt, builds the model's cache from it, lets the model read the
rest, and stores what is new: the prompt, and the answer as far as the model has read it.

- *Models*: causal ones whose state is a `DynamicCache` of full or sliding attention (Llama, Qwen, Mistral, Gemma,
  GPT-2, DeepSeek, ...). When a generator is made, the model reads three tokens in several ways; where the KV differs,
  it is refused by name with an `UnsupportedModelError`. docs/models.md lists every architecture.
- *Calls*: one prompt or a batch, padded on the left; greedy or sampling. An argument or a setting that is not known to
  leave the KV alone (`_arguments.py`) makes a plain run: no reuse, nothing stored, one warning that says why.
- *Changes of the model* (`kvkeep.identity`): other weights, adapters, settings are another namespace at once.

Sliding windows: a layer with a window forgets what lies behind it, but a shorter prompt that shares a prefix needs just
that. So such layers are told to record all states while they generate, blocks are stored whole, and a cache that is
built from blocks is cut to the window by the layer itself.
"""

from kvkeep._errors import UnsupportedModelError
from kvkeep._tensors import needed

needed("torch", "kvkeep.transformers")
needed("transformers", "kvkeep.transformers")

from kvkeep.transformers._generator import CachedGenerator, FirstToken, Generation  # noqa: E402

__all__ = ["CachedGenerator", "FirstToken", "Generation", "UnsupportedModelError"]
