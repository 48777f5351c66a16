"""The backend under SGLang's own controller, factory and abstract classes: the eight promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lab import PAGE_TOKENS, Lab, prompt

LAYOUTS = [("mha", layout) for layout in ("layer_first", "page_first", "page_first_direct", "page_head")]
LAYOUTS += [("mla", layout) for layout in ("layer_first", "page_first", "page_first_direct")]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
@pytest.mark.parametrize("v1", [True, False])
def test_never_wrong__what_comes_back_is_what_was_stored_in_every_layout(tmp_path: Path, kind: str, layout: str, v1: bool) -> None:
    with Lab(tmp_path / "kv", kind, layout, v1) as lab:
        assert lab.store(prompt(40)) == 40 * PAGE_TOKENS
        assert lab.load(prompt(40)) == 40 * PAGE_TOKENS
        assert lab.load(prompt(40, salt=1)) == 0
