"""The house rules on imports and calls, read from the source: see docs on the architecture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("client", "server", "strategies", "peft_adapters", "simulation")
MAY_IMPORT: dict[str, set[str]] = {
    "meadow": set(),
    "peft_adapters": {"meadow"},
    "strategies": {"peft_adapters", "meadow"},
    "client": {"strategies", "peft_adapters", "meadow"},
    "server": {"strategies", "peft_adapters", "meadow"},
    "simulation": {"client", "server", "strategies", "peft_adapters", "meadow"},
}
FREE = (
    "meadow/cli.py",
    "meadow/cli_adapters.py",
    "meadow/cli_coordinator.py",
    "meadow/cli_client.py",
    "meadow/cli_peer.py",
    "meadow/cli_peer_replay.py",
    "meadow/cli_serve.py",
    "meadow/cli_simulate.py",
    "meadow/cli_publish.py",
)  # may import all, and print
FLOWER = {
    "client/app.py": {"flwr.app", "flwr.clientapp"},
    "server/app.py": {"flwr.app", "flwr.serverapp"},
    "simulation/grid.py": {"flwr.app", "flwr.clientapp", "flwr.serverapp"},
    "simulation/engine.py": {"flwr.app"},
    "simulation/flower_identity.py": {"flwr.supercore.task_identity"},
    # benchmarks only: the baseline is a Flower app, and the load generator speaks Flower's protocol
    "simulation/plain_flower_app.py": {
        "flwr.app",
        "flwr.clientapp",
        "flwr.serverapp",
        "flwr.serverapp.strategy",
    },
    "simulation/load_generator.py": {
        "flwr.app",
        "flwr.app.message",
        "flwr.common.serde",
        "flwr.proto.fleet_pb2",
        "flwr.proto.heartbeat_pb2",
        "flwr.proto.message_pb2",
        "flwr.proto.node_pb2",
        "flwr.supercore.inflatable.inflatable_object",
        "flwr.supercore.inflatable.inflatable_utils",
    },
}
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def sources() -> list[Path]:
    """Every product file once: the folders, and meadow/ without the links to them."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    found += (ROOT / "meadow").glob("*.py")
    found += (ROOT / "meadow" / "nano").rglob("*.py")
    return sorted(path.relative_to(ROOT) for path in found)


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def module(path: Path) -> tuple[str, ...]:
    """The package in which a file's relative imports start: `meadow.client` for client/app.py."""
    parts = path.parent.parts
    return parts if parts[0] == "meadow" else ("meadow", *parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, relative ones resolved, `from x import y` as x.y."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = module(path)
            start = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def folder_of(name: str) -> str | None:
    """Which of the house's folders an imported name belongs to; None for the world outside."""
    first, _, rest = name.partition(".")
    if first != "meadow":
        return None
    second = rest.partition(".")[0]
    return second if second in FOLDERS else "meadow"


@pytest.fixture(params=sources(), ids=str)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_the_house_is_all_there() -> None:
    assert {path.parts[0] for path in sources()} == MAY_IMPORT.keys()
    assert {Path(name) for name in (*FLOWER, *FREE)} <= set(sources())
    assert all((ROOT / "meadow" / folder).resolve() == ROOT / folder for folder in FOLDERS)


def test_folders_import_only_what_lies_below(path: Path) -> None:
    if path.as_posix() in FREE:
        return
    own = path.parts[0]
    used = {folder for name in imports(path) if (folder := folder_of(name))}
    assert used - {own} <= MAY_IMPORT[own]


def test_siblings_are_imported_under_their_one_name(path: Path) -> None:
    """`import server` would work from a checkout, as a second copy of the module."""
    assert not {name for name in imports(path) if name.partition(".")[0] in FOLDERS}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and not node.level and path.parts[0] != "meadow":
            assert (node.module or "").partition(".")[0] != "meadow", "import siblings relatively"


def test_only_a_few_files_import_flower(path: Path) -> None:
    """And of Flower only the public modules named in the table, but for the quarantined one."""
    used = {name for name in imports(path) if name.partition(".")[0] == "flwr"}
    allowed = FLOWER.get(path.as_posix(), set())
    assert {name.rpartition(".")[0] for name in used} == allowed


def test_serving_has_an_engine_without_asyncio_and_a_front_without_torch(path: Path) -> None:
    if path.parent.as_posix() != "server/serving":
        return
    used = {name.partition(".")[0] for name in imports(path)}
    assert not ("torch" in used and used & {"asyncio", "fastapi", "starlette", "uvicorn"})


def calls(node: ast.AST) -> set[str]:
    """The dotted name of everything that is called in a piece of source."""
    return {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}


def without_program(source: ast.Module) -> ast.Module:
    """The source but for what it does when it is run as a program."""
    body = [
        node
        for node in source.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")
    ]
    return ast.Module(body, [])


def test_nothing_prints_outside_the_command_line(path: Path) -> None:
    if path.as_posix() in FREE:
        return
    found = calls(without_program(tree(path)))
    assert not {"print", "input", "sys.stdout.write", "sys.stderr.write"} & found


def test_nothing_reads_pickle_or_runs_text(path: Path) -> None:
    assert not {name for name in imports(path) if name.partition(".")[0] in PICKLES}
    found = calls(tree(path))
    assert not {"eval", "exec", "compile", "__import__", "torch.load", "torch.save"} & found
    assert not {
        name for name in found if name.endswith((".read_pickle", ".load_state_dict_from_url"))
    }


def test_no_remote_code_is_trusted(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


@pytest.mark.parametrize(
    ("where", "text", "expected"),
    [
        ("client/app.py", "from ..errors import X", "meadow.errors.X"),
        ("client/app.py", "from .member import X", "meadow.client.member.X"),
        ("client/app.py", "from .. import server", "meadow.server"),
        ("meadow/cli.py", "from .server.app import X", "meadow.server.app.X"),
        ("meadow/nano/corpus.py", "from ..errors import X", "meadow.errors.X"),
        ("client/app.py", "import server.app", "server.app"),
    ],
)
def test_relative_names_are_resolved(
    where: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules above rest on this."""
    monkeypatch.setattr(f"{__name__}.tree", lambda path: ast.parse(text))
    assert list(imports(Path(where))) == [expected]
