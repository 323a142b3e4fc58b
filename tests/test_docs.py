"""What the pages say works: examples run, links lead somewhere, errors are the real ones."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meadow import config as configuration
from meadow.client.data import load_silos
from meadow.client.task import drive
from meadow.config import Config
from meadow.errors import DataError, MeadowError
from meadow.identity import own_identity
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.manifest import verify_manifest
from meadow.simulation.engine import Lab, open_lab, simulate
from meadow.strategies import registry
from meadow.strategies.base import Mean, Sgd, State, Strategy, Trained, Turn
from meadow.strategies.error_feedback import Owed
from meadow.strategies.messages import check_contribution, pack_update
from meadow.strategies.transforms import Clip, to_client

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)", text)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_licence_is_the_whole_of_apache_2() -> None:
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


# --- CONTRIBUTING.md ---------------------------------------------------------------------------


@pytest.fixture
def sign_vote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Strategy]]:
    """The page's example, in the place that the page names and registered as it says."""
    (code,) = blocks("CONTRIBUTING.md", "python")
    name = "meadow.strategies.sign_vote"
    (tmp_path / "sign_vote.py").write_text(code)
    spec = importlib.util.spec_from_file_location(name, tmp_path / "sign_vote.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(registry.STRATEGIES, "sign_vote", module.SignVote)
    yield module.SignVote


def test_the_example_strategy_does_what_its_paper_says(sign_vote: type[Strategy]) -> None:
    """Three clients vote on six numbers; changes are given, so the winner is known."""
    site = Site("m", 2, 1)
    strategy = registry.make("sign_vote", {"stride": 0.5}, (site,), 1)
    turn = Turn(1, 1, 1, client="ada", cohort=("ada", "bob", "eve"))
    state = strategy.init(1)
    sent = strategy.broadcast(state, turn)
    reducer = strategy.reducer(turn)
    assert type(reducer) is Mean
    for up, down in ((3.0, -1.0), (0.1, -7.0), (-50.0, 20.0)):

        def trained(request: object, up: float = up, down: float = down) -> Trained:
            assert isinstance(request, Sgd)
            change = {"m.lora_A": torch.tensor([[up]]), "m.lora_B": torch.tensor([[down], [0.0]])}
            adapter = {name: tensor + change[name] for name, tensor in request.adapter.items()}
            return Trained(adapter, {}, 1.0, 5, 5)

        update, _ = drive(strategy.work(sent, State(), turn), trained)
        reducer.fold(check_contribution(pack_update(update), strategy.template(sent, turn), "ada"))
    after = strategy.export(strategy.step(state, reducer.total(), turn))
    before = strategy.export(state)
    assert torch.equal(after["m.lora_A"], before["m.lora_A"] + 0.5)  # two of three say up
    assert after["m.lora_B"].tolist() == [[-0.5], [0.0]]  # two say down; nobody says anything


def test_the_example_strategys_votes_are_clipped_as_changes(sign_vote: type[Strategy]) -> None:
    strategy = registry.make("sign_vote", {}, (Site("m", 2, 2),), 1)
    turn = Turn(1, 1, 1, client="ada")
    sent = strategy.broadcast(strategy.init(1), turn)

    def trained(request: object) -> Trained:
        assert isinstance(request, Sgd)
        return Trained({n: t + 1 for n, t in request.adapter.items()}, {}, 1.0, 5, 5)

    update, _ = drive(strategy.work(sent, State(), turn), trained)
    clipped, _ = to_client([Clip(1.0)], update, sent, turn, Owed())
    assert all(torch.allclose(t, torch.full_like(t, 0.5)) for t in clipped.tensors.values())


def test_the_example_strategy_runs_a_federation(
    sign_vote: type[Strategy], tiny: Config, lab: Lab, tmp_path: Path
) -> None:
    config = tiny.replace(strategy={"name": "sign_vote", "options": {"stride": 0.01}})
    result = simulate(config, tmp_path / "run", lab)
    assert result.loss < result.base_loss
    statement = verify_manifest(tmp_path / "run", {own_identity().key_id: own_identity().public})
    assert statement["predicate"]["strategy"] == "sign_vote"
    assert statement["predicate"]["participants"] == len(lab.participants)
    assert statement["predicate"]["base_digest"] == lab.base.digest
    assert statement["predicate"]["loss"] == result.loss
    assert not any(f'"{p.name}"' in json.dumps(statement) for p in lab.participants)


# --- SECURITY.md -------------------------------------------------------------------------------


def test_verifying_as_security_md_says_works(
    tiny: Config, lab: Lab, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (code,) = blocks("SECURITY.md", "python")
    simulate(tiny, tmp_path / "runs" / "run", lab)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "signer.pem").write_bytes(own_identity().public_pem)
    exec(compile(code, "SECURITY.md", "exec"), {})
    printed = capsys.readouterr().out
    assert own_identity().public_pem.decode() in printed
    assert printed.rstrip().endswith(lab.base.digest)


# --- docs/how-to-own-data.md -------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The page's two files; the path of its run.toml."""
    (rows,) = blocks("docs/how-to-own-data.md", "json")
    (settings,) = blocks("docs/how-to-own-data.md", "toml")
    (tmp_path / "notes.jsonl").write_text(rows)
    (tmp_path / "run.toml").write_text(settings)
    return tmp_path / "run.toml"


def test_the_example_has_three_participants_who_hold_something_out(example: Path) -> None:
    silos = load_silos(configuration.load(example).data.source)
    assert [(silo.client, len(silo.train), len(silo.held_out)) for silo in silos] == [
        ("ada", 2, 1), ("bob", 2, 1), ("eve", 2, 1)
    ]  # fmt: skip


def test_the_example_runs(example: Path, tiny: Config, tmp_path: Path) -> None:
    """With a tiny base in nano's place: what is tried is the page, not the model."""
    small = {"base": tiny.model.base, "rank": 2, "device": "cpu"}
    config = configuration.load(example).replace(
        model=small, data={"max_length": 64}, simulation={"threads": 1}
    )
    result = simulate(config, tmp_path / "runs" / "notes", open_lab(config))
    assert sorted(result.losses) == ["ada", "bob", "eve"]
    assert (result.adapter / "adapter_model.safetensors").is_file()


SOME = json.dumps({"prompt": "a", "response": "b"})
BAD_LINES = [
    ("{", "malformed JSON"),
    ('{"prompt": "a"}', "prompt without a response"),
    ('{"response": "a"}', "response without a prompt"),
    ('{"question": "a"}', "has neither text nor prompt and response"),
    ('{"text": "a", "prompt": "b", "response": "c"}', "has text beside prompt or response"),
    ('{"text": "a", "split": "dev"}', "split is 'train' or 'test'"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_the_pages_errors_of_a_line_are_the_real_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.jsonl").write_text(f"{SOME}\n{SOME}\n{line}\n")
    expected = f"notes.jsonl line 3: {message}"
    with pytest.raises(DataError, match=f"^{re.escape(expected)}"):
        load_silos("notes.jsonl")
    assert f"| `{expected}` |" in (ROOT / "docs/how-to-own-data.md").read_text(encoding="utf-8")


def test_the_pages_other_errors_are_the_real_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Config
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("tests.jsonl").write_text('{"client": "ada", "text": "a", "split": "test"}\n')
    Path("one.jsonl").write_text('{"text": "a"}\n')
    Path("five.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(5)))
    Path("folder/ada").mkdir(parents=True)
    data = {"max_length": 32}
    found = [
        _message(lambda: load_silos("notes.jsonl")),
        _message(lambda: load_silos("empty.jsonl")),
        _message(lambda: load_silos("tests.jsonl")),
        _message(lambda: load_silos("folder")),
        _message(lambda: load_silos("five.jsonl", partition="iid", participants=3)),
        _message(lambda: open_lab(tiny.replace(data={"source": "one.jsonl", **data}))),
        _message(lambda: configuration.parse("[data]\nsauce = 1")),
    ]
    page = (ROOT / "docs/how-to-own-data.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+)` \| ", page.partition("## Errors")[2], flags=re.MULTILINE)
    others = [text for text in listed if " line 3: " not in text]
    for text in found:
        spelled = text.replace("empty.jsonl", "notes.jsonl")
        assert any(known in spelled for known in others), text
    assert len(others) == len(found)
    assert len(listed) == len(found) + len(BAD_LINES)


def _message(act: object) -> str:
    assert callable(act)
    with pytest.raises(MeadowError) as caught:
        act()
    return str(caught.value)
