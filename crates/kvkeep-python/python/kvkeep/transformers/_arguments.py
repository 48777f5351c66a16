"""Which arguments and settings of `generate` leave the KV of a prefix as it is: an allow-list.

Invariant: a call is served with reuse only if every argument, every field of the `generation_config` it was given and
every field of the model's own is on the list, or has a value that means "off". What this file does not know, such as
an option of a later release, is not on it. A list of what is refused was the alternative: it is silently wrong about
everything that its author did not think of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What releases of transformers call the argument that holds the model's state."""

INPUTS = frozenset(("inputs", "input_ids", "attention_mask", "generation_config", *CACHE_NAMES))
"""Arguments that are looked at elsewhere; a state of the caller's own is refused in `against_reuse`."""

FREE = frozenset(
    (
        # When to stop.
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings"),
        *("stopping_criteria", "tokenizer", "early_stopping"),
        # Which token comes next: these see the logits and the ids, not the state.
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"),
        *("eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
        *("exponential_decay_length_penalty", "begin_suppress_tokens", "sequence_bias", "watermarking_config"),
        *("logits_processor", "prefix_allowed_tokens_fn"),
        # What is returned, as far as it speaks of new tokens only, and to whom.
        *("output_scores", "output_logits", "return_dict_in_generate", "streamer"),
        # Which tokens mean something.
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        # Settings of an assistant, which is refused itself.
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("speculation_type", "assistant_tokenizer"),
        # Settings of what is off: static caches, compilation, custom code.
        *("max_cache_len", "disable_compile", "trust_remote_code", "low_memory", "transformers_version"),
    )
)
"""Cannot change how the KV of a prefix is computed, whatever their value."""

_BEAMS = "reuse is for one sequence a prompt"
_ASSISTED = "assisted decoding rolls the state back"
_UNREAD = "it would be returned of the unread tokens only"

OFF: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), _BEAMS),
    "num_return_sequences": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "use_cache": ((True,), "without a cache there is no KV to reuse"),
    # The name is what old configurations of models with sliding windows hold; `generate` takes it for none.
    "cache_implementation": (("hybrid",), "the model's state must be a DynamicCache"),
    "cache_config": (({},), "the model's state must be a DynamicCache"),
    "prefill_chunk_size": ((), "the prompt is read in pieces"),
    "compile_config": ((), "compiled code may round in another way"),
    "continuous_batching_config": ((), "the model's state must be a DynamicCache"),
    "guidance_scale": ((1,), "guidance reads a second prompt"),
    "negative_prompt_ids": ((), "guidance reads a second prompt"),
    "negative_prompt_attention_mask": ((), "guidance reads a second prompt"),
    "penalty_alpha": ((0,), "contrastive search reads candidates into the state"),
    "dola_layers": ((), "DoLa looks into the layers"),
    "token_healing": ((False,), "it changes the prompt"),
    "output_attentions": ((False,), _UNREAD),
    "output_hidden_states": ((False,), _UNREAD),
    "is_assistant": ((False,), _ASSISTED),
    "use_mtp": ((False,), _ASSISTED),
    "assistant_model": ((), _ASSISTED),
    "assistant_early_exit": ((), _ASSISTED),
    "prompt_lookup_num_tokens": ((), _ASSISTED),
    "custom_generate": ((), "it is other code than generate's"),
    "synced_gpus": ((False,), "the model reads on after the answer is complete"),
    "inputs_embeds": ((), "reuse is by token ids"),
    "token_type_ids": ((), "the KV depends on more than the tokens"),
    "position_ids": ((), "positions count from the first token"),
}
"""Fields with the values that mean "off", beside None, and why anything else goes against reuse."""


def against_reuse(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why a call with these arguments must be a plain `generate`; None if it need not be.

    An argument goes before the configuration that was given, and that before the model's own, as in `generate`.
    """
    for name in CACHE_NAMES:
        if arguments.get(name) is not None:
            return f"{name} was given: the generator builds the state itself"
    given = arguments.get("generation_config")
    problems: dict[str, str] = {}
    for config in (model.generation_config, given):
        if config is not None:
            _judge(((name, value) for name, value in vars(config).items() if not name.startswith("_")), problems)
    _judge(((name, value) for name, value in arguments.items() if name not in INPUTS), problems)
    return next(iter(problems.values()), None)


def setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """The value of a setting as `generate` resolves it."""
    value = arguments.get(name)
    for config in (arguments.get("generation_config"), model.generation_config):
        if value is None and config is not None:
            value = getattr(config, name, None)
    return value


def _judge(fields: Iterable[tuple[str, Any]], problems: dict[str, str]) -> None:
    """Notes what goes against reuse, and strikes out what these fields turn off again."""
    for name, value in fields:
        if value is None or name in FREE:
            continue
        known = OFF.get(name)
        if known is None:
            problems[name] = f"{name} is not known to leave the KV as it is"
        elif _is_one_of(value, known[0]):
            problems.pop(name, None)
        else:
            problems[name] = f"{name} is set: {known[1]}"


def _is_one_of(value: Any, off: tuple[Any, ...]) -> bool:
    """Plain values only: a tensor or an array is no "off", and comparing one may not say yes or no."""
    return isinstance(value, (bool, int, float, str, dict)) and value in off
