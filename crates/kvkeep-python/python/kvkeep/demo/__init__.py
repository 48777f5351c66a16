"""The demos: real requests to a real model, first without, then with the cache. `python -m kvkeep.demo`."""
