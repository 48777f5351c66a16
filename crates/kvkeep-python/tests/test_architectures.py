"""No causal architecture of transformers is silently wrong: each is served right, or refused by name.

Of all of them each fourth is swept, and all with KVKEEP_SWEEP=all (`make sweep`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import architectures  # noqa: E402

RUNS = 2
"""Processes side by side."""
PARTS = RUNS if os.environ.get("KVKEEP_SWEEP") == "all" else 4 * RUNS
"""Of so many parts the processes take one each."""
CHANGES_ITSELF = {"big_bird"}
"""Its first short prompt switches the model to full attention for good: another model, so a new process begins anew."""
PAGE = Path(__file__).parents[3] / "docs" / "models.md"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both phases, each in new processes, side by side: their findings by model type, and the folder."""
    folder = tmp_path_factory.mktemp("sweep")
    script, environment = architectures.__file__, os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    for phase in ("store", "reuse"):
        processes = [
            subprocess.Popen([sys.executable, script, phase, str(folder), str(part), str(PARTS)], env=environment, stdout=subprocess.DEVNULL)
            for part in range(RUNS)
        ]
        assert [process.wait() for process in processes] == [0] * RUNS
    found: dict[str, Any] = {"folder": folder}
    for phase in ("store", "reuse"):
        lines = [line for part in range(RUNS) for line in architectures.read_lines(folder / f"{phase}-{part}.jsonl")]
        found[phase] = {line["type"]: line for line in lines}
    return found


def test_warm_answers_of_every_architecture_are_those_of_plain_generate(sweep: dict[str, Any]) -> None:
    """Bidirectional models, a window that attention ignores, positions that padding shifts: all were served wrong."""
    reuses = {name: line for name, line in sweep["store"].items() if line["outcome"] == "reuses"}
    for name, line in reuses.items():
        assert line["apart"] is not None and line["apart"] < 1e-4, (name, line["apart"])
        assert line["cached"] == [0, 48, 56], (name, line["cached"])
        assert line["sees"] > 100 * line["apart"], (name, "the logits hardly depend on the prefix: this would see nothing")
        padded = line["padded"]
        assert "plain" in padded or (padded["apart"] is not None and padded["apart"] < 1e-4), (name, padded)
    assert len(reuses) >= 130 * RUNS // PARTS, "fewer architectures than ever are served"


def test_warm_answers_in_a_new_process_are_those_of_plain_generate(sweep: dict[str, Any]) -> None:
    for name, line in sweep["store"].items():
        if line["outcome"] == "reuses":
            again = sweep["reuse"][name]
            expected = [0] if name in CHANGES_ITSELF else [64]
            assert again["outcome"] == "reuses" and again["cached"] == expected, (name, again)
            assert again["apart"] is not None and again["apart"] < 1e-4, (name, again)


def test_what_is_not_served_is_refused_by_name_or_never_ran(sweep: dict[str, Any]) -> None:
    for name, line in sweep["store"].items():
        assert line["outcome"] in architectures.OUTCOMES, (name, line)
        assert line["outcome"] == "reuses" or line["why"], name
    swept = [architectures.architectures()[part::PARTS] for part in range(RUNS)]
    assert {name for part in swept for name, _ in part} == sweep["store"].keys()


def test_the_page_in_the_docs_is_what_the_sweep_finds(sweep: dict[str, Any]) -> None:
    if not PAGE.exists():
        pytest.skip("the docs are not here")
    if f"transformers {transformers.__version__} " not in PAGE.read_text():
        pytest.skip("the page was made with another release of transformers")

    def outcomes(page: str) -> list[list[str]]:
        return [line.split(" | ")[:3] for line in page.splitlines() if line.startswith("| `")]

    found = outcomes(architectures.table(sweep["folder"]))
    swept = [row for row in outcomes(PAGE.read_text()) if row[0].strip("| `") in sweep["store"]]
    assert found and swept == found
