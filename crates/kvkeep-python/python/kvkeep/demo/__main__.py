"""`python -m kvkeep.demo [comparison|agent] [--json] [--plot out.png]`"""

from __future__ import annotations

import argparse
import json
import sys

EXIT_ANSWERS_DIFFER = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvkeep.demo",
        description="Real requests to a real torch model (random weights), first without, then with the cache.",
        epilog=f"Exit status: 0, or {EXIT_ANSWERS_DIFFER} if an answer with the cache differs from the one without.",
    )
    parser.add_argument("which", nargs="?", choices=("comparison", "agent"), help="one demo; both, shorter, if left out")
    parser.add_argument("--requests", type=_positive, help="how many requests")
    parser.add_argument("--max-tokens", type=_positive, default=8, help="answer tokens a request (%(default)s)")
    parser.add_argument("--block-tokens", type=_positive, default=16, help="tokens a block (%(default)s)")
    parser.add_argument("--capacity-gib", type=float, default=2.0, help="size of the cache in GiB (%(default)s)")
    parser.add_argument("--layers", type=_positive, default=12, help="layers of the model (%(default)s)")
    parser.add_argument("--threads", type=_positive, help="torch threads")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="OUT.png", help="write a plot of the times to first token")
    options = parser.parse_args()
    try:
        import torch

        from kvkeep.demo import lab, report, workloads
    except ImportError as error:
        print(f"kvkeep: the demo needs more than is installed ({error}): pip install 'kvkeep[demo]'", file=sys.stderr)
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    counts = (36, 30) if options.which else (14, 12)
    comparison, agent = workloads.both([options.requests or count for count in counts], lab.VOCABULARY)
    chosen = {"comparison": [comparison], "agent": [agent]}.get(options.which, [comparison, agent])
    model = lab.build_model(options.layers)
    outcomes = [
        lab.measure(model, workload, options.max_tokens, options.block_tokens, options.capacity_gib) for workload in chosen
    ]
    if options.json:
        summaries = [report.summary(outcome) for outcome in outcomes]
        both = dict(zip(("comparison", "agent"), summaries, strict=False))
        print(json.dumps(summaries[0] if len(summaries) == 1 else both, indent=2))
    else:
        print("\n\n".join(report.text(outcome) for outcome in outcomes))
    if options.plot:
        report.plot(outcomes, options.plot)
        print(f"plot written to {options.plot}", file=sys.stderr)
    differences = [difference for outcome in outcomes if (difference := report.difference(outcome))]
    for difference in differences:
        print(f"kvkeep: ANSWERS DIFFER: {difference}", file=sys.stderr)
    return EXIT_ANSWERS_DIFFER if differences else 0


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
