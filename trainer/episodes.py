"""How does a run play episodes? Its environment in threads or processes, with the run's chat template."""

from rl.config import Config
from rl.environments.host import ThreadHost
from rl.loop.players import Episodes, stage_of
from rl.protocols import Rollouts
from trainer.cluster.env_workers import EnvWorkers
from trainer.prompts import Prepared


def episodes_of(config: Config, rollouts: Rollouts, prepared: Prepared) -> Episodes | None:
    """What plays the episodes of a run; None where it learns from single replies."""
    if config.env is None:
        return None
    host = EnvWorkers(config.env, config.env_workers) if config.env_workers else ThreadHost(env=config.env)
    return Episodes(config=config, stage=stage_of(config, rollouts, prepared.decode, prepared.chat, host))
