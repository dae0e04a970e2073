"""The echo recipe on an engine with vLLM's own default for log-probabilities: what the doctor is there to stop."""

from dataclasses import replace
from typing import Any

from echo import config as echo

from rl.config import Config
from trainer.launch import launch


def raw_engine(config: Config, **options: Any) -> Any:
    """An engine that returns raw log-probabilities."""
    from rollout.engine import Engine

    return Engine(config, overrides={"logprobs_mode": "raw_logprobs"}, **options)


config = replace(echo, name="raw", temperature=0.7, rollout=replace(echo.rollout, engine_class="raw:raw_engine"))

if __name__ == "__main__":
    launch(config)
