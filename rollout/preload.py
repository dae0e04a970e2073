"""What vLLM's process needs, imported ahead of time by the fork server (see `rollout.process`)."""

import gc

# An import leaves no garbage, and looking for it takes a fifth of the time; what was imported stays for good.
gc.disable()


import rollout.worker  # noqa: E402, F401

gc.freeze()
gc.enable()
