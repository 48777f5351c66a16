"""`SimpleKVCache` and `QuantizedKVCache` under the name that code written for classes of these names imports."""

from kvkeep import QuantizedKVCache, SimpleKVCache, Stats

__all__ = ["QuantizedKVCache", "SimpleKVCache", "Stats"]
