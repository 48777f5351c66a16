"""`CachedGenerator`: what one call looks up, lets the model read, and stores.

Invariant: nothing is looked up or stored but under the identity that the model has at that moment; what is stored is
exactly what the model has read; and an answer that was made is returned, whatever becomes of what is stored.
"""

from __future__ import annotations

import logging
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvkeep._errors import UnsupportedModelError
from kvkeep._tokens import KVCache, Namespace
from kvkeep.identity import IdentityState, ModelIdentity
from kvkeep.transformers._arguments import CACHE_NAMES, against_reuse, setting
from kvkeep.transformers._model import (
    CACHE_ARGUMENT,
    Layout,
    check_model,
    forget_requests,
    inner,
    layout_of,
    leaves_state,
    padding_is_harmless,
)
from kvkeep.transformers._past import Past, Row, Served, gather, look_up, one_gpu, store_row
from kvkeep.transformers._prompts import Prompts, numbers, prompts_of
from kvkeep.transformers._worth import Worth

if TYPE_CHECKING:
    from kvkeep import StoreReport

_log = logging.getLogger("kvkeep.transformers")

_GENERATE_ARGUMENTS = ("inputs", "generation_config")
"""What people give `generate` by position; with more than that a call is plain."""

_layouts: weakref.WeakKeyDictionary[Any, dict[str, Layout | str]] = weakref.WeakKeyDictionary()
"""What the probe found of a model, by its digest, or why it is refused: nobody need try it out again."""


@dataclass(frozen=True)
class Generation:
    """What one call of `CachedGenerator.generate` reused and stored."""

    prompt_tokens: int
    """Of all prompts of the call, without padding; 0 if it was plain."""
    cached_tokens: int
    """Tokens of the prompts that were found, and not read again unless a batch was read together."""
    ttft_seconds: float | None
    """From the call to the first token, look-up and load included; None if the call was plain."""
    stored: StoreReport | None
    """What became of the new blocks (of a batch: of its first row that had any); None if there was no full block."""
    plain: str | None = None
    """Why the call was a plain `generate`, or None."""
    row_cached_tokens: tuple[int, ...] = ()
    """`cached_tokens` of each prompt."""
    not_worth_tokens: int = 0
    """Tokens of the prompts that were found and read again, since the GPU reads them in less time than they take to load."""


