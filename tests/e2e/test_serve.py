"""`unison serve` as a user starts it: a stock client is answered, and Ctrl-C leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import openai
import pytest

from processes import assert_gone
from runs import HANGS_S, STARTED, wait_for


@pytest.mark.nightly
def test_a_model_is_served_until_ctrl_c(chat_model: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    STARTED.append(mark)
    unison = str(Path(sys.executable).with_name("unison"))
    flags = ["--port", "0", "--dtype", "float32", "--rollout.max-model-len", "128", "--rollout.kv-cache-gib", "0.25"]
    said = tmp_path / "terminal.log"
    process = subprocess.Popen(
        [unison, "serve", str(chat_model), *flags],
        env=os.environ | {"UNISON_TEST_MARK": mark, "COLUMNS": "200"},
        stdout=said.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    address = re.compile(r"served at (http://127\.0\.0\.1:\d+/v1)")
    wait_for(process, tmp_path, "address", lambda: bool(address.search(said.read_text())))
    found = address.search(said.read_text())
    assert found is not None
    client = openai.OpenAI(base_url=found[1], api_key="any")
    asked = {"model": "any", "messages": [{"role": "user", "content": "1="}], "max_tokens": 8}
    greedy = [client.chat.completions.create(**asked, temperature=0).choices[0].message.content for _ in range(2)]
    assert greedy[0] == greedy[1]
    drawn = {client.chat.completions.create(**asked, temperature=1.5).choices[0].message.content for _ in range(6)}
    assert len(drawn) > 1
    chunks = list(client.chat.completions.create(**asked, temperature=0, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == greedy[0]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(HANGS_S) == 0, said.read_text()[-2000:]
    assert "stopped" in said.read_text()
    assert_gone(mark)
