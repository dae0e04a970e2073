"""The timeline: spans that do not overlap in a lane, whole lines after a kill, queue depths, a file for Perfetto."""

import asyncio
import json
from types import SimpleNamespace

import pyarrow.parquet as pq

from planted_run import Letters, clipped, row
from rl.batch import collate
from rl.config import Config
from rl.protocols import SyncReport
from rl.types import Data
from trainer.record import timeline
from trainer.record.recorder import Recorded, RunRecord
from trainer.record.timeline import LANES, SLOTS, Timeline, add_lines, queues, read, trace
from trainer.record.writer import entries


def test_spans_that_overlap_get_places_of_their_own_and_free_places_are_used_again():
    line = Timeline()
    for began, ended in ((0, 10), (1, 3), (2, 12), (4, 5), (11, 13)):
        line.span("engine", 2, "8 samples", began, ended)
    events = [json.loads(text) for text in line.take()]
    assert [event["tid"] - 2 * SLOTS for event in events] == [0, 1, 2, 1, 0]
    assert {event["pid"] for event in events} == {LANES["engine"]}
    assert (events[1]["ts"], events[1]["dur"]) == (1_000_000, 2_000_000)
    assert line.take() == []


def test_a_tail_that_was_cut_at_any_byte_is_left_out_and_a_resumed_run_goes_on_behind_it(tmp_path):
    line = Timeline()
    line.span("run", 0, "checkpoint", 1.0, 2.0)
    whole, path = "".join(line.take()), tmp_path / timeline.NAME
    for cut in range(len(whole)):
        path.write_text(whole + whole[:cut])
        assert len(read(tmp_path)) == 1, cut
        add_lines(path, whole)
        # Without its end of line the last one may be whole, and is one again when the next begins.
        assert len(read(tmp_path)) == (2 if cut < len(whole) - 1 else 3), cut


def test_groups_leave_their_states_and_give_the_depths_of_the_queues(tmp_path):
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len)
    record = RunRecord(tmp_path, config, tokenizer=Letters(), after=0, alert=print, alerts=[])
    for ordinal in (0, 1):
        for state in ("admitted", "sampling", "scoring"):
            record.moved(ordinal, state)
    record.moved(1, "filtered(too_hard)")
    record.ended(1, "filtered(too_hard)", [1], [], "")
    for state in ("ready", "training", "trained"):
        record.moved(0, state)
    record.trained(1, [row(0)])
    with record.during("checkpoint"):
        pass
    record.close()
    assert record.moves == record.times == {}
    events = read(tmp_path)
    ends = {e["name"]: e["args"]["end"] for e in events if e["pid"] == LANES["groups"]}
    assert ends == {"group 0": "trained", "group 1": "filtered(too_hard)"}
    depths = [depth for _, depth in queues(events)]
    assert max(depth["scoring"] for depth in depths) == 2
    assert depths[-1] == {"sampling": 0, "scoring": 0, "ready": 0}
    made = trace(events)
    names = {e["args"]["name"] for e in made["traceEvents"] if e["ph"] == "M"}
    assert {"groups", "run"} <= names
    # What Perfetto needs of every event.
    assert all({"name", "ph", "pid"} <= event.keys() for event in made["traceEvents"])
    assert all(event["dur"] >= 0 for event in made["traceEvents"] if event["ph"] == "X")


class Ranks:
    """A learner of two ranks, of which the first saw the batch; an engine is lost in its second update."""

    def __init__(self, seen):
        self.version, self.seen, self.fleet = 0, seen, SimpleNamespace(causes=[])

    async def step(self, batch):
        return {"actor/loss": 0.5}

    async def told(self):
        return [(self.seen, [("gradients", 5.0, 6.0)]), (None, [("gradients", 5.0, 7.0)])]

    async def publish(self, version):
        self.version = version
        if version == 2:
            self.fleet.causes.append("engine 0 was lost: it died")
        return SyncReport(seconds=1.0, pause_seconds=0.25, bytes=1, verified=True)


def test_a_learner_that_is_recorded_gives_its_rows_phases_updates_and_lost_engines(tmp_path):
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len)
    record = RunRecord(tmp_path, config, tokenizer=Letters(), after=0, alert=print, alerts=[])
    rows, seen = clipped()
    ranks = Ranks(seen)
    learner = Recorded(ranks, ranks, record)

    async def train():
        for step in (1, 2):
            assert await learner.step(collate(rows)) == {"actor/loss": 0.5}
            assert (await learner.publish(step)).seconds == 1.0
            record.trained(step, rows)
            assert await record.timed("evaluation", asyncio.sleep(0, "measured")) == "measured"
        assert record.timed("evaluation", None) is None

    asyncio.run(train())
    record.close()
    kept = entries(tmp_path / "rollouts")
    for step in (1, 2):
        assert pq.read_table(tmp_path / "rollouts" / kept[step].file)["silent"].to_pylist() == [1, 2, 3, 3]
    events = read(tmp_path)
    names = [event["name"] for event in events if event["pid"] == LANES["run"]]
    assert {"learn step 1", "learn step 2", "update to v1", "wait for samples", "evaluation"} <= {*names}
    assert names.count("engine 0 was lost: it died") == 1
    assert [e["args"]["pause_s"] for e in events if e["name"] == "update to v2"] == [0.25]
    phases = [(e["tid"], e["dur"]) for e in events if e["pid"] == LANES["learner rank"]]
    assert sorted(phases) == [(0, 1_000_000)] * 2 + [(SLOTS, 2_000_000)] * 2
