"""`meadow client …`: the participant's side of a deployed run."""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .cli_coordinator import stoppable
from .display import Display, bytes_text
from .errors import ConfigError
from .store import Disk

RUN = "run"
"""What `meadow client` alone means."""

Add = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, add: Add) -> None:
    """The sub-commands of `meadow client`; `add(commands, name, run, about)` makes one."""
    join = _on_folder(commands, add, "join", _join, "take part in a run, with an invitation")
    join.add_argument("invitation", help="the word that the operator sent, or a file that holds it")
    join.add_argument("--data", action="append", default=[], help="text to train on", required=True)
    join.add_argument("--base", default="", help="the base model's folder on this machine")
    join.add_argument("--yes", action="store_true", help="agree without being asked")

    _on_folder(commands, add, RUN, _run, "train whenever the run asks (also: without `run`)")
    _on_folder(commands, add, "status", _status, "what the daemon is doing and has done")
    _on_folder(commands, add, "pause", _pause, "stay away from the run until `resume`")
    _on_folder(commands, add, "resume", _resume, "take part again after `pause`")

    log = _on_folder(commands, add, "log", _log, "everything that has left this machine, verified")
    log.add_argument("--last", type=int, default=20, help="so many lines")

    _on_folder(
        commands, add, "dry-run", _dry_run, "what would be sent for a round, without sending"
    )
    agree = _on_folder(commands, add, "agree", _agree, "read what the run is now, and agree to it")
    agree.add_argument("--yes", action="store_true", help="agree without being asked")
    _on_folder(commands, add, "rotate-key", _rotate, "take a new key, and keep the name")

    leave = _on_folder(commands, add, "leave", _leave, "leave the run, and delete its keys here")
    leave.add_argument(
        "--withdraw", action="store_true", help="ask the coordinator to retract what was sent"
    )

    unit = _on_folder(commands, add, "service", _service, "print a systemd unit for the daemon")
    unit.add_argument("--user", default="", help="who it runs as (default: you)")
    unit.add_argument("--memory-mb", type=int, default=0, help="its memory limit (0: none)")
    unit.add_argument("--cpus", type=float, default=0.0, help="its share of processors (0: all)")
    unit.add_argument("--gpu", action="store_true", help="let it see the GPU")
    unit.add_argument("--out", type=Path, help="also write it there")


