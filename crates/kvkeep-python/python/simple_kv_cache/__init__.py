"""`SimpleKVCache` under the name that code written for the class of this name imports."""

from kvkeep import SimpleKVCache, Stats

__all__ = ["SimpleKVCache", "Stats"]
