"""The Python snippets of README and of the quick start, run as they stand: what people paste works.

    python tests/readme.py

What a snippet takes for granted (`model`, `input_ids`) is made here; the one that asks a server has its like in docs/server.md, whose examples tests/server.py runs.
"""

from __future__ import annotations

import pathlib
import re

import torch
import transformers

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"README.md": 2, "docs/quick-start.md": 2}

config = transformers.LlamaConfig(
    vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
given = {"model": transformers.AutoModelForCausalLM.from_config(config).eval(), "input_ids": torch.randint(3, 200, (1, 40))}
passed = 0
for page, least in PAGES.items():
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)
    run = [snippet for snippet in snippets if "openai" not in snippet]
    assert len(run) >= least and len(snippets) - len(run) <= 1, f"{page} no longer has the snippets that this runs"
    for snippet in run:
        exec(compile(snippet, page, "exec"), dict(given))
    passed += len(run)
print(f"{passed} passed, 0 failed")
