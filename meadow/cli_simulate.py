"""`meadow demo`, `meadow simulate` and `meadow evaluate`: whole federations on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .config import Config, load
from .display import Display, bytes_text, seconds_text
from .errors import ConfigError

Add = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, add: Add, count: Callable[[str], int]) -> None:
    """The commands; `add(commands, name, run, about)` makes one, and `count` reads a number."""
    demo = add(commands, "demo", _demo, "fine-tune the embedded model across several participants")
    demo.add_argument(
        "--quick", action="store_true", help="two participants, two rounds: half a minute"
    )
    demo.add_argument(
        "--deploy",
        action="store_true",
        help="a coordinator and three participants as real processes, TLS between them",
    )
    demo.add_argument(
        "--publish", default="", metavar="NAME",
        help="publish what was learned in this user's registry, and point NAME@prod to it",
    )  # fmt: skip
    demo.add_argument("--out", type=Path, default=Path("meadow-demo"), help="the run's folder")
    demo.add_argument("--threads", type=count, default=0, help="torch threads (0: torch's choice)")

    run = add(commands, "simulate", _simulate, "run, or continue, the federation of a run.toml")
    run.add_argument("config", type=Path, metavar="run.toml")
    run.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    run.add_argument(
        "--baselines", action="store_true", help="also train alone and centralised, and compare"
    )

    evaluate = add(commands, "evaluate", _evaluate, "measure an adapter on held-out rows")
    evaluate.add_argument("config", type=Path, metavar="run.toml", help="names base and data")
    evaluate.add_argument("adapter", type=Path, help="a PEFT LoRA adapter's folder")


def _demo(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .simulation import demo

    if options.deploy:
        if options.publish:
            raise ConfigError("--publish does not go with --deploy", "leave one of them out")
        return _deploy_demo(options, console)
    config = demo.QUICK if options.quick else demo.FULL
    config = config.replace(
        simulation={"threads": options.threads}, serve={"name": options.publish}
    )
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
