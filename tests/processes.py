"""Which processes a run has left behind."""

import psutil


def left_behind(mark: str) -> list[str]:
    """Processes that carry the mark and live on."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("UNISON_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:120])
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
