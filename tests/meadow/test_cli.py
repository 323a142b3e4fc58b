"""The command line: one clear line for a mistake, JSON for scripts, real commands end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meadow.cli import main
from meadow.config import Config, load
from meadow.strategies.registry import STRATEGIES

ROWS = [
    {
        "client": client,
        "prompt": f"What is {number} + {number}?",
        "response": f"{2 * number}, says {client}.",
    }
    for client in ("ada", "bob", "eve")
    for number in range(8)
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def small(tmp_path: Path, text: Path, **more: str) -> Path:
    """A run.toml of one short round over the embedded base."""
    keys = {"strategy": 'name = "fedavg_lora"', **more}
    path = tmp_path / "run.toml"
    path.write_text(
        f'[data]\nsource = "{text.name}"\nmax_length = 48\n[rounds]\ncount = 1\n'
        "[clients]\nsteps = 1\nbatch = 2\n"
        + "".join(f"[{name}]\n{body}\n" for name, body in keys.items())
    )
    return path


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistaken command prints."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *progress, last = printed.err.strip().splitlines()
    assert last.startswith("meadow: ") and all(line.endswith(" ...") for line in progress)
    return last


def test_init_writes_the_defaults_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    written = load(tmp_path / "run.toml")
    assert written.replace(strategy={"options": {}}) == Config()
    assert written.strategy.options["refine"] == "none"
    capsys.readouterr()
    assert "exists" in failure(capsys, "init")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[modle]\nrank = 4", "did you mean model?"),
        ("[clients]\nsteps = 'ten'", "expected int"),
        ("[clients]\nlearning = 1", "unknown key learning"),
        ("[rounds]\ncount = 0", "at least 1"),
        ('[strategy]\nname = "fedavg"', "did you mean 'fedavg_lora'?"),
        ('[strategy]\nrefin = "none"', "did you mean 'refine'?"),
        ('[strategy]\nrefine = "none"\nranks = { ada = 2 }', "mixed ranks need refine"),
        ("[model]\nrank = 100000", "is more than layer"),
        ('[strategy]\nrefine = "product_svd"\nranks = { zoe = 2 }', "who is no participant"),
        ('[strategy]\nname = "pool_lora"\nzeroth = ["zoe"]', "who is no participant"),
        ('[strategy]\nname = "flora"\nwidth = 200', "cannot be exported"),
        ('[model]\ntargets = ["query"]', "match no linear layer"),
        ('[model]\nbase = "./nowhere"', "nowhere"),
        ("format = 2", "this meadow reads format 1"),
        ("[model", "not valid TOML"),
    ],
)
def test_mistakes_in_run_toml_are_one_line(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], body: str, says: str
) -> None:
    path = tmp_path / "bad.toml"
    source = (
        "" if "[data]" in body or body in ("[model",) else f'\n[data]\nsource = "{text.name}"\n'
    )
    path.write_text(body + source)
    assert says in failure(capsys, "simulate", str(path), "--out", str(tmp_path / "run"))


def test_missing_files_are_one_line(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "`meadow init` writes one" in failure(capsys, "simulate", str(tmp_path / "none.toml"))
    path = small(tmp_path, text)
    text.unlink()
    assert "text.jsonl" in failure(capsys, "simulate", str(path), "--out", str(tmp_path / "run"))


def test_a_malformed_line_is_named(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text(text.read_text() + '{"client": "eve", "prompt": "only a prompt"}\n{broken\n')
    line = failure(capsys, "simulate", str(small(tmp_path, text)), "--out", str(tmp_path / "run"))
    assert f"text.jsonl:{len(ROWS) + 1}" in line or f"line {len(ROWS) + 1}" in line


def test_simulate_writes_a_run_and_refuses_another_config_in_its_folder(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "run", tmp_path / "report.json"
    path = small(tmp_path, text)
    assert (
        main(["simulate", str(path), "--out", str(out), "--json", str(report), "--baselines"]) == 0
    )
    found = json.loads(report.read_text())
    assert {
        "base_loss",
        "local_loss",
        "federated_loss",
        "centralised_loss",
        "share",
        "bytes_up",
    } <= set(found)
    assert sorted(found["losses"]) == ["ada", "bob", "eve"]
    assert Path(found["adapter"]) == out / "adapter"
    assert {
        "adapter",
        "metrics.jsonl",
        "events.jsonl",
        "journal.db",
        "run.toml",
        "manifest.json",
    } <= {entry.name for entry in out.iterdir()}
    assert main(["simulate", str(path), "--out", str(out)]) == 0, "a finished run is read again"
    assert main(["evaluate", str(path), str(out / "adapter"), "--json", str(report)]) == 0
    measured = json.loads(report.read_text())
    assert measured["loss"] == pytest.approx(found["federated_loss"], abs=1e-5)
    assert measured["base_loss"] == pytest.approx(found["base_loss"], abs=1e-5)
    capsys.readouterr()
    rows = text.read_text()
    text.write_text(rows.replace("ada", "zoe"))
    assert "other text" in failure(capsys, "simulate", str(path), "--out", str(out))
    text.write_text(rows)
    path.write_text(path.read_text().replace("steps = 1", "steps = 2"))
    assert "another --out" in failure(capsys, "simulate", str(path), "--out", str(out))


def test_an_adapter_that_is_not_finite_is_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "run", small(tmp_path, text)
    assert main(["simulate", str(path), "--out", str(out)]) == 0
    weights = out / "adapter" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"  # a float32 NaN
    weights.write_bytes(raw)
    capsys.readouterr()
    assert "not finite" in failure(capsys, "evaluate", str(path), str(out / "adapter"))


def test_strategies_lists_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "strategies.json"
    assert main(["strategies", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())
    folder = Path(__file__).parents[2] / "strategies"
    assert [row["name"] for row in rows] == list(STRATEGIES)
    assert all((folder / row["file"]).is_file() and row["options"] for row in rows)


@pytest.mark.parametrize("name", ["fedkseed", "pool_lora", "diloco"])
def test_init_writes_the_strategys_customary_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["init", "--out", str(tmp_path), "--strategy", name]) == 0
    written, plain = load(tmp_path / "run.toml"), Config()
    rank = STRATEGIES[name].customary_rank
    assert (written.model.rank, written.scaling) == ((rank, 1.0) if rank else (8, plain.scaling))
    assert written.strategy.name == name and written.strategy.options
