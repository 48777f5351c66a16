"""Several prompts in one call of `CachedGenerator.generate`: each with its own reuse, the answers as without."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import CONFIGS, WINDOW, ids, model_of  # noqa: E402

from kvkeep import KVCache  # noqa: E402
from kvkeep.transformers import CachedGenerator, _generator, _past  # noqa: E402


def batch_of(*prompts: Any) -> tuple[Any, Any]:
    """The prompts as one tensor, padded on the left, and its mask."""
    width = max(prompt.shape[1] for prompt in prompts)
    rows = [torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(prompt), (width - prompt.shape[1], 0)) for prompt in prompts]
    return torch.cat(rows), torch.cat(masks)


def generator_of(config: str, **more: Any) -> CachedGenerator:
    return CachedGenerator(model_of(config).double(), KVCache(max_size_gb=0.1), block_tokens=8, **more)


def check(generator: CachedGenerator, *prompts: Any, **more: Any) -> tuple[int, ...]:
    """Answers as plain `generate` does; returns how many tokens of each prompt were cached."""
    batch, mask = batch_of(*prompts)
    more = dict(max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True) | more
    expected = generator.model.generate(batch, attention_mask=mask, **more)
    got = generator.generate(batch, attention_mask=mask, **more)
    assert generator.last is not None and generator.last.plain is None, generator.last
    assert torch.equal(got.sequences, expected.sequences), generator.last
    for one, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    return generator.last.row_cached_tokens


@pytest.mark.parametrize("config", CONFIGS)
def test_prompts_of_different_lengths_answer_as_without_reuse(config: str) -> None:
    """A batch raised an error: one prompt at a time was all that there was."""
    generator = generator_of(config)
    shared = ids(60, 1)
    prompts = [torch.cat([shared, ids(rest, rest)], dim=1) for rest in (5, 30, 17)]
    assert check(generator, *prompts) == (0, 0, 0)
    assert check(generator, *prompts) == (64, 88, 72)
    # Prefixes that end before, in and behind a window, beside one that nobody has read.
    assert check(generator, shared[:, :12], shared[:, : WINDOW + 3], ids(50, 9)) == (8, 24, 0)


@pytest.mark.parametrize("config", ["llama", "mistral, all layers with a window", "gemma3, three layers in four with a window"])
def test_a_row_that_nobody_has_read_does_not_cost_the_others_their_reuse(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows share one state, so all would have to read what the one that has most to read must: the rows that have
    more to read than the others read it alone first."""
    generator = generator_of(config)
    known = [ids(90, seed) for seed in (1, 2, 3, 4)]
    check(generator, *known)
    batch, mask = batch_of(*known, ids(80, 9))
    expected = generator.model.generate(batch, attention_mask=mask, max_new_tokens=1, do_sample=False)
    check(generator, known[0], ids(20, 8))  # padding is tried out now, not below
    tokens: list[int] = []

    def counting_read(model: Any, rows: Any, state: Any) -> Any:
        tokens.extend(map(len, rows))
        return read(model, rows, state)

    def counting_gather(*args: Any) -> Any:
        past = gather(*args)
        tokens.append(batch.shape[0] * (batch.shape[1] - past.start))
        return past

    read, gather = _past.read, _past.gather
    monkeypatch.setattr(_past, "read", counting_read)
    monkeypatch.setattr(_generator, "gather", counting_gather)
    got = generator.generate(batch, attention_mask=mask, max_new_tokens=1, do_sample=False)
    assert torch.equal(got, expected)
    assert generator.last is not None and generator.last.row_cached_tokens == (88, 88, 88, 88, 0)
    assert sum(tokens) == 88, "of 440: two of each known row, and eighty of the other"
    # What was read alone is stored as well.
    assert check(generator, ids(80, 9))[0] >= 72


def test_what_a_batch_has_read_a_single_prompt_reuses_and_the_other_way_round() -> None:
    generator = generator_of("qwen2")
    one, other = ids(50, 1), ids(33, 2)
    check(generator, one, other)
    assert check(generator, one) == (48,)
    assert check(generator, other) == (32,)
    alone = ids(44, 3)
    check(generator, alone)
    assert check(generator, other, alone) == (32, 40)


def test_a_single_prompt_with_padding_reuses_what_it_has_without() -> None:
    generator = generator_of("llama")
    prompt = ids(50, 1)
    check(generator, prompt)
    padded = torch.nn.functional.pad(prompt, (7, 0))
    mask = (padded != 0).long()
    expected = generator.model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for given in (dict(attention_mask=mask), {}):  # without a mask `generate` guesses this one
        assert torch.equal(generator.generate(padded, max_new_tokens=10, do_sample=False, **given), expected)
        assert generator.last is not None and generator.last.cached_tokens == 48


def test_rows_that_end_early_store_no_padding_and_answer_right_afterwards() -> None:
    """A row that is complete is filled up with padding until the others are: that is no part of its answer."""
    generator = generator_of("llama")
    prompts = [ids(41, 1), ids(29, 2), ids(17, 3)]
    batch, mask = batch_of(*prompts)
    more = dict(max_new_tokens=30, do_sample=False)
    free = generator.model.generate(batch, attention_mask=mask, **more)
    end = int(free[0, batch.shape[1] + 3])
    expected = generator.model.generate(batch, attention_mask=mask, eos_token_id=end, pad_token_id=0, **more)
    assert (expected[0, -5:] == 0).all(), "no row ends early: this test would see nothing"
    assert torch.equal(generator.generate(batch, attention_mask=mask, eos_token_id=end, pad_token_id=0, **more), expected)
    blocks = generator.cache.stats()["entries"]
    assert blocks <= sum(int((row != 0).sum()) // 8 for row in expected)
    for prompt, row in zip(prompts, expected, strict=True):
        answer = row[row != 0][None]
        if answer.shape[1] > prompt.shape[1] + 9:
            assert check(generator, torch.cat([answer, ids(5, 7)], dim=1))[0] >= (answer.shape[1] - 1) // 8 * 8


def test_a_mask_that_hides_more_than_padding_on_the_left_makes_a_plain_run() -> None:
    generator = generator_of("llama")
    batch = torch.cat([ids(30, 1), ids(30, 2)])
    hole, right, nothing = torch.ones_like(batch), torch.ones_like(batch), torch.ones_like(batch)
    hole[0, 10] = 0
    right[1, 25:] = 0
    nothing[1] = 0
    for mask in (hole, right, nothing, torch.ones((2, 31), dtype=torch.long)[:, :30] * 2):
        expected = generator.model.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert torch.equal(generator.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False), expected)
        assert generator.last is not None and "attention_mask" in (generator.last.plain or "")
    assert generator.cache.stats()["entries"] == 0
