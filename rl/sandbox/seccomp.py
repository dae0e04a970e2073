"""Which system calls may no program in a box make? A filter for the kernel.

Left out are those that give memory which no limit counts, reach other processes, or are a large part of the kernel that
no small program needs; sockets of other families than a network namespace holds (a vsock reaches the hypervisor, and
every other box); and larger buffers of sockets. They fail with EPERM.
"""

import platform
import socket
import struct

CALLS = """
memfd_create 319 279   memfd_secret 447 447   shmget 29 194   msgget 68 186   semget 64 190   io_uring_setup 425 425
ptrace 101 117   process_vm_readv 310 270   process_vm_writev 311 271   unshare 272 97   setns 308 268   mount 165 40
add_key 248 217   request_key 249 218   keyctl 250 219   bpf 321 280   perf_event_open 298 241   userfaultfd 323 282
"""
"""Name, its number on x86_64, its number on aarch64."""
SOCKETS = "socket 41 198   socketpair 53 199   setsockopt 54 208"
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF, 32, 33)
"""Options of SOL_SOCKET; the last two are SO_SNDBUFFORCE and SO_RCVBUFFORCE."""
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
"""The column of CALLS, and the kernel's number of the architecture (linux/audit.h)."""
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
KILL, FAIL, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
ARGUMENT = 16
"""Where the first argument of a call is in struct seccomp_data; each has 8 bytes, the low half first."""
X32 = 0x40000000
"""Calls of the x32 ABI begin here: other numbers of the same calls."""


def deny(machine: str | None = None) -> bytes:
    """The filter as the kernel reads it (struct sock_filter). Raises ValueError for a machine without a list."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise ValueError(f"the filter of system calls knows {' and '.join(MACHINES)}, not {machine}")
    column, architecture = MACHINES[machine]
    denied = [int(number) for number in CALLS.split()[column::3]]
    opens, pairs, sets = (int(number) for number in SOCKETS.split()[column::3])
    # (code, where to go if it is true, where if not, value); a line without places goes on with the next one.
    lines: list[tuple[int, str, str, int]] = [(LOAD, "", "", 4), (EQUAL, "", "kill", architecture)]
    lines += [(LOAD, "", "", 0), (AT_LEAST, "fail", "", X32), *((EQUAL, "fail", "", number) for number in denied)]
    lines += [(EQUAL, "family", "", opens), (EQUAL, "family", "", pairs), (EQUAL, "option", "allow", sets)]
    places = {"family": len(lines)}
    lines += [(LOAD, "", "", ARGUMENT), *((EQUAL, "allow", "", int(family)) for family in FAMILIES[:-1])]
    lines += [(EQUAL, "allow", "fail", int(FAMILIES[-1]))]
    places["option"] = len(lines)
    lines += [(LOAD, "", "", ARGUMENT + 8), (EQUAL, "", "allow", socket.SOL_SOCKET), (LOAD, "", "", ARGUMENT + 16)]
    lines += [(EQUAL, "fail", "", option) for option in BUFFERS]
    places |= {end: len(lines) + i for i, end in enumerate(("allow", "fail", "kill"))}
    lines += [(RETURN, "", "", value) for value in (ALLOW, FAIL, KILL)]

    def jump(place: str, i: int) -> int:
        return places[place] - i - 1 if place else 0

    code = (struct.pack("=HBBI", of, jump(yes, i), jump(no, i), value) for i, (of, yes, no, value) in enumerate(lines))
    return b"".join(code)