class FirstToken:
    """A stopping criterion that never stops and notes when the first token was there."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._begin = time.perf_counter()
        self._reads: float | None = None

    def reads(self) -> None:
        """From now on the model reads."""
        self._reads = time.perf_counter()

    @property
    def reading_seconds(self) -> float | None:
        """Of `seconds`, what the model took."""
        return None if self.seconds is None or self._reads is None else self.seconds - (self._reads - self._begin)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.seconds is None:
            input_ids[0, -1].item()  # a GPU is only told what to do: wait until it has done it
            self.seconds = time.perf_counter() - self._begin
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class CachedGenerator:
    """`model.generate` with reuse.

    - `cache`: may be shared by any number of generators and threads.
    - `block_tokens`: reuse ends at a multiple of it; small blocks reuse more and cost more look-ups.
    - `salt`: a tenant's secret. `lora`: a label of yours that keeps KV apart; the adapters in use are seen without it.
    - `store_answers`: keep the KV of generated tokens too, so that the next turn of a chat reuses them.
    - `weights`: a revision or hash that you vouch for, instead of hashing the weights (see `kvkeep.identity`).

    The model may be changed at any time: other weights, adapters or settings are seen at the next call, and are another
    namespace. Safe from many threads, as far as the model's own `generate` is.

    Raises `UnsupportedModelError`.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        *,
        block_tokens: int = 16,
        salt: str = "",
        lora: str = "",
        store_answers: bool = True,
        weights: str | None = None,
    ) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache is a {type(cache).__name__}: give a kvkeep.KVCache, which keeps KV by tokens")
        check_model(model)
        self.model, self.cache, self.store_answers = model, cache, store_answers
        self.last: Generation | None = None
        """What the last call reused and stored; of several threads, whichever came last."""
        self._labels = (block_tokens, lora, salt)
        self._said: set[str] = set()
        self._leaves_state = leaves_state(model)
        self._pads: dict[str, bool] = {}
        self._served: Served | None = None
        self._worth: dict[str, Worth] = {}
        forget_requests(model)
        self._identity = ModelIdentity(model, weights=weights)
        state = self._identity.now()
        if state.refusal is None:
            self._served = self._serve(state)
        if self._served is not None and one_gpu(self._served.layout) is not None:
            cache.pin_memory()

    def __repr__(self) -> str:
        name = type(inner(self.model)).__name__
        last = self.last
        if last is None:
            return f"<CachedGenerator of {name}>"
        said = f"plain: {last.plain}" if last.plain else f"{last.cached_tokens} of {last.prompt_tokens} tokens cached"
        return f"<CachedGenerator of {name}, last call: {said}>"

    @property
    def namespace(self) -> Namespace | None:
        """Where the KV of the model as it was at the last call is kept; None if nothing may be kept yet."""
        return None if self._served is None else self._served.namespace

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `model.generate(*args, **kwargs)`: returns what that returns, and raises what that raises."""
        first_token = FirstToken()
        arguments = dict(zip(_GENERATE_ARGUMENTS, args)) | kwargs
        try:
            prompts, served = self._accept(args, kwargs, arguments)
            worth = self._worth.setdefault(served.digest, Worth())
            rows = look_up(self.cache, served, prompts.rows or [], worth)
            past = gather(self.model, self.cache, served, rows, prompts.width)
        except _Plain as plain:
            return self._plain(str(plain), args, kwargs)
        except Exception as error:  # a cache or a disk that fails must not cost the answer
            return self._plain(f"looking up failed: {type(error).__name__}: {error}", args, kwargs)
        call = {name: value for name, value in arguments.items() if name not in ("inputs", "input_ids", *CACHE_NAMES)}
        call["stopping_criteria"] = [first_token, *(kwargs.get("stopping_criteria") or ())]
        if prompts.mask is not None:
            call["attention_mask"] = prompts.mask
        return self._run(_Call(served, prompts, rows, past, first_token, arguments), call, args, kwargs)

    def _run(self, call: _Call, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Lets the model generate, and stores what it has read, also when it is interrupted."""
        begin = time.perf_counter()
        call.first_token.reads()
        try:
            output = self.model.generate(call.prompts.ids, **{CACHE_ARGUMENT: call.past.state}, **given)
        except BaseException as error:
            has_read = min(call.past.lengths(), default=-1) >= call.prompts.width
            if has_read:
                self._keep(call, None, time.perf_counter() - begin)
            elif isinstance(error, Exception) and given.get("streamer") is None:
                # It may be our state that it could not read.
                return self._plain(f"reading behind cached tokens failed: {error}", args, kwargs)
            raise
        seconds = time.perf_counter() - begin
        stored = self._keep(call, output if isinstance(output, torch.Tensor) else output.sequences, seconds)
        self._learn(call)
        cached = tuple(row.cached_tokens for row in call.rows)
        self.last = Generation(
            prompt_tokens=sum(len(row.tokens) for row in call.rows),
            cached_tokens=sum(cached),
            ttft_seconds=call.first_token.seconds or seconds,
            stored=stored,
            row_cached_tokens=cached,
            not_worth_tokens=sum(row.not_worth_tokens for row in call.rows),
        )
        return output

    def _learn(self, call: _Call) -> None:
        """How long reading took; of a batch that says little."""
        seconds = call.first_token.reading_seconds
        if seconds is not None and len(call.rows) == 1:
            row = call.rows[0]
            behind = row.cached_tokens
            self._worth[call.served.digest].read(len(row.tokens) - behind, behind, seconds)

    def _accept(self, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]) -> tuple[Prompts, Served]:
        """The prompts of a call and the model that they are for.

        Raises `_Plain` with the reason if the call must be plain.
        """
        if len(args) > len(_GENERATE_ARGUMENTS) or set(kwargs) & set(_GENERATE_ARGUMENTS[: len(args)]):
            raise _Plain("arguments were given by position")
        reason = against_reuse(self.model, arguments)
        if reason is not None:
            raise _Plain(reason)
        prompts = prompts_of(self.model, arguments)
        if prompts.refusal is not None:
            raise _Plain(prompts.refusal)
        state = self._state()
        if state.refusal is not None:
            raise _Plain(state.refusal)
        try:
            served = self._serve(state)
        except UnsupportedModelError as error:
            raise _Plain(str(error)) from error
        if prompts.padded and not self._pads_harmlessly(served):
            raise _Plain("with this model padding on the left changes the KV of what follows")
        return prompts, served

    def _state(self) -> IdentityState:
        """What the model is now."""
        if self._leaves_state:
            forget_requests(self.model)
        return self._identity.now()

    def _serve(self, state: IdentityState) -> Served:
        """The namespace and layout of the model as it is now.

        Raises `UnsupportedModelError`.
        """
        served = self._served
        if served is None or served.digest != state.digest:
            if served is not None:
                check_model(self.model)
            served = self._served = Served(state.digest, *self._namespace(state))
        return served

    def _namespace(self, state: IdentityState) -> tuple[Namespace, Layout]:
        known = _layouts.setdefault(self.model, {})
        if state.digest not in known:
            try:
                known[state.digest] = layout_of(self.model)
            except UnsupportedModelError as error:
                known[state.digest] = str(error)
        layout = known[state.digest]
        if isinstance(layout, str):
            raise UnsupportedModelError(layout)
        block_tokens, lora, salt = self._labels
        namespace = Namespace(
            type(inner(self.model)).__name__,
            layers=layout.layers,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            v_head_dim=layout.v_head_dim,
            dtype=layout.dtype,
            block_tokens=block_tokens,
            order="head_token",
            revision=state.digest,
            engine="transformers",
            lora=lora,
            salt=salt,
        )
        return namespace, layout

    def _pads_harmlessly(self, served: Served) -> bool:
        """Padding is tried out once, when the first padded prompt comes."""
        if served.digest not in self._pads:
            self._pads[served.digest] = padding_is_harmless(self.model)
        return self._pads[served.digest]

    def _keep(self, call: _Call, sequences: torch.Tensor | None, seconds: float) -> StoreReport | None:
        """Stores what the model has read: of the answers, or without them the prompts alone. Never raises."""
        try:
            return self._store(call, sequences, seconds)
        except Exception as error:
            self._say(f"what was read is not stored: {type(error).__name__}: {error}")
            return None

    def _store(self, call: _Call, sequences: torch.Tensor | None, seconds: float) -> StoreReport | None:
        state = self._state()
        if state.refusal is not None or state.digest != call.served.digest:
            self._say("what was read is not stored: the model changed while it generated")
            return None
        if sequences is not None:
            read = sequences.shape[1] - 1  # the last token has been chosen, and not read
            if call.past.lengths() != {read}:
                self._say("what was read is not stored: the model's state is not one entry for each token that it read")
                return None
        reports = []
        for number, (row, tokens) in enumerate(zip(call.rows, self._sequences(call, sequences), strict=True)):
            if tokens[: len(row.tokens)] != row.tokens:
                continue  # the answer is to another prompt: what the state holds is not known
            reports.append(store_row(self.cache, call.served, call.past, number, row, tokens, seconds / len(call.rows)))
        return next((report for report in reports if report is not None), None)

    def _sequences(self, call: _Call, sequences: torch.Tensor | None) -> list[list[int]]:
        """Each row's tokens that are to be stored: its prompt, and its answer without the padding behind its end."""
        if sequences is None or not self.store_answers:
            return [row.tokens for row in call.rows]
        padding = numbers(setting(self.model, call.arguments, "pad_token_id")) if len(call.rows) > 1 else ()
        rows = []
        for row, sequence in zip(call.rows, sequences[:, :-1].tolist(), strict=True):
            tokens = sequence[call.prompts.width - len(row.tokens) :]
            while padding and len(tokens) > len(row.tokens) and tokens[-1] in padding:
                tokens.pop()
            rows.append(tokens)
        return rows

    def _plain(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._say(f"running plain generate, nothing is reused or stored: {reason}")
        self.last = Generation(0, 0, None, None, plain=reason)
        return self.model.generate(*args, **kwargs)

    def _say(self, what: str) -> None:
        """A warning, once for each reason."""
        if what not in self._said:
            self._said.add(what)
            _log.warning("%s: %s", type(inner(self.model)).__name__, what)


class _Plain(Exception):
    """Why a call must be a plain `generate`."""


@dataclass(frozen=True)
class _Call:
    """One call that runs with reuse."""

    served: Served
    prompts: Prompts
    rows: list[Row]
    past: Past
    first_token: FirstToken
    arguments: dict[str, Any]
