"""Which system calls may no program in a box make? A filter for the kernel.

Left out are those that give memory which no limit counts, reach other processes, or are a large part of the kernel that
no small program needs. They fail with EPERM.
"""

import platform
import struct

CALLS = """
memfd_create 319 279   memfd_secret 447 447   shmget 29 194   msgget 68 186   semget 64 190   io_uring_setup 425 425
ptrace 101 117   process_vm_readv 310 270   process_vm_writev 311 271   unshare 272 97   setns 308 268   mount 165 40
add_key 248 217   request_key 249 218   keyctl 250 219   bpf 321 280   perf_event_open 298 241   userfaultfd 323 282
"""
"""Name, its number on x86_64, its number on aarch64."""
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
"""The column of CALLS, and the kernel's number of the architecture (linux/audit.h)."""
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
KILL, FAIL, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
X32 = 0x40000000
"""Calls of the x32 ABI begin here: other numbers of the same calls."""


def deny(machine: str | None = None) -> bytes:
    """The filter as the kernel reads it (struct sock_filter). Raises ValueError for a machine without a list."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise ValueError(f"the filter of system calls knows {' and '.join(MACHINES)}, not {machine}")
    column, architecture = MACHINES[machine]
    tests = [(AT_LEAST, X32), *((EQUAL, int(number)) for number in CALLS.split()[column::3])]
    lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    # A jump skips the tests that are left, and the line that allows.
    lines += [(code, len(tests) - i, 0, value) for i, (code, value) in enumerate(tests)]
    lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
