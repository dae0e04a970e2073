"""Games of TextArena for one player: pip install textarena, then python recipes/environments/textarena_game.py"""

import random
import threading

import textarena  # pyright: ignore[reportMissingImports]

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments import Episode, Limits, Step, Turn
from rl.types import Data, Example
from trainer.launch import launch

ONE_GAME = threading.Lock()


class Game:
    def __init__(self, task):
        self.game, self.random = textarena.make(f"{task['game']}-raw"), random.getstate()  # without wrappers
        self._own(lambda: self.game.reset(num_players=1, seed=task["seed"]))

    def _own(self, work):
        """Games draw from the global generator: each gets its own stream of it, so that none depends on the others."""
        with ONE_GAME:
            before = random.getstate()
            random.setstate(self.random)
            try:
                return work()
            finally:
                self.random = random.getstate()
                random.setstate(before)

    def start(self) -> str:
        player, messages = self._own(self.game.get_observation)
        return "\n".join(text for sender, text, _ in messages if sender != player)

    def reply(self, turn: Turn) -> Step:
        done, _ = self._own(lambda: self.game.step(action=turn.text))
        return Step(done=True) if done else Step(observation=self.start())

    def reward(self, episode: Episode) -> float:
        rewards, _ = self.game.close()
        return float(rewards[0]) if rewards else 0.0  # no rewards: a limit ended the game


def games(game: str = "GuessTheNumber-v0") -> Data:
    said = [{"role": "system", "content": "You play a game. Answer with your move alone, as its rules write it."}]
    examples = [Example(prompt=said, task={"game": game, "seed": seed}) for seed in range(544)]
    return Data(train=examples[64:], evals={"held_out": examples[:64]})


rollout = RolloutConfig(max_tokens=64, max_model_len=4096)
config = Config(name="game", model="Qwen/Qwen2.5-1.5B-Instruct", data=games, env=Game, env_workers=4,
                limits=Limits(turns=20), rollout=rollout, trainer=TrainerConfig(lr=1e-6))  # fmt: skip

if __name__ == "__main__":
    launch(config)
