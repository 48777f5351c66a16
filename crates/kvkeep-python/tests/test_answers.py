"""An answer that was made is returned, and what was read for it is kept, whatever goes wrong around it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import greedy, ids, image_request, model_of, vision_model  # noqa: E402

from kvkeep import KVCache  # noqa: E402
from kvkeep.transformers import CachedGenerator, _generator  # noqa: E402


def generator_of(model: Any, cache: KVCache | None = None) -> CachedGenerator:
    return CachedGenerator(model, cache or KVCache(max_size_gb=0.1), block_tokens=8)


def answer(generator: CachedGenerator, prompt: Any, **more: Any) -> Any:
    return generator.generate(prompt, max_new_tokens=8, do_sample=False, **more)


def test_a_model_moved_to_bfloat16_answers_and_is_kept_apart() -> None:
    """After `model.to(bfloat16)` the same generator computed an answer and lost it to a DTypeMismatchError."""
    model, prompt = model_of("llama"), ids(40, 1)
    generator = generator_of(model)
    answer(generator, prompt)
    single = generator.namespace
    model.to(torch.bfloat16)
    for cached in (0, 32):
        assert torch.equal(answer(generator, prompt), greedy(model, prompt, 8))
        assert generator.last is not None and generator.last.cached_tokens == cached
    assert generator.namespace is not None and single is not None
    assert (single.dtype, generator.namespace.dtype) == ("f32", "bf16") and single.id != generator.namespace.id


@pytest.mark.parametrize("error", [RuntimeError("the client is gone"), KeyboardInterrupt()])
def test_what_was_prefilled_is_kept_when_a_streamer_raises(error: BaseException) -> None:
    """A streamer that raised, as when a client goes away, cost the prefill: nothing was stored."""

    class Streamer(transformers.generation.streamers.BaseStreamer):
        puts = 0

        def put(self, value: Any) -> None:
            self.puts += 1
            if self.puts == 4:  # the prompt and two tokens were fine
                raise error

        def end(self) -> None: ...

    for config in ("llama", "gemma3, three layers in four with a window"):
        model, prompt = model_of(config), ids(40, 1)
        generator = generator_of(model)
        with pytest.raises(type(error)):
            answer(generator, prompt, streamer=Streamer())
        assert generator.cache.stats()["entries"] == 5
        assert torch.equal(answer(generator, prompt), greedy(model, prompt, 8))
        assert generator.last is not None and generator.last.cached_tokens == 32


def test_what_was_prefilled_is_kept_when_a_stopping_criterion_raises() -> None:
    """A criterion of the caller's that raised cost the prefill, or made it run twice."""
    calls = 0

    def broken(input_ids: Any, scores: Any, **_: Any) -> Any:
        nonlocal calls
        calls += 1
        raise ValueError("no such stop")

    model, prompt = model_of("llama"), ids(40, 1)
    generator = generator_of(model)
    with pytest.raises(ValueError, match="no such stop"):
        answer(generator, prompt, stopping_criteria=[broken])
    assert calls == 1 and generator.cache.stats()["entries"] == 5


