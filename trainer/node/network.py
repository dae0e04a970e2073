"""Under which address do other nodes reach this one?"""

import ipaddress
import socket

import psutil


def interface(wanted: str | None, towards: str | None = None) -> tuple[str, str]:
    """Name and address of an interface: the one that is named, or has an address, or leads to another node.

    Raises ValueError, with those that exist, where there is none.
    """
    found = {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
    }
    if wanted is None:
        wanted = _route(towards or "192.0.2.1")
    by_name = [address for address, name in found.items() if name == wanted]
    address = next(iter(sorted(by_name, key=lambda a: ":" in a)), wanted)
    if address not in found:
        known = ", ".join(f"{name} ({address})" for address, name in found.items())
        raise ValueError(f"--interface {wanted}: this node has no such interface or address. It has {known}")
    return found[address], address


def _route(host: str) -> str:
    """This node's address on the route to a host. Sends nothing."""
    family = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return socket.gethostbyname(socket.gethostname())
        return probe.getsockname()[0]


def split(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises ValueError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{address!r} is no address: write HOST:PORT, as `unison cluster head` printed it")
    host = host.strip("[]")
    try:
        return str(ipaddress.ip_address(host)), int(port)
    except ValueError:
        return socket.gethostbyname(host), int(port)


def answers(host: str, port: int, seconds: float = 5.0) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError:
        return False
    return True
