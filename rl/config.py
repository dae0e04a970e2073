"""The whole run as one value: every setting, its unit and its default. The rules are in rl/validate.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rl.environments.types import Limits
from rl.filters import GroupFilter
from rl.judges import Judge
from rl.objectives import GSPO, Objective
from rl.objectives.corrections import Correction, Uncorrected
from rl.rewards.score import Reward
from rl.sampling.truncation import Truncation
from rl.settings.tracking import TrackingConfig as TrackingConfig
from rl.settings.trainer import Lora as Lora
from rl.settings.trainer import TrainerConfig
from rl.tools import MCP
from rl.typed import Checked
from rl.types import Data


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Checked):
    """The engines: how vLLM samples."""

    engines: int = 1
    """Number of vLLM engines with which the run starts. Each is one Ray actor."""
    max_engines: int | None = None
    """The engines follow the nodes of the cluster, up to this number: more start where a node has room or joins, and
    those of a node that is drained or lost end, without losing a group. Default: `engines`, as fixed number."""
    tensor_parallel: int = 1
    """GPUs per engine."""
    max_tokens: int = 256
    """Most tokens of one completion; a longer one is cut off there."""
    max_model_len: int = 1024
    """Most tokens of a prompt and its completion together."""
    max_num_seqs: int = 64
    """Most sequences that one engine decodes at the same time."""
    max_num_batched_tokens: int | None = None
    """Most tokens that one engine step computes, on GPUs. None: 8192, or the longest sequence if that is longer."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities first add up to this. The trainer then renormalises over
    the same tokens. 1 is off."""
    top_k: int = 0
    """Sample from the k most likely tokens. The trainer then renormalises over the same tokens. 0 is off."""
    min_p: float = 0.0
    """Sample from tokens at least this likely, relative to the most likely one. 0 is off."""
    min_tokens: int = 0
    """Fewest tokens of one completion. Until then no stop token can be sampled; the trainer gives them the probability
    0 there too. 0 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply as soon as it holds one of them. Their tokens stay in the reply and are trained on."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a reply, besides those of the model. They are trained on."""
    bad_words: tuple[str, ...] = ()
    """Words that cannot be sampled: the last token of each after its others. The trainer forbids it there too."""
    tool_parser: str = ""
    """The parser of vLLM for the model's tool calls, such as "hermes" (the names of `vllm serve --tool-call-parser`).
    Empty: replies are not searched for calls."""
    reasoning_parser: str = ""
    """The parser of vLLM that separates reasoning from the answer, such as "qwen3" or "deepseek_r1". Empty: it stays in
    the answer."""
    endpoint_host: str = "127.0.0.1"
    """Address of a node on which its engines serve agents. The default is reached from the same machine alone; 0.0.0.0
    from others too, such as containers and other nodes. Each episode's address holds a secret."""
    prefix_cache: bool = True
    """Compute the prompt of a group once. Entries are keyed by weight version, so none is used after an update."""
    router_replay: bool = False
    """For mixture-of-experts models: in the trainer, send each token to the experts that the engine sent it to, weighed
    by the trainer's router (R3, arXiv 2510.11370). Needs GPUs, whose engines report the experts."""
    recompute_kv: bool = False
    """At a weight update, recompute the context of running requests with the new weights, at the cost of one prefill
    each. Off: running requests continue on the KV cache of the old weights."""
    async_scheduling: bool = False
    """Use vLLM's asynchronous scheduler, its own default. Keep it off until the doctor shows parity with it."""
    enforce_eager: bool | None = None
    """Run without compilation and CUDA graphs. Default: on for CPU, off for GPU."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory for one engine: weights and KV cache, from 0 to 1."""
    sleep: bool = False
    """On a shared GPU, take turns: the engine gives its memory back while the learner steps, and the learner keeps
    gradients, masters and Adam's moments in host memory while the engine samples. Not yet run on a GPU."""
    receive_while_sampling: bool = False
    """Over NCCL: an update arrives in spare memory while the engine samples, which then stands still only to load it.
    Takes the model's weights once more on the GPU, next to `gpu_memory_utilization`. On CPU it is always so. Not yet
    run on a GPU."""
    kv_cache_gib: float = 1.0
    """KV cache of one engine on CPU, in GiB."""
    threads: int | None = None
    """OpenMP threads of one engine on CPU. Default: all cores if engine and learner take turns, else 1."""
    seeded: bool = True
    """Give every sample its own seed, so that its tokens do not depend on the rest of the batch."""
    retries: int = 3
    """How many times a group is sampled again after its engine was lost. After that it counts as failed."""
    restarts: int = 3
    """How many lost engines are restarted in one run, and how often each reward model. After that the run ends. With
    `max_engines` losses are counted from the last update on."""
    engine_class: str = "rollout.engine:Engine"
    """Class of the engines, "module:Class". An experiment may name its own class, in a file next to its recipe."""

    @property
    def most_engines(self) -> int:
        """Most engines that there can be at the same time."""
        return self.max_engines or self.engines

    @property
    def truncation(self) -> Truncation | None:
        """What top_p, top_k and min_p cut off; None when they keep the whole vocabulary."""
        wanted = Truncation(top_p=self.top_p, top_k=self.top_k, min_p=self.min_p)
        return None if wanted == Truncation() else wanted

    @classmethod
    def right_form(cls, field: str, value: Any) -> str | None:
        """How to write one stop text or one bad word."""
        lone = field in ("stop", "bad_words") and isinstance(value, str)
        return f"is text: write a tuple, {field}=({value!r},)" if lone else None


