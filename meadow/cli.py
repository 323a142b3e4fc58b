"""The command line: `meadow demo | simulate | coordinator | client | peer | ...`.

Only here is anything printed.  A user's mistake is one line on standard error and status 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import (
    __version__,
    cli_adapters,
    cli_client,
    cli_coordinator,
    cli_peer,
    cli_publish,
    cli_serve,
    cli_simulate,
)
from .config import Config, load, options_of, write
from .display import Display, bytes_text
from .errors import ConfigError, MeadowError, StorageError
from .store import Disk


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(cli_client.with_run(cli_coordinator.with_start(given)))
    console = Console(stderr=True)
    try:
        report = options.run(options, console)
        if options.json is not None:
            _write_report(options.json, report, options.secret)
    except MeadowError as error:
        console.print(
            f"meadow: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    except KeyboardInterrupt:
        console.print("meadow: stopped; the same command goes on", soft_wrap=True)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meadow", description="Federated and decentralized fine-tuning of language models."
    )
    parser.add_argument("--version", action="version", version=f"meadow {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    cli_simulate.add_commands(commands, _command, _count)

    init = _command(commands, "init", _init, "write an annotated run.toml")
    init.add_argument("file", type=Path, nargs="?", default=Path("run.toml"), metavar="run.toml")
    init.add_argument("--out", type=Path, help="the folder to write it into")
    init.add_argument("--data", default="nano", help="your text: file, folder or datasets:NAME")
    init.add_argument("--strategy", default="fedavg_lora", help="whose options to include")
    init.add_argument(
        "--peer", action="store_true", help="for `meadow peer`: fedkseed, as peers can run it"
    )

    _add_tools(commands)
    return parser


def _add_tools(commands: Any) -> None:
    """What lists, measures, or runs without a coordinator."""
    listing = _command(
        commands, "strategies", _strategies, "list the algorithms, their bytes and options"
    )
    listing.add_argument("--out", type=Path, help="also write the table there, as strategies.md")

    pool = _command(
        commands, "pool", _pool, "what share of the gradient's energy a pool of directions captures"
    )
    pool.add_argument("config", type=Path, metavar="run.toml", help="names base, data and rank")
    pool.add_argument("--out", type=Path, help="also write the table there, as pool.json")

    coordinator = commands.add_parser("coordinator", help="the operator's side of a deployed run")
    cli_coordinator.add_commands(
        coordinator.add_subparsers(required=True, metavar="COMMAND"), _command
    )

    client = commands.add_parser("client", help="the participant's side of a deployed run")
    cli_client.add_commands(client.add_subparsers(required=True, metavar="COMMAND"), _command)

    adapters = commands.add_parser("adapters", help="the registry of signed adapters")
    cli_adapters.add_commands(adapters.add_subparsers(required=True, metavar="COMMAND"), _command)

    cli_serve.add_serve(commands, _command, _count, _positive)
    keys = commands.add_parser("keys", help="who may ask a server")
    cli_serve.add_keys(keys.add_subparsers(required=True, metavar="COMMAND"), _command, _count)
    cli_publish.add_command(commands, _command)

    peer = commands.add_parser("peer", help="a run without a coordinator")
    cli_peer.add_commands(
        peer.add_subparsers(required=True, metavar="COMMAND"), _command, _positive
    )

    bench = _command(commands, "bench", _bench, "measure, and write a table")
    bench.add_argument(
        "name",
        choices=["strategies", "refine", "zo", "zo-learning", "deploy", "serve", "serve-gpu"],
    )
    bench.add_argument("--out", type=Path, default=Path("bench"), help="folder for the tables")
    bench.add_argument(
        "--model", default="", help="base model (default: stories260K of MEADOW_MODELS)"
    )
    bench.add_argument(
        "--seeds",
        type=_positive,
        default=0,
        help="how many seeds (default: 3; zo-learning: 10, 5 or 3)",
    )
    bench.add_argument("--only", default="", help="comma-separated cases to run")
    bench.add_argument(
        "--reuse",
        metavar="COMMIT",
        action="append",
        default=[],
        help="what this other commit has measured into --out counts too, and the page says so",
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no count")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def _command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result there, as JSON"
    )
    parser.set_defaults(run=run, secret=False)
    return parser


def _init(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .strategies.registry import STRATEGIES, make

    name = "fedkseed" if options.peer else options.strategy
    make(name, {})
    kind = STRATEGIES[name]
    path = (options.out or Path()) / options.file
    if path.exists():
        raise ConfigError(f"{path} exists", "name another file, or delete it")
    source = options.data
    if Path(source).exists():  # paths in run.toml are relative to it
        source = os.path.relpath(Path(source).resolve(), path.parent.resolve())
    own, rank = _strategy_options(kind), kind.customary_rank
    if options.peer:
        from .client.peer_terms import CHARTERED

        own = [row for row in own if row[0] in CHARTERED]
    config = Config().replace(
        model={"rank": rank, "alpha": float(rank)} if rank else {},  # updates scaled by 1
        data={"source": source},
        strategy={"name": name, "options": {n: default for n, default, _ in own}},
    )
    text = write(config, about=True, options={key: about for key, _, about in own})
    _write_text(path, text)
    command, does = ("peer charter", "founds") if options.peer else ("simulate", "runs")
    Console().print(f"wrote {path}; `meadow {command} {path}` {does} it", soft_wrap=True)
    return {"path": str(path)}


def _strategy_options(kind: Any) -> list[tuple[str, Any, str]]:
    """(name, default, about) of what run.toml may set of a strategy."""
    from .strategies.registry import options_of as parts_of

    names = {part.name for part in parts_of(kind)}
    return [row for row in options_of(kind) if row[0] in names]


def _strategies(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from .simulation.strategy_table import STEPS, markdown, rows
    from .strategies.registry import STRATEGIES

    found = rows()
    screen = Console()
    screen.print(
        f"bytes: of one client and round of {STEPS} steps, at nano's shape",
        highlight=False,
    )
    for row in found:
        own = _strategy_options(STRATEGIES[row["name"]])
        row["options"] = {
            name: {"default": default, "about": about} for name, default, about in own
        }
        flags = [text for key, text in _FLAGS.items() if row[key]]
        screen.print(
            f"\n[bold]{row['name']}[/]  {row['summary']}  ({row['paper']}, {row['lines']} lines)\n"
            f"  rank {row['rank']}: {bytes_text(row['bytes_up'])} up, "
            f"{bytes_text(row['bytes_down'])} down at most; {', '.join(flags)}; DP: {row['dp']}",
            highlight=False,
        )
        for name, default, about in own:
            screen.print(f"  {name} = {json.dumps(default)}  [dim]# {about}[/]", highlight=False)
    if options.out is not None:
        _write_text(options.out / "strategies.md", markdown(found))
    return found


_FLAGS = {
    "mixed_ranks": "mixed ranks",
    "quantized_base": "quantised base",
    "secure_sum": "secure sum",
    "personal": "a part stays personal",
}


def _write_report(path: Path, report: Any, secret: bool) -> None:
    """A command's result, for its owner's eyes alone where it holds a secret."""
    text = json.dumps(report, indent=1) + "\n"
    if secret:
        Disk().folder(path.absolute().parent)
        Disk().write(path, text.encode(), 0o600)
    else:
        _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _pool(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .peft_adapters.pool_size import warnings_of
    from .simulation.engine import open_lab
    from .simulation.pool_energy import energy

    config = load(options.config)
    with Display(console) as display:
        display.enter("loading")
        lab = open_lab(config)
        display.enter("backpropagating")
        ranks = sorted({config.model.rank, 16, 32, 64})
        rows = [energy(lab, config, rank) for rank in ranks]
    table = Table(title="share of the gradient's energy that a pool captures", title_justify="left")
    for heading in ("rank", "directions", "share", "expected of a random subspace"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            *(f"{row['rank']}", f"{row['dimensions']:,}"),
            *(f"{row['share']:.3g}", f"{row['expected']:.3g}"),
        )
    Console().print(table)
    warnings = warnings_of(config.model.rank, lab.layers)
    for warning in warnings:
        Console().print(f"note: {warning}", soft_wrap=True)
    report = {"pools": rows, "warnings": warnings}
    if options.out is not None:
        _write_text(options.out / "pool.json", json.dumps(report, indent=1) + "\n")
    return report


def _bench(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .simulation import bench, deploy_bench, serve_bench, serve_gpu_bench, zo_bench
    from .simulation.bench_request import BenchRequest, Report

    own: dict[str, Callable[[BenchRequest], Report]]
    own = {"deploy": deploy_bench.run, "serve": serve_bench.run, "serve-gpu": serve_gpu_bench.run}
    own |= dict.fromkeys(zo_bench.NAMES, zo_bench.run)
    measure = own.get(options.name, bench.run)
    with Display(console) as display:
        request = BenchRequest(
            options.name, options.out, display.enter, options.model, options.seeds, options.only,
            tuple(options.reuse),
        )  # fmt: skip
        report, text = measure(request)
    Console().print(text, markup=False, highlight=False)
    return report


if __name__ == "__main__":
    sys.exit(main())
