"""`unison serve`: a model behind the APIs of OpenAI and Anthropic, for chats and external benchmarks."""

import argparse
import asyncio
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from rl.config import Config, RolloutConfig
from rl.tokens import Rendering
from rl.types import Data
from trainer.launch import configure
from trainer.model.files import looks_local
from trainer.plan.plan import Plan, make_plan
from trainer.tracking.terminal import console, status

KEY = "UNISON_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(arguments: Sequence[str]) -> int:
    """Serve a model until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="unison serve",
        usage="unison serve [-h] [--host HOST] [--port PORT] RUN|MODEL [FLAGS of a run]",
        description="Serve a model: POST /v1/chat/completions, /v1/responses and /v1/messages, GET /v1/models. A "
        "request may choose temperature, top_p, top_k, min_p, stop, seed and max_tokens. Nothing is trained.",
        epilog="All flags of a run work here too, such as --rollout.max-model-len 4096 or --dtype float32. On another "
        f"address than loopback a key is required: the variable {KEY}, or else one that is made and printed.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="RUN|MODEL", help="folder of a finished run, of a model, or a hub name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: a free one (default: 8000)")
    asked, flags = parser.parse_known_args(arguments)
    config, _ = configure(settings_of(asked.model), flags)
    plan = make_plan(config, learners=False)
    plan.check_gpus()
    key = os.environ.get(KEY, "") or ("" if asked.host in LOOPBACK else secrets.token_urlsafe(24))
    try:
        asyncio.run(_serve(plan, asked.host, asked.port, key))
    except KeyboardInterrupt:
        console.print("stopped")
    return 0


def settings_of(target: str) -> Config:
    """How a model is served: a run's as it was trained, any other one by the defaults. Raises ValueError for a run
    without a model, and for a folder that is not there."""
    run = Path(target)
    saved: dict[str, Any] = {}
    if not run.exists() and looks_local(target):
        raise ValueError(f"there is no folder {target}: train the run first, or give a model's folder or its hub name")
    if (run / "config.json").is_file() and (run / "metrics.jsonl").is_file():
        if not (run / "model").is_dir():
            raise ValueError(
                f"{target} has no model yet: it is exported when the run has finished. Resume it, or serve one of its "
                "best models (best/)"
            )
        saved, target = json.loads((run / "config.json").read_text()), str(run / "model")
    kept = ("max_model_len", "top_p", "top_k", "min_p", "tool_parser", "reasoning_parser", "kv_cache_gib")
    given = {name: saved["rollout"][name] for name in kept} if saved else {}
    # The length of a reply is each request's own.
    rollout = RolloutConfig(max_tokens=1, **given)
    own = ("dtype", "fp32_head", "temperature", "chat_template_kwargs")
    whole = {name: saved[name] for name in own if name in saved}
    return Config(name="serve", model=target, data=Data(train=[]), reward=lambda reply: 0.0, rollout=rollout, **whole)


async def _serve(plan: Plan, host: str, port: int, key: str) -> None:
    # Imported late: Ray takes a second that `--help` does not need.
    from trainer.cluster.cluster import Cluster

    config = plan.config
    async with aclosing(Cluster(config, plan.placement)) as cluster:
        cluster.boot()
        with status(f"starting an engine with {config.model}"):
            await cluster.start()
        rendering = Rendering(template=config.chat_template_kwargs)
        deadline = config.deadlines.start_s
        address = await cluster.ask_engine(0, lambda e: e.serve(rendering, host, port, key), deadline_s=deadline)
        console.print(f"{config.model} is served at {address}/v1 (Ctrl-C ends it)", highlight=False)
        if key:
            console.print(f"key: {key if not os.environ.get(KEY) else f'the value of {KEY}'}", highlight=False)
        while True:
            await cluster.ask_engine(0, lambda e: e.alive(), deadline_s=config.deadlines.sync_s)
            await asyncio.sleep(5)