def _on_folder(commands: Any, add: Add, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser = add(commands, name, run, about)
    parser.add_argument(
        "--folder", type=Path, help="the participant's folder, if there are several"
    )
    return parser


def _join(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.gateway_client import GatewayClient
    from .client.joining import flower_key, folder_of, make_folder
    from .client.membership import Membership
    from .identity import own_identity
    from .invitation import Invitation

    invitation, disk = Invitation.parse(_word(options.invitation)), Disk()
    folder = options.folder or folder_of(invitation.name)
    make_folder(folder, disk)
    membership, identity = Membership.of(invitation), own_identity()
    screen = Console()
    with GatewayClient(membership, identity) as gateway, Display(console) as display:
        key = flower_key(folder, disk)
        enrolment = gateway.enrol(key)
        screen.print(f"{enrolment.name}: your key's fingerprint is {enrolment.fingerprint}")
        screen.print("tell it to the operator, by telephone for instance, who compares it")
        if enrolment.status == "pending":
            display.enter("waiting for the operator's approval (this command can be repeated)")
        while not enrolment.certificate:
            time.sleep(1.0)
            enrolment = gateway.enrol(key)
    node, certificate = enrolment.node_id, enrolment.certificate
    dataclasses.replace(membership, certificate=certificate, node_id=node).save(folder, disk)
    return _consent(folder, options, console)


def _word(given: str) -> str:
    """The invitation itself, or what a file of that name holds."""
    path = Path(given)
    if len(given) < 256 and path.is_file():
        return path.read_text(encoding="utf-8")
    return given


def _agree(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    options.data, options.base = [], ""
    return _consent(_folder(options), options, console)


def _consent(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Show what the run would do here; write it down once its user agrees."""
    from .client.gateway_client import GatewayClient
    from .client.joining import approve, explanation, local_base, rules_of
    from .client.membership import Membership
    from .client.terms import Terms
    from .identity import own_identity

    with GatewayClient(Membership.load(folder), own_identity()) as gateway:
        text = gateway.terms()
    terms, rules = Terms.parse(text), rules_of(folder, options.data, options.base)
    with Display(console) as display:
        display.enter("checking the base model")
        blueprint = local_base(terms, rules.base)
    screen = Console()
    for line in explanation(terms, blueprint, rules.data):
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    if not options.yes and not _confirmed():
        raise ConfigError("not agreed to: nothing will be trained", "the same command asks again")
    approve(folder, terms, text, rules, Disk())
    screen.print(f"agreed; your rules are in {folder / 'policy.toml'}", soft_wrap=True)
    screen.print("`meadow client` takes part from now on; `meadow client service` as a service")
    return {"folder": str(folder), "run": terms.run, "terms": terms.digest}


def _confirmed() -> bool:
    try:
        return input("take part in this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _folder(options: argparse.Namespace) -> Path:
    from .client.joining import only_membership

    folder: Path = (options.folder or only_membership()).resolve()
    return folder


def _run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.daemon import ClientDaemon

    folder = _folder(options)
    with Display(console) as display:
        display.enter("starting")
        daemon = ClientDaemon(folder, display)
        display.enter("taking part; `meadow client status` says more")
        with stoppable() as stopped:
            daemon.run(lambda: bool(stopped))
    Console().print("stopped; nothing is lost: the same command goes on")
    return {"folder": str(folder)}


def _status(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.home import SOCKET
    from .client.trainer_link import STATUS, TrainerLink

    with TrainerLink(_folder(options) / SOCKET, patience=1.0) as link:
        found: dict[str, Any] = json.loads(link.call(STATUS))
    screen, working = Console(highlight=False), found["working"]
    state = "paused" if found["paused"] else "working" if working else "waiting for a round"
    loads = found["base"]["loads"]
    screen.print(f"{found['name']} in run {found['run'][:16]}: {state}", markup=False)
    if found["fault"]:
        screen.print(f"fault: {found['fault']}", markup=False, soft_wrap=True)
    screen.print(f"base model loaded {loads['count']} times, {loads['seconds']:.1f} s in all")
    text = found["text"]
    screen.print(f"text: {text['train']} rows to train on, {text['held_out']} held out")
    table = Table("request", "round", "received", "seconds", "of it loading", "outcome")
    for row in found["recent"][-10:]:
        cells = (f"{row['seconds']:.2f}", f"{row['loading_seconds']:.2f}", row["outcome"])
        table.add_row(row["verb"], str(row["round"]), bytes_text(row["received"]), *cells)
    screen.print(table)
    return found


def _pause(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.home import PAUSED

    Disk().write(_folder(options) / PAUSED, b"")
    Console().print("paused: this participant stays away until `meadow client resume`")
    return {"paused": True}


def _resume(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.home import PAUSED

    path = _folder(options) / PAUSED
    if path.exists():
        Disk().delete(path)
    Console().print("resumed")
    return {"paused": False}


def _log(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from .client.home import OUTGOING
    from .client.outgoing_log import read, verify

    path = _folder(options) / OUTGOING
    entries = read(path) if path.exists() else []
    screen = Console(highlight=False)
    table = Table("time", "what", "round", "bytes", "SHA-256")
    for entry in entries[-options.last :]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        cells = (str(entry.round), bytes_text(entry.bytes), entry.sha256[:16])
        table.add_row(when, entry.kind, *cells)
    screen.print(table)
    count = verify(path) if entries else 0
    sent = sum(entry.bytes for entry in entries)
    screen.print(f"{count} lines, {bytes_text(sent)}: the chain holds, from the first to the last")
    return [dataclasses.asdict(entry) for entry in entries]


def _dry_run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.home import SOCKET
    from .client.trainer_link import DRY_RUN, TrainerLink

    with Display(console) as display, TrainerLink(_folder(options) / SOCKET, 1.0) as link:
        display.enter("training a round that is not sent")
        found: dict[str, Any] = json.loads(link.call(DRY_RUN))
    Console().print_json(data=found)
    return found


def _rotate(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.rotation import rotate_key

    fingerprint = rotate_key(_folder(options), Disk())
    Console().print(f"the new key's fingerprint is {fingerprint}; restart the daemon")
    return {"fingerprint": fingerprint}


def _leave(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.gateway_client import GatewayClient
    from .client.joining import leave
    from .client.membership import Membership
    from .identity import own_identity

    folder, screen = _folder(options), Console()
    if options.withdraw:
        with GatewayClient(Membership.load(folder), own_identity()) as gateway:
            gateway.withdraw()
        screen.print("the coordinator will delete what you contributed, and asks you no more;")
        screen.print("what finished rounds have learned from it stays in the adapter")
    leave(folder)
    screen.print(f"left; the log of what was sent stays in {folder}", soft_wrap=True)
    return {"folder": str(folder), "withdrawn": options.withdraw}


def _service(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.home import POLICY
    from .client.membership import Membership
    from .client.policy import Policy
    from .client.systemd_unit import Fence, unit_text
    from .identity import default_path

    folder = _folder(options)
    rules = Policy.load(folder / POLICY)
    readable = tuple(Path(p) for p in [*rules.data, rules.base] if p)
    fence = Fence(
        options.user or getpass.getuser(), readable, options.memory_mb, options.cpus, options.gpu
    )
    name = Membership.load(folder).name
    text = unit_text(name, folder, default_path().parent.resolve(), fence)
    Console().print(text, markup=False, highlight=False, soft_wrap=True, end="")
    if options.out is not None:
        Disk().write(options.out, text.encode())
    return {"unit": text}


def with_run(arguments: Sequence[str]) -> list[str]:
    """`meadow client` and `meadow client --folder X` run the daemon."""
    given = list(arguments)
    if given[:1] == ["client"] and (len(given) == 1 or given[1] in ("--folder", "--json")):
        given.insert(1, RUN)
    return given
