#!/usr/bin/env python3
"""Tables, and a plot if matplotlib is there, of what `ttft.py` printed.

    cat runs/*.jsonl | table.py [--plot ttft.png]

Several runs of one mode are put together: the median of their medians, and the lowest and highest.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from typing import Any

COLUMNS = ("cold", "gpu", "below", "restart")
SAME = {None: "", 0: "NO", 1: "yes", 2: "to the bit"}


def read(lines: Any) -> dict[str, dict[int, dict[str, list[float]]]]:
    """mode → prefix → column → medians of each run."""
    runs: dict[str, dict[int, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    answers: dict[Any, list[Any]] = defaultdict(list)
    for line in lines:
        row = json.loads(line)
        for column in COLUMNS:
            if f"{column}_ms" in row:
                runs[row["mode"]][row["prefix"]][column].append(row[f"{column}_ms"])
        if "answers" in row:
            answers[row["mode"], row["prefix"], row["seed"]] += row["answers"].values()
    for (mode, prefix, _), lists in answers.items():
        runs[mode][prefix]["same"].append(sameness(lists))
    return runs


def sameness(lists: list[list[list[Any]]]) -> float:
    """Of the answers to the same prompts: 0 if their tokens differ, 1 if those are the same, 2 if their log probabilities are, too, to the last bit."""
    same_tokens = all([token for token, _ in each] == [token for token, _ in lists[0]] for each in lists)
    are_bits = all(bits is not None for each in lists for _, bits in each)
    return same_tokens + (same_tokens and are_bits and all(each == lists[0] for each in lists))


def cell(values: list[float]) -> str:
    if not values:
        return ""
    middle = f"{statistics.median(values):,.0f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.0f} to {max(values):,.0f})"


def main() -> None:
    runs = read(line for line in sys.stdin if line.startswith("{"))
    print("| mode | prefix | cold | GPU | below | new process | restart / cold | same |\n|---|---|---|---|---|---|---|---|")
    for mode, by_length in runs.items():
        for prefix, columns in sorted(by_length.items()):
            ratio = f"{statistics.median(columns['restart']) / statistics.median(columns['cold']):.2f}" if columns["restart"] and columns["cold"] else ""
            cells = [cell(columns[column]) for column in COLUMNS]
            print(f"| {mode} | {prefix:,} | {' | '.join(cells)} | {ratio} | {SAME[min(columns['same'], default=None)]} |")
    if "--plot" in sys.argv:
        plot(runs, sys.argv[sys.argv.index("--plot") + 1])


def plot(runs: Any, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    vllms, ours = "-", "--"  # where two lines lie on each other, both are seen
    lines = [("fs", "restart", "vLLM's files, new process", "tab:brown", vllms), ("kvkeep", "restart", "kvkeep's disk, new process", "tab:pink", ours),
             ("none", "cold", "computed", "tab:gray", vllms), ("native", "below", "vLLM's RAM", "tab:green", vllms),
             ("kvkeep", "below", "vLLM's RAM, kvkeep below", "tab:olive", ours), ("ram", "below", "kvkeep's RAM", "tab:red", ours),
             ("layers", "below", "kvkeep's RAM, layer by layer", "tab:blue", ours), ("native", "gpu", "in the GPU", "tab:orange", vllms)]  # fmt: skip
    for mode, column, label, colour, style in lines:
        points = [(prefix, statistics.median(columns[column])) for prefix, columns in sorted(runs.get(mode, {}).items()) if columns[column]]
        if points:
            axes.plot(*zip(*points), style, marker="o", markersize=5, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prefix", ylabel="time to first token, ms")
    lengths = sorted({prefix for by_length in runs.values() for prefix in by_length})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_yticks(times := [20, 50, 100, 200, 500, 1000, 2000, 5000], [f"{ms:,}" for ms in times])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
