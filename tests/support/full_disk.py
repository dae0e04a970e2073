"""A disk without space, for this process."""

import resource
from contextlib import contextmanager


@contextmanager
def full_beyond(size: int):
    """No file of this process may grow beyond `size` bytes: a write fits in part, and then fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
