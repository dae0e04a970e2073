"""Where does the policy's code run? Sandboxes, and a judge of programs. A recipe imports from here."""

from rl.sandbox.bubblewrap import Bubblewrap
from rl.sandbox.cases import share_passed
from rl.sandbox.fusion import SandboxFusion
from rl.sandbox.types import Ran, Sandbox
from rl.sandbox.unprotected import Unprotected

__all__ = ["Bubblewrap", "Ran", "Sandbox", "SandboxFusion", "Unprotected", "share_passed"]
