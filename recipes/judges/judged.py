"""A model as judge: SmolLM2-135M-Instruct learns to explain words in one sentence, and another model scores it.

    vllm serve Qwen/Qwen2.5-1.5B-Instruct --port 8000     # elsewhere: any URL with OpenAI's chat completions
    python recipes/judges/judged.py

docs/tutorials/a-model-as-judge.md explains each line. Not yet run with a judge of this size.
"""

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.judges import Calls, OpenAIJudge, Preference, number_after
from rl.objectives import GSPO
from rl.types import Data, Example, Reply
from trainer.launch import launch

WORDS = "bridge river candle winter doctor market garden mirror engine island pillow ladder forest bottle planet window"
GOOD = "A bridge is a structure that carries a road or a path over a river, a valley or another road."
PROMPT = """Question: {prompt}

Answer: {reply}

Is the answer one correct and clear sentence? Give one reason, then a line "Score: N" with N from 0 to 10."""


def question(word: str) -> str:
    """What the policy is asked."""
    return f"Explain the word '{word}' in one sentence."


def words() -> Data:
    """12 words to learn from, and 4 others for the evaluation."""
    examples = [Example(prompt=[{"role": "user", "content": question(word)}]) for word in WORDS.split()]
    return Data(train=examples[4:], evals={"held_out": examples[:4]})


def pairs() -> list[Preference]:
    """Replies of which the first is better: the run reports how often the judge agrees. Have 100 or more."""
    worse = ("A bridge is a bridge.", "I like it.", "A bridge is a small animal that lives in trees.")
    return [Preference(prompt=question("bridge"), chosen=GOOD, rejected=each) for each in worse]


judge = OpenAIJudge(
    url="http://localhost:8000/v1",
    model="Qwen/Qwen2.5-1.5B-Instruct",
    prompt=PROMPT,
    parse=number_after("Score:", 0, 10),
    calls=Calls(concurrency=16),
    labelled=pairs,
)
# A reward model in place of it, which gets an engine of its own:
# judge = RewardModel(model="Skywork/Skywork-Reward-V2-Qwen3-0.6B", labelled=pairs)


async def reward(reply: Reply) -> dict[str, float]:
    """The judge's score, from 0 to 1; a reply that was cut off is not asked about."""
    return {"judged": await judge(reply.prompt, reply.text) / 10 if reply.finished else 0.0}


config = Config(
    name="judged",
    model="models/smollm2-135m",
    data=words,
    reward=reward,
    judges=(judge,),
    objective=GSPO(),
    steps=20,
    prompts_per_step=4,
    eval_samples=4,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=48, max_model_len=128, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5),
)

if __name__ == "__main__":
    launch(config)
