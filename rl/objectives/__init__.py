"""Which objectives are there? All of them by name, to be imported from here."""

from rl.objectives.grpo import CISPO, DAPO, GRPO, M2PO, SAPO, DrGRPO
from rl.objectives.gspo import GMPO, GSPO
from rl.objectives.objective import Objective
from rl.objectives.ppo import PPO
from rl.objectives.reinforce import OPO, RLOO, ReinforcePP, ReinforcePPBaseline
from rl.objectives.surrogates import clipped_surrogate
from rl.objectives.turns import GiGPO

FAMILY: tuple[type[Objective], ...] = (
    *(GRPO, DrGRPO, DAPO, GSPO, GMPO, CISPO, SAPO, M2PO, RLOO, OPO, ReinforcePP, ReinforcePPBaseline),
    *(GiGPO, PPO),
)
"""Every objective that comes with the framework; each works with its defaults."""

__all__ = [
    "CISPO",
    "DAPO",
    "FAMILY",
    "GMPO",
    "GRPO",
    "GSPO",
    "M2PO",
    "OPO",
    "PPO",
    "RLOO",
    "SAPO",
    "DrGRPO",
    "GiGPO",
    "Objective",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "clipped_surrogate",
]
