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

from . import __version__, cli_adapters, cli_client, cli_coordinator, cli_peer, cli_serve
from .config import Config, load, options_of, write
from .display import Display, bytes_text, seconds_text
from .errors import ConfigError, MeadowError, StorageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(cli_client.with_run(cli_coordinator.with_start(given)))
    console = Console(stderr=True)
    try:
        report = options.run(options, console)
        if options.json is not None:
            _write_text(options.json, json.dumps(report, indent=1) + "\n")
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

    demo = _command(
        commands, "demo", _demo, "fine-tune the embedded model across several participants"
    )
    demo.add_argument(
        "--quick", action="store_true", help="two participants, two rounds: half a minute"
    )
    demo.add_argument(
        "--deploy",
        action="store_true",
        help="a coordinator and three participants as real processes, TLS between them",
    )
    demo.add_argument("--out", type=Path, default=Path("meadow-demo"), help="the run's folder")
    demo.add_argument("--threads", type=_count, default=0, help="torch threads (0: torch's choice)")

    run = _command(
        commands, "simulate", _simulate, "run, or continue, the federation of a run.toml"
    )
    run.add_argument("config", type=Path, metavar="run.toml")
    run.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    run.add_argument(
        "--baselines", action="store_true", help="also train alone and centralised, and compare"
    )

    evaluate = _command(commands, "evaluate", _evaluate, "measure an adapter on held-out rows")
    evaluate.add_argument("config", type=Path, metavar="run.toml", help="names base and data")
    evaluate.add_argument("adapter", type=Path, help="a PEFT LoRA adapter's folder")

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

    peer = commands.add_parser("peer", help="a run without a coordinator")
    cli_peer.add_commands(
        peer.add_subparsers(required=True, metavar="COMMAND"), _command, _positive
    )

    bench = _command(commands, "bench", _bench, "measure, and write a table")
    bench.add_argument(
        "name", choices=["strategies", "refine", "zo", "zo-learning", "deploy", "serve"]
    )
    bench.add_argument("--out", type=Path, default=Path("bench"), help="folder for the tables")
    bench.add_argument(
        "--model", default="", help="base model (default: stories260K of MEADOW_MODELS)"
    )
    bench.add_argument(
        "--seeds", type=_positive, default=0, help="how many seeds (default: 3; zo-learning: 5)"
    )
    bench.add_argument("--only", default="", help="comma-separated cases to run")


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
    parser.set_defaults(run=run)
    return parser


