"""What is an objective? A frozen dataclass with two pure methods, and what it declares to the trainer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from rl.objectives.kl import Estimator
from rl.reduce import AverageOver
from rl.typed import Checked
from rl.types import Batch, PolicyOutput, Step, TokenLoss

if TYPE_CHECKING:
    import rl.config


@dataclass(frozen=True, kw_only=True)
class Objective(Checked, ABC):
    """Subclass this, write the two methods, and pass an instance as `Config.objective`: that is all.

    `loss` returns a per-token loss [B, T] to be minimised; the trainer masks it, averages it (`average_over`) and
    reduces it over micro-batches and ranks. So `loss` may use one episode at a time only, and comparisons of episodes
    belong in `advantages`, which gets the whole step. Both get one row for each episode: where an episode was cut into
    rows, that is its sampled tokens alone, in the order of time. Metrics are detached tensors of shape [B, T] (averaged
    over sampled tokens) or [B] (over episodes). `loss` gets a `Step`, whose `old_logprobs` are always set; columns that
    the class declares below are read with `needed(batch.values, "values")`. `rl.loss` adds the KL and entropy terms to
    every objective. `unison check-objective FILE.py:CLASS` tests all of this.
    """

    kl_coef: float = 0.0
    """Weight of KL(policy || reference). Above 0, a frozen copy of the start model is kept."""
    kl_estimator: Estimator = "k3"
    """Estimator of that KL (rl/objectives/kl.py). In the reward use k1; in the loss k2 and k3+ have the gradient of the
    KL itself."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL counts: as a term of the loss, or subtracted from the reward of every token before the advantages
    are computed."""
    kl_target: float | None = None
    """KL in nats per token that the learner aims at by changing `kl_coef` after each step (rl/objectives/adaptive.py).
    Default: `kl_coef` stays constant."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    entropy_in: Literal["loss", "advantages"] = "loss"
    """Where the entropy counts: as a term of the loss; or as min(entropy_coef * entropy, |A| / 2), added to the
    advantage of each token. The latter favours uncertain tokens, changes no sign and has no gradient of its own (arXiv
    2506.14758)."""
    entropy_target: float | None = None
    """Entropy in nats per token below which the learner raises `entropy_coef` after each step. Default: `entropy_coef`
    stays constant."""
    average_over: AverageOver = "tokens"
    """What the loss is a mean of: all tokens; sequences, each a mean of its tokens; or a sum of tokens over a constant
    (rl/reduce.py)."""

    # Declarations: the trainer and the contract checker read them.
    uses_values: ClassVar[bool] = False
    """Reads `batch.values` and `policy.values`; the policy gets a value head."""
    uses_old_logprobs: ClassVar[bool] = False
    """`advantages` reads `batch.old_logprobs`, so the trainer computes its own before."""
    uses_reference: ClassVar[bool] = False
    """Reads `batch.ref_logprobs` itself; the reference is kept even without `kl_coef`."""
    group_relative: ClassVar[bool] = True
    """Compares samples of one prompt. A group of one gives no signal; a constant added to a group changes nothing."""
    skippable: ClassVar[bool] = True
    """A row of zero advantages has no policy gradient, so the trainer may leave it out."""
    stop_gradient: ClassVar[bool] = False
    """Detaches a factor intentionally, so the gradient is not the derivative of the loss's value."""
    on_purpose: ClassVar[tuple[str, ...]] = ()
    """Checks of `unison check-objective` that it breaks on purpose: "policy gradient", "bounds", "penalty", "entropy",
    "critic"."""
    critic_warmup: ClassVar[int] = 0
    """Optimizer steps at the start in which only the value head learns."""

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the start model must be kept."""
        return self.kl_coef > 0 or self.uses_reference

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether `advantages` needs the log-probabilities of the policy before the step."""
        return self.uses_old_logprobs or (self.kl_coef > 0 and self.kl_in == "reward")

    @property
    def may_skip(self) -> bool:
        """Whether rows of zero advantages may be left out: no KL, entropy bonus, critic or adaptive coefficient."""
        kl = self.kl_coef > 0 and self.kl_in == "loss"
        entropy = self.entropy_coef > 0 and self.entropy_in == "loss"
        # An adaptive coefficient depends on the metrics of all rows.
        moves = self.kl_target is not None or self.entropy_target is not None
        return self.skippable and not (kl or entropy or moves or self.uses_values)

    def check(self, config: "rl.config.Config") -> None:
        """Raise ValueError, with the remedy, for settings that this objective cannot work with. Default: none.

        The rules of the fields above are in rl/objectives/rules.py and hold for every objective.
        """

    @abstractmethod
    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantage of every token, from the whole step's batch."""

    @abstractmethod
    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        """Per-token loss and metrics of one micro-batch."""