def test_a_cache_that_is_closed_or_fails_costs_no_answer(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Looking up in a closed cache raised in the middle of serving; a store that failed threw the answer away."""
    model, prompt = model_of("llama"), ids(40, 1)
    expected = greedy(model, prompt, 8)
    cache = KVCache(max_size_gb=0.1)
    generator = generator_of(model, cache)
    cache.close()
    for _ in range(3):
        assert torch.equal(answer(generator, prompt), expected)
        assert generator.last is not None and "looking up failed" in (generator.last.plain or "")
    assert len(caplog.records) == 1, "one warning for each reason"

    class Failing(KVCache):
        def store(self, *_: Any, **__: Any) -> Any:
            raise OSError("the disk is on fire")

    generator = generator_of(model, Failing(max_size_gb=0.1))
    assert torch.equal(answer(generator, prompt), expected)
    assert generator.last is not None and generator.last.stored is None and generator.last.plain is None
    assert "the disk is on fire" in caplog.text


def test_an_entry_larger_than_the_cache_costs_no_answer() -> None:
    model, prompt = model_of("llama"), ids(400, 1)
    generator = generator_of(model, KVCache(max_size_gb=0.0001))
    for _ in range(2):
        assert torch.equal(answer(generator, prompt), greedy(model, prompt, 8))
    assert generator.last is not None and generator.last.stored is not None
    assert generator.last.stored.rejected_blocks or generator.last.stored.rejection is not None


def test_nothing_is_stored_that_was_read_while_the_model_changed() -> None:
    """A training step between two tokens: what was read before and after it was stored as one."""
    model, prompt = model_of("llama"), ids(40, 1)
    generator = generator_of(model)

    def train(input_ids: Any, scores: Any, **_: Any) -> Any:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        return torch.zeros(1, dtype=torch.bool)

    answer(generator, prompt, stopping_criteria=[train])
    assert generator.cache.stats()["entries"] == 0


def test_nothing_is_stored_whose_length_is_not_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding that rolled the state back stored misaligned KV: 277 entries for a sequence of 150 tokens."""
    model, prompt = model_of("llama"), ids(40, 1)
    generator = generator_of(model)
    for change in (lambda layer: layer.crop(-1), lambda layer: layer.update(layer.keys[:, :, :2], layer.values[:, :, :2])):
        states: list[Any] = []

        def gather(*args: Any) -> Any:
            states.append(real(*args))
            return states[-1]

        def roll_back(input_ids: Any, scores: Any, **_: Any) -> Any:
            if input_ids.shape[1] == prompt.shape[1] + 8:
                change(states[-1].state.layers[2])
            return torch.zeros(1, dtype=torch.bool)

        real = _generator.gather
        with monkeypatch.context() as patch:
            patch.setattr(_generator, "gather", gather)
            answer(generator, prompt, stopping_criteria=[roll_back])
        assert generator.cache.stats()["entries"] == 0, generator.last


def test_a_text_prompt_after_a_request_with_a_picture_is_answered_right() -> None:
    """Models of the mRoPE family keep the last request's `rope_deltas`: a text prompt after a picture was read at other
    positions, and poisoned a fresh model that shared the cache."""
    cache, model, fresh = KVCache(max_size_gb=0.1), vision_model(), vision_model()
    prompt, picture = ids(40, 1), image_request()
    expected, seen = greedy(fresh, prompt, 8), model.generate(**picture, max_new_tokens=4, do_sample=False)
    generators = generator_of(model, cache), generator_of(fresh, cache)
    for turn in range(3):
        for generator in generators:
            model.generate(**picture, max_new_tokens=4, do_sample=False)
            assert model.model.rope_deltas.item() != 0, "this test would see nothing"
            assert torch.equal(answer(generator, prompt), expected)
            assert generator.last is not None and generator.last.plain is None
            assert generator.last.cached_tokens == (0 if turn == 0 and generator is generators[0] else 32)
    # A picture goes through, again and again, and nothing of it is kept.
    entries = cache.stats()["entries"]
    for _ in range(2):
        assert torch.equal(generators[0].generate(**picture, max_new_tokens=4, do_sample=False), seen)
        assert generators[0].last is not None and generators[0].last.plain is not None
    assert cache.stats()["entries"] == entries


def test_many_threads_share_one_generator_and_two_generators_one_model() -> None:
    model, cache = model_of("llama").double(), KVCache(max_size_gb=0.1)
    generators = generator_of(model, cache), generator_of(model, cache)
    shared = ids(40, 1)
    prompts = [torch.cat([shared, ids(5 + number, number)], dim=1) for number in range(6)]
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    wrong: list[int] = []

    def work(worker: int) -> None:
        for number, prompt in enumerate(prompts):
            got = generators[worker % 2].generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
            )
            if not torch.equal(got, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.stats()["entries"] > 5