def _demo(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .simulation import demo

    if options.deploy:
        return _deploy_demo(options, console)
    config = demo.QUICK if options.quick else demo.FULL
    config = config.replace(simulation={"threads": options.threads})
    folder = demo.free_folder(options.out)
    steps = demo.planned_steps(config, config.data.participants)
    with Display(console, steps) as display:
        report = demo.run(config, folder, demo.Demo(display, display.advance, display.enter))
    _print_demo(report, Console())
    return report


def _deploy_demo(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .simulation import deploy_demo

    with Display(console) as display:
        report = deploy_demo.run(options.out, display.enter)
    for line in deploy_demo.lines(report):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    return report


def _print_demo(report: dict[str, Any], console: Console) -> None:
    table = Table(title="held-out loss (mean over tokens)", title_justify="left")
    table.add_column("")
    names = sorted(report["losses"]["federated"])
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("everyone", justify="right", style="bold")
    losses = report["losses"]
    rows: tuple[tuple[str, dict[str, float], float | None], ...] = (
        ("base", losses["base"], report["base_loss"]),
        ("trained alone, on its own text", losses["alone, own text"], None),
        ("trained alone, on everyone's", losses["alone, everyone's text"], report["local_loss"]),
        ("federated", losses["federated"], report["federated_loss"]),
        ("centralised", {}, report["centralised_loss"]),
    )
    for label, by_name, mean in rows:
        cells = [f"{by_name[name]:.3f}" if name in by_name else "" for name in names]
        table.add_row(label, *cells, "" if mean is None else f"{mean:.3f}")
    console.print(table)
    sample = report["sample"]
    console.print(f"[bold]unseen text of {sample['participant']}[/]")
    console.print(sample["prompt"], markup=False, highlight=False)
    for when in ("before", "after"):
        console.print(f"[bold]... as the model goes on {when}[/]")
        console.print(sample[when], markup=False, highlight=False)
    console.print(
        f"share of centralised training's improvement: [bold]{report['share']:.2f}[/]; "
        f"sent {bytes_text(report['bytes_up'])} up, {bytes_text(report['bytes_down'])} down; "
        f"{seconds_text(report['seconds'])} min"
    )
    console.print(
        f"read back by plain peft + transformers: {report['peft_loss']:.4f} "
        f"(federated: {report['federated_loss']:.4f})"
    )
    console.print(f"adapter: {report['adapter']}", soft_wrap=True)


def _simulate(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .simulation import baselines
    from .simulation.engine import open_lab, simulate

    config = load(options.config)
    folder = options.out or Path("runs") / options.config.stem
    with Display(console) as display:
        display.enter("loading")
        lab = open_lab(config)
        once = baselines.cohort_size(lab, config) * config.rounds.count * config.clients.steps
        display.steps = once * (2 + 2 * len(baselines.GRID)) if options.baselines else once
        display.enter("federated")
        result = simulate(config, folder, lab, display, progress=display.advance)
        report: dict[str, Any] = {
            "base_loss": result.base_loss,
            "federated_loss": result.loss,
            "losses": result.losses,
            "bytes_up": result.total("bytes_up"),
            "bytes_down": result.total("bytes_down"),
            "adapter": str(result.adapter),
            "notices": list(result.notices),
            "messages": display.messages,
        }
        if options.baselines:
            report |= _compare(lab, config, display, result.base_loss, result.loss)
    _print_result(report, Console())
    return report


def _compare(
    lab: Any, config: Config, display: Display, base: float, federated: float
) -> dict[str, Any]:
    from .simulation import baselines

    display.enter("alone")
    alone = baselines.local_only(lab, config, display.advance)
    display.enter("centralised")
    pooled = baselines.centralised(lab, config, baselines.grid_of(config), display.advance)
    return {
        "local_loss": alone.loss,
        "local_own_loss": alone.own_loss,
        "centralised_loss": pooled.loss,
        "share": baselines.share(base, federated, pooled.loss),
    }


def _print_result(report: dict[str, Any], console: Console) -> None:
    table = Table(title="held-out loss (mean over tokens)", title_justify="left")
    table.add_column("")
    table.add_column("loss", justify="right")
    for name, loss in sorted(report["losses"].items()):
        table.add_row(name, f"{loss:.4f}")
    for label, key in (
        ("everyone, base", "base_loss"),
        ("everyone, trained alone", "local_loss"),
        ("everyone, federated", "federated_loss"),
        ("everyone, centralised", "centralised_loss"),
    ):
        if key in report:
            table.add_row(f"[bold]{label}", f"[bold]{report[key]:.4f}")
    console.print(table)
    console.print(
        f"sent {bytes_text(report['bytes_up'])} up, {bytes_text(report['bytes_down'])} down"
    )
    console.print(f"adapter: {report['adapter']}", soft_wrap=True)
    personal = Path(report["adapter"]).with_name("personal")
    if personal.exists():
        console.print(
            f"each participant's own adapter, whose losses these are: {personal}", soft_wrap=True
        )


def _evaluate(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .simulation.engine import measure, open_lab

    config = load(options.config)
    with Display(console) as display:
        display.enter("loading")
        lab = open_lab(config)
        display.enter("measuring")
        report = measure(lab, config, options.adapter)
    table = Table(title="held-out loss (mean over tokens)", title_justify="left")
    for heading in ("", "base", "adapter"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (base, adapted) in sorted(report["losses"].items()):
        table.add_row(name, f"{base:.4f}", f"{adapted:.4f}")
    table.add_row("[bold]everyone", f"{report['base_loss']:.4f}", f"[bold]{report['loss']:.4f}")
    Console().print(table)
    return report


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


_Measure = Callable[..., tuple[dict[str, Any], str]]
_FLAGS = {
    "mixed_ranks": "mixed ranks",
    "quantized_base": "quantised base",
    "secure_sum": "secure sum",
    "personal": "a part stays personal",
}


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
    from .simulation import bench, deploy_bench, serve_bench, zo_bench

    own: dict[str, _Measure] = {"deploy": deploy_bench.run, "serve": serve_bench.run}
    own |= dict.fromkeys(zo_bench.NAMES, zo_bench.run)
    measure = own.get(options.name) or bench.run
    seeds = options.seeds or (5 if options.name == "zo-learning" else 3)
    with Display(console) as display:
        report, text = measure(
            options.name, options.out, options.model, seeds, options.only, display.enter
        )
    Console().print(text, markup=False, highlight=False)
    return report


if __name__ == "__main__":
    sys.exit(main())
