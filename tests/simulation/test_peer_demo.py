"""`meadow peer demo`: six processes, one killed, one late; equal states and a falling loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meadow.cli import main
from meadow.client.peer_audit import cuts, events
from meadow.errors import ConfigError, PeerError
from meadow.peft_adapters.servable import check_servable
from meadow.simulation import peer_demo


def test_a_folder_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        peer_demo.run(tmp_path)


def actor(tmp_path: Path, code: str = "") -> peer_demo.Actor:
    """A peer whose process, if there is one, runs some code of its own."""
    made = peer_demo._actor(tmp_path, 0)
    made.place.mkdir()
    if code:
        with (made.folder / "log.txt").open("wb") as log:
            made.process = subprocess.Popen([sys.executable, "-c", code], stderr=log)
    return made


def test_a_peer_that_ends_by_itself_ends_the_demo_with_its_last_words(tmp_path: Path) -> None:
    ended = actor(tmp_path, "import sys; sys.exit('meadow: the disk is full')")
    assert ended.process is not None
    ended.process.wait()
    with pytest.raises(PeerError, match="meadow: the disk is full"):
        ended.check()


def test_a_peer_that_gets_nowhere_ends_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_demo, "PATIENCE", 0.0)
    with pytest.raises(PeerError, match="did not get there"):
        peer_demo._wait([actor(tmp_path)], lambda: False)


def test_processes_end_with_the_demo_also_those_that_will_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    monkeypatch.setattr(peer_demo, "LAST_REPORT", 0.2)
    peer = actor(tmp_path, deaf + "print('deaf', file=sys.stderr, flush=True); time.sleep(600)")
    assert peer.process is not None
    while "deaf" not in (peer.folder / "log.txt").read_text():
        assert peer.process.poll() is None
    with pytest.raises(RuntimeError, match="a defect"), peer_demo._ended([peer]):
        raise RuntimeError("a defect")
    assert peer.process.poll() is not None


def test_losses_are_read_from_a_log_that_a_crash_has_torn(tmp_path: Path) -> None:
    peer = actor(tmp_path)
    lines = [{"kind": "measured", "loss": 2.5}, {"kind": "record"}, {"kind": "measured"}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"kind": "meas\n{"kind": "measured", "loss": 2}\n'
    (peer.place / "events.jsonl").write_text(text)
    assert peer.losses() == [2.5, 2.0] and peer.status() == {}


@pytest.mark.long(minutes=3)
def test_the_demo_keeps_its_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "peers", tmp_path / "report.json"
    assert main(["peer", "demo", "--out", str(out), "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["states"] == [report["replayed"]] and len(report["peers"]) == 6
    assert all(row["records"] == peer_demo.RECORDS for row in report["peers"])
    assert report["records"] == 6 * peer_demo.RECORDS
    assert all(row["last_loss"] < row["first_loss"] for row in report["peers"][:5])
    assert "all states are equal" in capsys.readouterr().out

    folders = sorted(path / "peer" for path in out.iterdir())
    adapters = {(each / "adapter" / "adapter_model.safetensors").read_bytes() for each in folders}
    assert len(adapters) == 1 and check_servable(Path(report["adapter"])) == []

    killed = folders[peer_demo.VICTIM]
    assert sorted(cuts(killed)) == list(range(peer_demo.RECORDS)), "it went on with its own chain"
    listening = [event for event in events(killed) if event["kind"] == "listening"]
    assert len(listening) == 2 and report["killed"]["at_record"] < peer_demo.RECORDS
    outbound = folders[peer_demo.OUTBOUND]
    assert not [event for event in events(outbound) if event["kind"] == "listening"]
    late = folders[peer_demo.LATE]
    assert json.loads((late / "status.json").read_text())["members"] == 6
