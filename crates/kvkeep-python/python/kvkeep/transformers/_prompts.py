"""The prompts in a call's ids and mask: each row's own tokens, without the padding on its left.

Invariant: a row is what plain `generate` lets the model see, at the positions at which it sees it. A mask that is not
given is the one that `generate` guesses: it hides tokens that look like padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvkeep.transformers._arguments import setting


@dataclass
class Prompts:
    """The prompts of one call, or why there is none that can be looked up (`refusal`)."""

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    """The mask to hand on; None where none was given and nothing is hidden."""
    rows: list[list[int]] | None = None
    refusal: str | None = None

    @property
    def width(self) -> int:
        return 0 if self.ids is None else int(self.ids.shape[1])

    @property
    def padded(self) -> bool:
        return any(len(row) < self.width for row in self.rows or ())


def prompts_of(model: Any, arguments: Mapping[str, Any]) -> Prompts:
    """The prompts in the arguments of a call."""
    ids, named = arguments.get("inputs"), arguments.get("input_ids")
    if ids is not None and named is not None:
        return Prompts(refusal="inputs and input_ids were given")
    ids = named if ids is None else ids
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        return Prompts(refusal="the prompt is no tensor of token ids, [prompts, tokens]")
    if ids.numel() == 0 or ids.is_meta:
        return Prompts(refusal="the prompt is empty")
    rows, mask = ids.tolist(), arguments.get("attention_mask")
    if mask is None:
        mask = _guessed_mask(model, arguments, ids, rows)
        if mask is None:
            return Prompts(ids, None, rows)
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return Prompts(refusal="attention_mask has not the shape of the prompt")
    return _cut(ids, mask, rows)


def numbers(value: Any) -> tuple[int, ...]:
    """A token id, or several, or none, as they stand in configurations."""
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _cut(ids: torch.Tensor, mask: torch.Tensor, rows: list[list[int]]) -> Prompts:
    shown = mask == 1
    if bool(shown.all()):
        return Prompts(ids, mask, rows)
    lengths = shown.sum(dim=1)
    # A row of ones behind zeros: then its last `length` places are all the ones it has.
    on_the_right = torch.arange(ids.shape[1], 0, -1, device=mask.device)[None] <= lengths[:, None]
    if not bool(((mask == 0) | shown).all() and torch.equal(shown, on_the_right) and (lengths > 0).all()):
        return Prompts(refusal="attention_mask hides more than padding on the left")
    return Prompts(ids, mask, [row[-length:] for row, length in zip(rows, lengths.tolist(), strict=True)])


def _guessed_mask(
    model: Any, arguments: Mapping[str, Any], ids: torch.Tensor, rows: list[list[int]]
) -> torch.Tensor | None:
    """The mask that `generate` makes up: it hides padding tokens, unless padding is also an end of the answer."""
    padding = numbers(setting(model, arguments, "pad_token_id"))
    if not padding or not any(token in row for token in padding for row in rows):
        return None
    if set(padding) & set(numbers(setting(model, arguments, "eos_token_id"))):
        return None
    return ids.ne(padding[0]).long()
