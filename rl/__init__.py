"""The algorithm: types, objectives and the loop. Pure Python and torch.

`__all__` is what recipes need. Its names load their module when they are first used, so `import rl` alone is cheap.
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rl import checkout

# Imports leave no garbage, and the usual search for it takes a fifth of the time in which a recipe imports torch.
gc.set_threshold(50_000, 20, 20)

if TYPE_CHECKING:
    from rl.config import Config, Deadlines, Lora, RolloutConfig, TrackingConfig, TrainerConfig
    from rl.contract.check import assert_objective, check_objective
    from rl.data import Rows
    from rl.filters import Difficulty, Overlong, ZeroAdvantage
    from rl.objectives import CISPO, DAPO, GMPO, GRPO, GSPO, M2PO, OPO, PPO, RLOO, SAPO, DrGRPO, Objective, ReinforcePP
    from rl.objectives.corrections import MIS, Correction, GeometricMask, IcePop, SequenceTIS, TokenTIS, Uncorrected
    from rl.rewards.combined import OverGroup, Weighted
    from rl.rewards.result import NOT_APPLICABLE, Scored
    from rl.rewards.shaping import SoftOverlong
    from rl.types import Batch, Data, Eval, Example, PolicyOutput, Reply, Step, Trajectory, needed

__all__ = [
    "CISPO",
    "DAPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "M2PO",
    "MIS",
    "NOT_APPLICABLE",
    "OPO",
    "PPO",
    "RLOO",
    "SAPO",
    "Batch",
    "Config",
    "Correction",
    "Data",
    "Deadlines",
    "Difficulty",
    "DrGRPO",
    "Eval",
    "Example",
    "GeometricMask",
    "IcePop",
    "Lora",
    "Objective",
    "OverGroup",
    "Overlong",
    "PolicyOutput",
    "ReinforcePP",
    "Reply",
    "RolloutConfig",
    "Rows",
    "Scored",
    "SequenceTIS",
    "SoftOverlong",
    "Step",
    "TokenTIS",
    "TrackingConfig",
    "TrainerConfig",
    "Trajectory",
    "Uncorrected",
    "Weighted",
    "ZeroAdvantage",
    "assert_objective",
    "check_objective",
    "needed",
]

_MODULES = {
    "rl.config": "Config Deadlines Lora RolloutConfig TrackingConfig TrainerConfig",
    "rl.contract.check": "assert_objective check_objective",
    "rl.filters": "Difficulty Overlong ZeroAdvantage",
    "rl.objectives": "CISPO DAPO GMPO GRPO GSPO M2PO OPO PPO RLOO SAPO DrGRPO Objective ReinforcePP",
    "rl.objectives.corrections": "MIS Correction GeometricMask IcePop SequenceTIS TokenTIS Uncorrected",
    "rl.rewards.combined": "OverGroup Weighted",
    "rl.rewards.result": "NOT_APPLICABLE Scored",
    "rl.rewards.shaping": "SoftOverlong",
    "rl.data": "Rows",
    "rl.types": "Batch Data Eval Example PolicyOutput Reply Step Trajectory needed",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

checkout.verify()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
