"""Environments that OpenEnv serves, one session for each episode: start a server that allows as many sessions as
episodes run at once, then python recipes/environments/openenv_client.py"""

import json

from websockets.asyncio.client import connect

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments import EnvError, Episode, Limits, Step, ToolError, Turn
from rl.types import Data, Example
from trainer.launch import launch


class OpenEnv:
    url = "ws://localhost:8000/ws"
    action, shown = "message", "echoed_message"  # fields of the server's actions and observations

    def __init__(self, task):
        self.task, self.socket = task, None

    async def start(self) -> str:
        self.socket = await connect(self.url)
        return str((await self._ask("reset", {"seed": self.task["seed"]})).observation)

    async def reply(self, turn: Turn) -> Step:
        return await self._ask("step", {self.action: turn.text})

    async def _ask(self, kind: str, data: dict) -> Step:
        await self.socket.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(await self.socket.recv())
        if answer["type"] == "error":
            wrong = ToolError if answer["data"].get("code") == "VALIDATION_ERROR" else EnvError
            raise wrong(answer["data"]["message"])
        told = answer["data"]
        seen = str(told["observation"].get(self.shown, ""))
        return Step(observation=seen, reward=told["reward"] or 0.0, done=told["done"])

    def reward(self, episode: Episode) -> float:
        return 0.0  # the server pays each turn

    async def close(self) -> None:
        if self.socket:
            await self.socket.close()


examples = [Example(prompt=[{"role": "system", "content": "Act."}], task={"seed": seed}) for seed in range(256)]
config = Config(name="openenv", model="Qwen/Qwen2.5-1.5B-Instruct", data=Data(train=examples), env=OpenEnv,
                limits=Limits(turns=8), rollout=RolloutConfig(max_tokens=256, max_model_len=4096),
                trainer=TrainerConfig(lr=1e-6))  # fmt: skip

if __name__ == "__main__":
    launch(config)
