"""What kvkeep's tiers in serving engines have in common: weights, settings, rates, figures.

Invariant: nothing here knows an engine. What one engine alone needs is in its own package, `kvkeep.vllm` or `kvkeep.sglang`.
"""
