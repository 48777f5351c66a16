"""Both runs of a demo: as JSON (the same keys as the command `kvkeep demo` prints), as text, as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kvkeep.demo.lab import Outcome, Run


def summary(outcome: Outcome) -> dict[str, Any]:
    """What `--json` prints for one demo."""
    without, with_cache = outcome.without, outcome.with_cache
    halves = _half(without), _half(with_cache)
    return {
        "model": outcome.model,
        "threads": torch.get_num_threads(),
        "block_tokens": outcome.block_tokens,
        "requests": len(with_cache.answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in with_cache.answers),
        "without": halves[0],
        "with": halves[1],
        "speedup": halves[0]["ttft_ms"]["avg"] / halves[1]["ttft_ms"]["avg"],
        "hit_rate_percent": _hit_rate(with_cache, lambda _: True),
        "hit_rate_after_first_percent": _hit_rate(with_cache, lambda n: n not in outcome.workload.first_turns),
        "time_saved_s": sum(_ttft(without)) - sum(_ttft(with_cache)),
        "cache_time_saved_s": outcome.cache["time_saved_seconds"],
        "answers_identical": difference(outcome) is None,
    }


def difference(outcome: Outcome) -> str | None:
    """The first request whose answers differ, in words."""
    pairs = zip(outcome.without.answers, outcome.with_cache.answers, strict=True)
    for number, (without, with_cache) in enumerate(pairs, 1):
        if without.tokens != with_cache.tokens:
            return f"request {number}: without {without.tokens}, with {with_cache.tokens}"
    return None


def text(outcome: Outcome) -> str:
    """For people."""
    figures = summary(outcome)
    slow, fast = figures["without"], figures["with"]
    rows = [
        ("time to first token, average", slow["ttft_ms"]["avg"], fast["ttft_ms"]["avg"], "ms"),
        ("  p50", slow["ttft_ms"]["p50"], fast["ttft_ms"]["p50"], "ms"),
        ("  p95", slow["ttft_ms"]["p95"], fast["ttft_ms"]["p95"], "ms"),
        ("total time, answers included", slow["total_s"], fast["total_s"], "s"),
    ]
    lines = [
        f"{outcome.workload.title}: {outcome.workload.about}",
        f"{figures['model']}, {figures['threads']} threads",
        f"  {'':30}{'without':>12}{'with kvkeep':>14}{'better by':>12}",
    ]
    for name, before, after, unit in rows:
        digits = 0 if unit == "ms" else 1
        lines.append(
            f"  {name:30}{f'{before:.{digits}f} {unit}':>12}{f'{after:.{digits}f} {unit}':>14}{before / after:>11.1f}x"
        )
    identical = "identical" if figures["answers_identical"] else "THEY DIFFER"
    lines += [
        f"  speed-up    {figures['speedup']:.1f}x on the average time to first token, cold first requests included",
        f"  hit rate    {figures['hit_rate_percent']:.1f}% of {figures['prompt_tokens']} prompt tokens; "
        f"{figures['hit_rate_after_first_percent']:.1f}% after the first request of each {outcome.workload.session}",
        f"  time saved  {figures['time_saved_s']:.1f} s of waiting for first tokens",
        f"  answers     {identical}",
        f"  cache       {outcome.cache['size_mb']:.0f} MiB in {outcome.cache['entries']} blocks",
    ]
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], path: str) -> None:
    """Time to first token of every request, without and with the cache, one panel a demo."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(outcomes), figsize=(6.4 * len(outcomes), 4), squeeze=False, layout="constrained")
    for panel, outcome in zip(panels[0], outcomes, strict=True):
        for run, label, colour in ((outcome.without, "without", "#b0b7c3"), (outcome.with_cache, "with kvkeep", "#1f7a4d")):
            times = [milliseconds for milliseconds in _ttft(run, 1e3)]
            panel.plot(range(1, len(times) + 1), times, marker="o", markersize=4, color=colour, label=label)
        panel.set_title(f"{outcome.workload.title}: {summary(outcome)['speedup']:.1f}x faster to the first token")
        panel.set_xlabel("request")
        panel.set_ylabel("time to first token, ms")
        panel.set_ylim(bottom=0)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _half(run: Run) -> dict[str, Any]:
    times = np.array(_ttft(run, 1e3))
    percentiles = {f"p{p}": float(np.percentile(times, p)) for p in (50, 95, 99)}
    answered = sum(len(answer.tokens) for answer in run.answers)
    return {
        "ttft_ms": {"avg": float(times.mean()), **percentiles},
        "total_s": run.total_seconds,
        "tokens_per_s": answered / run.total_seconds,
    }


def _ttft(run: Run, scale: float = 1.0) -> list[float]:
    return [answer.ttft_seconds * scale for answer in run.answers]


def _hit_rate(run: Run, counts: Callable[[int], bool]) -> float:
    counted = [answer for number, answer in enumerate(run.answers) if counts(number)]
    asked = sum(answer.prompt_tokens for answer in counted)
    return 100 * sum(answer.cached_tokens for answer in counted) / asked if asked else 0.0
