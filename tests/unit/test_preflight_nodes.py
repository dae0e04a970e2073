"""`unison preflight nodes`: what differs, and what is too small, is named; links are measured."""

import socket
import threading

import pytest

from trainer.cluster.nodes import preflight
from trainer.cluster.nodes.preflight import NodeFacts, Probe, compare
from trainer.cluster.ray_session import join_ray


def node(host: str, **facts) -> NodeFacts:
    usual = {"digest": "d", "versions": {"torch": "2", "ray": "3"}, "disk": 50.0, "shared": 8.0}
    return NodeFacts(host, "10.0.0.1", 8.0, **(usual | facts))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"digest": "other"}, "has other sources"),
        ({"versions": {"torch": "1", "ray": "3"}}, "has torch 1, and the driver's node 2"),
        ({"versions": {"torch": "2"}}, "has ray none"),
        ({"shared": 0.06}, "has 0.06 GiB of shared memory"),
        ({"disk": 1.0}, "has 1.0 GiB free for checkpoints, which take 20.0"),
    ],
)
def test_a_node_that_differs_is_named_with_the_reason(facts, message):
    found = [node("n1"), node("n2", **facts), node("n3")]
    compare(found, 20.0)
    assert [bool(each.wrong) for each in found] == [False, True, False]
    assert message in found[1].wrong[0]


def test_the_speed_of_a_link_is_measured_and_a_closed_one_is_zero(monkeypatch):
    monkeypatch.setattr(preflight.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(preflight, "SENT", 8 << 20)
    receiver = Probe()
    address, port = receiver.listen()
    taking = threading.Thread(target=receiver.receive)
    taking.start()
    assert Probe().send(address, port) > 1.0
    taking.join(30)
    assert Probe().send(address, port) == 0.0, "nobody listens there now"


def test_a_head_that_is_gone_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"no cluster answers at RAY_ADDRESS={address} .*unison cluster head"):
        join_ray()
