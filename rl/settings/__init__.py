"""Parts of the config that are too long for rl/config.py: the learner, the trackers."""
