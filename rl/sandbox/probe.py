"""What does this machine lack for a sandbox? The cause, and the remedy of each."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

UNPROTECTED = "To run the policy's code without protection, write Unprotected() in place of Bubblewrap()"
NO_PYTHON = "no Python works in it, and one below a home is readable to its owner alone: apt-get install python3"
SETTINGS = {
    "kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    "user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=10000"),
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "an AppArmor profile that gives bwrap `userns`"),
}
"""Settings of the kernel that forbid user namespaces: file in /proc/sys, value, remedy."""


@dataclass(frozen=True)
class Tools:
    """Paths of the programs that make a box."""

    bwrap: str
    prlimit: str
    setpriv: str
    """Empty if the user is not root."""

    def outside(self, user: int) -> list[str]:
        """The command that makes a box. Root becomes another user first, because no limit of processes binds root."""
        who = ["--reuid", str(user), "--regid", str(user), "--clear-groups", "--no-new-privs", "--"]
        return [*([self.setpriv, *who] if self.setpriv else []), self.bwrap]


def tools_here() -> Tools:
    """The programs of this machine. Raises ValueError that names what is missing."""
    root = os.geteuid() == 0
    names = {"bwrap": "bubblewrap", "prlimit": "util-linux", **({"setpriv": "util-linux"} if root else {})}
    found = {name: shutil.which(name) or "" for name in names}
    if missing := [f"{name} is not installed: apt-get install {names[name]}" for name in names if not found[name]]:
        raise ValueError(refusal("; ".join(missing)))
    shown = subprocess.run([found["bwrap"], "--version"], capture_output=True, text=True, timeout=60).stdout
    version = re.search(r"(\d+)\.(\d+)", shown)
    if not version or (int(version[1]), int(version[2])) < (0, 8):
        raise ValueError(refusal(f"{shown.strip() or 'bwrap'} has no --disable-userns: install version 0.8 or newer"))
    return Tools(found["bwrap"], found["prlimit"], found.get("setpriv", ""))


def cause(written: bytes | bytearray, proc: Path = Path("/proc")) -> str:
    """Why a box did not start, given what bwrap wrote."""
    shown = [*written.decode(errors="replace").strip().splitlines(), "no message"][0][:300]
    for file, (value, remedy) in SETTINGS.items():
        setting = proc / "sys" / file
        if setting.exists() and setting.read_text().strip() == value:
            return f"{setting} = {value} forbids user namespaces ({shown}): {remedy}"
    if "proc" in shown and "mount" in shown:
        return f"this container hides parts of /proc ({shown}): start it with --security-opt systempaths=unconfined"
    if re.search(r"^Seccomp:\s*2", (proc / "self/status").read_text(), re.M):
        return (
            f"a seccomp filter, such as Docker's, forbids it ({shown}): start it with --security-opt seccomp=unconfined"
        )
    return shown


def refusal(why: str) -> str:
    """The message for a machine without a sandbox."""
    return f"no sandbox on this machine: {why}. {UNPROTECTED}"
