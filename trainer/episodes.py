"""How does a run play episodes? Its environment or its agent, in threads or processes, with the run's chat template."""

from functools import partial

from rl.agents import play as agents
from rl.config import Config
from rl.environments.host import Host, ThreadHost
from rl.loop.evaluate import HeldOut, held_out
from rl.loop.players import Episodes, in_environment, stage_of
from trainer.cluster.env_workers import EnvWorkers
from trainer.cluster.remote import RemoteEndpoints, RemoteRollouts
from trainer.data.sets import config_of
from trainer.prompts import Prepared


def episodes_of(
    config: Config, rollouts: RemoteRollouts, prepared: Prepared, host: Host | None = None
) -> Episodes | None:
    """What plays the episodes of a run; None where it learns from single replies. `host` is another player's, whose
    environments are the same."""
    make = config.env if config.env is not None else partial(agents.Hosted, config.agent)
    if not config.episodic:
        return None
    if host is None:
        host = EnvWorkers(make, config.env_workers) if config.env_workers else ThreadHost(env=make)
    if config.env is not None:
        stage = stage_of(config, rollouts, prepared.decode, prepared.chat(config), host)
        return in_environment(config, stage)
    counts: dict[str, float] = {}
    stage = agents.Stage(
        host=host,
        endpoints=RemoteEndpoints(rollouts, prepared.rendering),
        limits=config.limits,
        model=config.model,
        mask_truncated=config.mask_truncated,
        counts=counts,
    )
    return Episodes(config=config, stage=stage, play_one=partial(agents.play_agent, stage), counts=counts)


def held_out_sets(
    config: Config, rollouts: RemoteRollouts, prepared: Prepared, player: Episodes | None
) -> dict[str, HeldOut]:
    """The held-out sets of a run; `player` plays the episodes of those without an environment of their own."""
    found: dict[str, HeldOut] = {}
    for name, each in prepared.sets.items():
        mine = config_of(config, name, each)
        own = episodes_of(mine, rollouts, prepared) if each.env else player
        if player and each.limits and not each.env:
            own = episodes_of(mine, rollouts, prepared, player.stage.host)
        found[name] = held_out(config, each, prepared.evals[name], own)
    return found
