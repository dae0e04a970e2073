"""Who may connect to a cluster? Whoever has its token, which lies in files of mode 0600 and in no command line."""

import os
import secrets
import stat
import sys
from pathlib import Path

TOKEN = "UNISON_CLUSTER_TOKEN"
"""Variable with a token, for launchers that hand secrets to nodes in the environment."""
RAY = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def read_token(file: str | None) -> str | None:
    """The token in a file (`-`: standard input), or in the environment. Raises ValueError for a file that others may
    read, and for an empty one."""
    if file is None:
        return os.environ.get(TOKEN) or None
    if file == "-":
        text = sys.stdin.readline()
    else:
        if Path(file).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(f"others may read {file}, and whoever has the token runs code here: chmod 600 {file}")
        text = Path(file).read_text()
    if not text.strip():
        raise ValueError(f"--token-file {file} holds no token: take the file `token` of the head's folder")
    return text.strip()


def write_token(path: Path, token: str | None) -> None:
    """Write a token, a new one where none is given; no other user can read it at any moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token or secrets.token_hex(32))


def with_token(environment: dict[str, str], path: Path) -> dict[str, str]:
    """An environment in which Ray uses the token of a file, whatever lies in the home folder."""
    kept = {name: value for name, value in environment.items() if name not in (*RAY, TOKEN)}
    return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
