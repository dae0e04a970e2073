"""The imports that vLLM's process needs. The fork server of `live.py` makes them ahead of time."""

import gc

# An import leaves no garbage, and searching for it takes a fifth of the time. Imported modules stay for good.
gc.disable()


import rollout.worker  # noqa: E402, F401

gc.freeze()
gc.enable()
