"""Whatever is done to a model, KV stored before is never served after unless the answers agree."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mutations import CHANGES, HARMLESS, ids, llama  # noqa: E402

from kvkeep import KVCache  # noqa: E402
from kvkeep.transformers import CachedGenerator, UnsupportedModelError  # noqa: E402

CALL: dict[str, Any] = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)


def logits(generate: Any) -> Any:
    torch.manual_seed(0)  # where a model draws at random, both draw the same
    mask = torch.ones_like(ids())
    return torch.stack(generate(ids(), attention_mask=mask, **CALL).logits).float()


def check(generator: Any, model: Any, what: str) -> int:
    """One call against the model alone; returns how much was reused."""
    got = logits(generator.generate)
    reused = 0 if generator.last is None else generator.last.cached_tokens
    plain = logits(model.generate)
    assert got.shape == plain.shape
    assert torch.allclose(got, plain, atol=1e-4), f"{what}: {reused} tokens reused, off by {(got - plain).abs().max():.3g}"
    return reused


@pytest.mark.parametrize("name", [*CHANGES, *HARMLESS])
@pytest.mark.filterwarnings("ignore")
def test_kv_stored_before_a_change_is_not_served_after_it(name: str) -> None:
    """KV of one adapter, configuration, mode or set of weights was served to another, by the same generator, by a new one, and to a fresh
    model that shares the cache."""
    if "adapter" in name or "prompt" in name:
        pytest.importorskip("peft")
    cache, model = KVCache(max_size_gb=0.05), llama()
    generator = CachedGenerator(model, cache, block_tokens=8)
    check(generator, model, "before")
    assert check(generator, model, "before, warm") == 40, "the control: without a change there is reuse"
    with ExitStack() as stack:
        changed = {**CHANGES, **HARMLESS}[name](model, stack)
        generators = [generator] if changed is model else []
        try:
            generators.append(CachedGenerator(changed, cache, block_tokens=8))
        except UnsupportedModelError:
            assert name in CHANGES, "what is harmless is not refused"
        for number, warm in enumerate(generators):
            first = check(warm, changed, f"after, generator {number}")
            second = check(warm, changed, f"after, generator {number}, warm")
            if name in HARMLESS:
                assert first == second == 40, "the same model goes on reusing"
    # What was stored meanwhile must not reach the model as it was.
    fresh = llama()
    assert check(CachedGenerator(fresh, cache, block_tokens=8), fresh, "a fresh model that shares the cache") == 40


@pytest.mark.parametrize("name", ["a training step", "weights through .data, in place", "an epsilon set on one norm", "a class's forward"])
def test_a_change_while_it_generates_stores_nothing_mixed(name: str) -> None:
    """A training step under a generator stored mixed KV under the old identity, and the original checkpoint then read it."""
    cache, model = KVCache(max_size_gb=0.05), llama()
    generator = CachedGenerator(model, cache, block_tokens=8)
    with ExitStack() as stack:

        def change(input_ids: Any, scores: Any, **_: Any) -> Any:
            if input_ids.shape[1] == 50:
                CHANGES[name](model, stack)
            return torch.zeros(1, dtype=torch.bool)

        generator.generate(ids(), max_new_tokens=24, do_sample=False, stopping_criteria=[change])
        assert cache.stats()["entries"] == 0
    fresh = llama()
    assert check(CachedGenerator(fresh, cache, block_tokens=8), fresh, "the original") == 0
