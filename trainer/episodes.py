"""How does a run play episodes? Its environment in threads or processes, with the run's chat template."""

from rl.config import Config
from rl.environments.host import ThreadHost
from rl.loop.evaluate import HeldOut, held_out
from rl.loop.players import Episodes, stage_of
from rl.protocols import Rollouts
from trainer.cluster.env_workers import EnvWorkers
from trainer.data.sets import config_of
from trainer.prompts import Prepared


def episodes_of(config: Config, rollouts: Rollouts, prepared: Prepared) -> Episodes | None:
    """What plays the episodes of a run; None where it learns from single replies."""
    if config.env is None:
        return None
    host = EnvWorkers(config.env, config.env_workers) if config.env_workers else ThreadHost(env=config.env)
    stage = stage_of(config, rollouts, prepared.decode, prepared.chat(config), host)
    return Episodes(config=config, stage=stage)


def held_out_sets(
    config: Config, rollouts: Rollouts, prepared: Prepared, player: Episodes | None
) -> dict[str, HeldOut]:
    """The held-out sets of a run; `player` plays the episodes of those without an environment of their own."""
    found: dict[str, HeldOut] = {}
    for name, each in prepared.sets.items():
        own = episodes_of(config_of(config, name, each), rollouts, prepared) if each.env else player
        found[name] = held_out(config, each, prepared.evals[name], own)
    return found