@dataclass(frozen=True, kw_only=True)
class Deadlines(Checked):
    """How long each wait may take, in seconds. After that the run ends with a message: who waited for whom."""

    start_s: float = 900.0
    """Seconds for engines and ranks to start."""
    sample_s: float = 1800.0
    """Seconds in which an engine must return some sample while it has any to make, and a step must get one more group.
    It is no limit for a whole step or evaluation."""
    reward_s: float = 60.0
    """Seconds for one call of the reward function, from when it runs, without those in which other rewards compute."""
    step_s: float = 1800.0
    """Seconds for one call to the learner, such as a training step."""
    sync_s: float = 300.0
    """Seconds for one weight update of all engines."""
    stop_s: float = 30.0
    """Seconds from SIGTERM to the end of the checkpoint that it starts. Schedulers wait about 30 s before they kill."""


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """One run."""

    name: str
    """Folder of the run under `output_dir`, and its name in W&B."""
    model: str
    """Local folder or hub name of a causal language model."""
    data: Callable[[], Data]
    """Function that returns `Data(train=[Example(...)])`, or a `Data`. Called once, on the driver."""
    reward: Reward | None = None
    """Function that takes a `Reply` and returns its reward. It may be `async`. Several rewards: `Weighted({...})`; one
    that sees the whole group: `OverGroup(judge)`. Give this, `env` or `agent`."""
    env: type | Callable[..., Any] | None = None
    """Environment class, for episodes of many turns with tools: one object per episode, `env(task)`. Its public methods
    are tools, and its `reward(episode)` scores it. Give this, `agent` or `reward`."""
    agent: Callable[..., Any] | list[str] | None = None
    """Agent with a loop of its own, for episodes: `async def agent(ctx)` returns the reward, and reaches the policy
    with a stock client of OpenAI or Anthropic at `ctx.base_url`. A list of words is a command, which prints its reward
    as its last line. Give this, `env` or `reward`."""
    tools: MCP = field(default_factory=MCP)
    """More tools for the episodes of `env`, from an MCP server: `MCP(command=["python", "server.py"])`, or
    `MCP(url="http://localhost:8000/mcp")`. Each process with environments has a server of its own."""
    limits: Limits = field(default_factory=Limits)
    """When an episode of `env` or `agent` ends."""
    env_workers: int = 0
    """Processes for environments and agents that compute much. 0: they live in the driver's process, in threads."""
    judges: tuple[Judge, ...] = ()
    """Models that rewards or environments await: `RewardModel(...)`, which gets an engine of its own, and
    `OpenAIJudge(...)`, behind a URL."""
    max_failed: float = 0.1
    """Largest share of the last 50 groups that may fail because of their environment or a judge. Above it the run ends
    with the first error. An episode or a reward that fails so is first tried again (`rollout.retries`)."""
    eval_reward: Reward | None = None
    """Reward for evaluations. pass@k counts a reward of at least 1. Default: the same as `reward`, or as `env`."""
    objective: Objective = field(default_factory=GSPO)
    """What is optimised: an object of rl/objectives, or your own."""
    steps: int = 100
    """Steps of the loop: sample, score, learn, publish."""
    prompts_per_step: int = 8
    """Prompts, and so groups, of one step."""
    group_size: int = 8
    """Completions per prompt."""
    filters: tuple[GroupFilter, ...] = ()
    """Rules (rl/filters.py) that take a group out of training; another group is sampled instead. `ZeroAdvantage()` is
    DAPO's dynamic sampling."""
    max_filtered: int = 10
    """Most groups that filters may take out between two steps, as a multiple of `prompts_per_step`. After that the run
    ends."""
    mask_truncated: bool = False
    """Do not train on replies that `rollout.max_tokens` cut off. Their rewards still count for the rest of the group.
    A group of cut replies alone is left out, as by a filter."""
    max_staleness: int = 0
    """How many weight versions a sample may be behind when its step begins. 0: synchronous and on-policy."""
    late_groups: Literal["drop", "wait"] = "drop"
    """What to do with a group that is still being sampled when the next version makes it too old. drop: count it, and
    admit another; if this is frequent, long replies are lost. wait: delay the step."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Log-probabilities of the proximal policy. recompute: the trainer's own, at the start of the step. rollout: the
    engine's. auto: the engine's if `max_staleness` is 0 and the doctor finds that noise alone does not clip."""
    correction: Correction = field(default_factory=Uncorrected)
    """Importance weight old / rollout on the policy loss, e.g. `TokenTIS(cap=2.0)` (rl/objectives/corrections.py)."""
    doctor: Literal["short", "full", "off"] = "short"
    """Check before the first step that the log-probabilities of engines and trainer agree; if not, the run ends with
    cause and remedy. full: also compare precisions, as `unison doctor` does; takes minutes."""
    temperature: float = 1.0
    """Temperature of sampling, and of the trainer's log-probabilities."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the model body in the engine and in the trainer. The trainer's master weights are always fp32."""
    fp32_head: bool = True
    """Compute logits in fp32, in the engine and in the trainer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where engines and learner run. auto: on GPUs if there are any."""
    share_gpu: bool | None = None
    """An engine and a rank share each GPU, and weights travel by CUDA IPC, not NCCL. Default: on for one GPU."""
    eval_every: int = 0
    """Steps between evaluations on the held-out sets. 0: only before the first step and after the last."""
    eval_samples: int = 1
    """Completions per held-out problem."""
    eval_temperature: float | None = None
    """Temperature of evaluations. Default: the same as `temperature`."""
    keep_best: str = ""
    """A figure of a held-out set, such as held_out/avg@4, or a mean of several (`Data.means`): the model of its highest
    evaluation is kept in best/, next to the newest, and at the end its sets are sampled again with other seeds. Empty:
    no model is kept."""
    verify_every: int = 0
    """Steps between digest checks of every tensor at every engine. The first update is always checked. 0: only that."""
    record_batches: int = 0
    """Steps between records of a whole step for `unison what-if`, in the run's folder under batches/. Each costs two
    forward passes. 0: none."""
    save_every: int = 20
    """Steps between checkpoints; SIGTERM makes one more. A checkpoint takes about as long as a step, and 12 bytes per
    parameter. 0: none."""
    keep_last: int = 2
    """Checkpoints to keep. Two, because the newest may be damaged."""
    save_final: bool = True
    """Export the trained model (safetensors and tokenizer) into the run's folder."""
    export_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the exported weights. Default: the same as `dtype`."""
    chat_template_kwargs: dict[str, bool | int | str] = field(default_factory=dict)
    """Extra arguments of the chat template, such as enable_thinking False. Default: none."""
    long_prompts: Literal["refuse", "drop", "cut"] = "refuse"
    """What to do with a prompt that leaves no room for `rollout.max_tokens` in `rollout.max_model_len`. refuse: the run
    ends and names it. drop: leave it out. cut: keep its end, and its BOS. Both are counted, also in held-out sets."""
    changed_at_resume: Literal["refuse", "report"] = "refuse"
    """What to do at --resume when answers, held-out sets, the code of reward, env or objective, or the model's files
    are not those of the checkpoint. report: print it and continue. Other training prompts are always refused."""
    trust_remote_code: bool = False
    """Run the Python code that a model brings with it, in the tokenizer, the learner and vLLM. Read it first."""
    seed: int = 0
    """Seed of the order of prompts and of the samples."""
    output_dir: str = "runs"
    """Folder for all runs."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    deadlines: Deadlines = field(default_factory=Deadlines)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        given = [name for name in ("reward", "env", "agent") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a run needs one of reward, env and agent, and this one has {' and '.join(given) or 'none'}: write "
                "reward=a_function for one reply to each prompt, or env=AnEnvironment or agent=an_agent for episodes, "
                "which have a reward of their own"
            )
        if self.episodic and self.eval_reward is not None:
            raise ValueError(f"eval_reward scores single replies, and episodes are scored by `{given[0]}`: remove it")

    @property
    def episodic(self) -> bool:
        """Whether it learns from episodes of many turns, and not from single replies."""
        return self.env is not None or self.agent is not None

    @property
    def horizon(self) -> int:
        """Most tokens that are sampled for one reply, or for one episode."""
        r = self.rollout
        return self.limits.tokens or r.max_model_len if self.episodic else r.max_tokens

    @classmethod
    def right_form(cls, field: str, value: Any) -> str | None:
        """How to write a setting whose value is code."""
        if field == "judges" and isinstance(value, Judge):
            return "is one judge: write a tuple, judges=(judge,)"
        if field == "filters" and callable(value):
            return f"is one filter: write a tuple, filters=({value!r},)"
        if field in ("reward", "eval_reward") and isinstance(value, Mapping | list | tuple):
            return f"is several rewards: write {field}=Weighted({{'right': right, 'short': (short, 0.2)}})"
        forms: Mapping[str, str] = {
            "data": "must be a function that returns Data(train=[Example(...)]), or such a Data",
            "reward": "must be a function that takes a Reply and returns a float, or a dict of floats",
            "env": "must be the class of an environment: write env=Calculator, without brackets",
            "agent": "must be a function of a context, or a command: write agent=my_agent, or agent=['python', 'a.py']",
            "eval_reward": "must be a function that takes a Reply and returns a float, or None",
            "objective": "must be an objective: write objective=GSPO(), with `from rl.objectives import GSPO`",
        }
        return forms.get(field)
