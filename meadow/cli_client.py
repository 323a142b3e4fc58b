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
from rich.markup import escape
from rich.table import Table

from .cli_coordinator import positive, stoppable
from .display import Display, bytes_text
from .errors import ConfigError
from .file_lock import is_held
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
    log.add_argument("--last", type=positive, default=20, help="so many lines")

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
    from .client.flower_key import FlowerKey
    from .client.gateway_client import GatewayClient
    from .client.home import FLOWER_KEY
    from .client.joining import (
        admit,
        begun,
        enrol,
        folder_of,
        make_folder,
        own_fingerprint,
        rules_of,
    )
    from .identity import own_identity
    from .invitation import Invitation

    invitation, disk = Invitation.parse(_word(options.invitation)), Disk()
    folder = (options.folder or folder_of(invitation.name)).resolve()
    membership, identity = begun(folder, invitation), own_identity()
    rules_of(folder, options.data, options.base)  # says what is missing before anybody is asked
    make_folder(folder, disk)
    flower = FlowerKey.load_or_create(folder / FLOWER_KEY, disk)
    unproven = membership.with_certificate("")  # one that has expired must not be in the way
    screen = Console(markup=False, highlight=False, soft_wrap=True)
    with GatewayClient(unproven, identity) as gateway, Display(console) as display:

        def waiting() -> None:
            screen.print(f"{invitation.name}: your key is {own_fingerprint(identity)}")
            screen.print("tell it to the operator, by telephone for instance, who compares it")
            display.enter("waiting for the operator's approval (the same command goes on waiting)")

        enrolment = enrol(gateway, identity, flower.public_pem, waiting)
    admit(folder, membership, enrolment, disk)
    return _consent(folder, options, console)


def _word(given: str) -> str:
    """The invitation itself, or what a file of that name holds."""
    from .client.home import read_text

    is_name = len(given.encode()) < 256  # bytes; no file has a longer one
    return read_text(Path(given)) if is_name and Path(given).is_file() else given


def _agree(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    options.data, options.base = [], ""
    return _consent(_folder(options), options, console)


def _consent(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Show what the run would do here; write it down once its user agrees."""
    from .client.consent import Offer
    from .client.daemon import own_bundle
    from .client.gateway_client import GatewayClient
    from .client.home import LOCK, POLICY
    from .client.joining import approve, rules_of
    from .client.membership import Membership
    from .identity import own_identity
    from .terms import Terms

    membership, disk = Membership.load(folder), Disk()
    with GatewayClient(membership, own_identity()) as gateway:
        text = gateway.terms()
    terms, rules = Terms.parse(text), rules_of(folder, options.data, options.base)
    with Display(console) as display:
        display.enter("looking at the base model and the text")
        own_bundle(folder, terms, disk)
        offer = Offer.look(terms, rules, membership.name)
    screen = Console(markup=False, highlight=False, soft_wrap=True)
    for line in offer.lines():
        screen.print(line)
    if not options.yes and not _confirmed():
        raise ConfigError("not agreed to: nothing will be trained", "the same command asks again")
    approve(folder, terms, text, rules, disk)
    screen.print(f"agreed; your rules are in {folder / POLICY}")
    if is_held(folder / LOCK):
        screen.print("restart the daemon, which still works by what was agreed to before")
    else:
        screen.print(
            "`meadow client` takes part from now on; as a service: `meadow client service`"
        )
    return {"folder": str(folder), "run": terms.run, "terms": terms.digest}


def _confirmed() -> bool:
    """The user's answer.  Raises ConfigError where nobody can answer."""
    try:
        return input("take part in this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        raise ConfigError(
            "nobody is there to be asked", "--yes agrees without a question"
        ) from None


def _folder(options: argparse.Namespace) -> Path:
    """The participant's folder that the command is about."""
    from .client.joining import only_membership, require_folder

    folder: Path = (options.folder or only_membership()).resolve()
    return require_folder(folder)


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
    from .client.daemon_status import status_of

    found = status_of(_folder(options))
    screen = Console(markup=False, highlight=False, soft_wrap=True)
    screen.print(f"{found['name']}: {_state(found)}")
    screen.print(f"coordinator: {', '.join(found['addresses'])}; certificate until {_until(found)}")
    sent = found["sent"]
    screen.print(f"sent: {sent['messages']} messages, {bytes_text(sent['bytes'])}")
    if found["trainer"]:
        _print_trainer(found, screen)
    return found


def _state(found: dict[str, Any]) -> str:
    """What the daemon does now, in a few words."""
    if found["finished"]:
        return "the run is finished, its adapter is with the operator; `meadow client leave` leaves"
    if not found["daemon"]:
        paused = " and paused" if found["paused"] else ""
        return f"the daemon is not running{paused}; `meadow client` starts it"
    if found["paused"]:
        return "paused; `meadow client resume` goes on"
    if not found["trainer"]:
        return f"starting; what it says is in {found['folder']}/logs"
    working = found["working"]
    if not working:
        return f"waiting for a round of run {found['run'][:16]}"
    return (
        f"working on round {working['round']}: {working['verb']}, {working['steps']} steps so far"
    )


def _until(found: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(found["certificate_expires"]))


def _print_trainer(found: dict[str, Any], screen: Console) -> None:
    """What the resident trainer says of itself."""
    if found["fault"]:
        screen.print(f"fault: {found['fault']}")
    loads, text = found["base"]["loads"], found["text"]
    screen.print(f"base model loaded {loads['count']} times, {loads['seconds']:.1f} s in all")
    screen.print(f"text: {text['train']} rows to train on, {text['held_out']} held out")
    table = Table("request", "round", "received", "seconds", "of it loading", "outcome")
    for row in found["recent"][-10:]:
        cells = (f"{row['seconds']:.2f}", f"{row['loading_seconds']:.2f}", escape(row["outcome"]))
        table.add_row(row["verb"], str(row["round"]), bytes_text(row["received"]), *cells)
    screen.print(table)


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
    from .client.joining import only_membership, require_folder
    from .client.outgoing_log import read

    folder: Path = (options.folder or only_membership()).resolve()
    if not (folder / OUTGOING).exists():
        require_folder(folder)  # one that was left has its log and nothing else
    with_head = (folder / OUTGOING).exists() or (folder / f"{OUTGOING}.head").exists()
    entries = read(folder / OUTGOING) if with_head else []
    screen = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("time", "what", "round", "bytes", "SHA-256")
    for entry in entries[-options.last :]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        cells = (str(entry.round), bytes_text(entry.bytes), entry.sha256[:16])
        table.add_row(when, entry.kind, *cells)
    screen.print(table)
    sent = bytes_text(sum(entry.bytes for entry in entries))
    whole = ": the chain holds, from the first to the last" if entries else ""
    screen.print(f"{len(entries)} lines, {sent}{whole}")
    return [dataclasses.asdict(entry) for entry in entries]


def _dry_run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.daemon_status import require_running
    from .client.home import SOCKET
    from .client.trainer_link import DRY_RUN, TrainerLink

    folder = _folder(options)
    require_running(folder)
    with Display(console) as display, TrainerLink(folder / SOCKET, 60.0) as link:
        display.enter("training a round that is not sent")
        found: dict[str, Any] = json.loads(link.call(DRY_RUN))
    Console().print_json(data=found)
    return found


def _rotate(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.joining import memberships, only_membership, own_fingerprint
    from .client.key_rotation import rotate_identity
    from .identity import default_path

    own = _folder(options) if options.folder else only_membership() if not memberships() else None
    folders = sorted({*memberships(), *([own] if own else [])})
    fingerprint = own_fingerprint(rotate_identity(default_path(), folders, Disk()))
    screen = Console(markup=False, highlight=False, soft_wrap=True)
    screen.print(f"the new key's fingerprint is {fingerprint}")
    for folder in folders:
        screen.print(f"its certificate is in {folder}")
    return {"fingerprint": fingerprint, "folders": [str(folder) for folder in folders]}


def _leave(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.gateway_client import GatewayClient
    from .client.home import LOCK
    from .client.joining import leave
    from .client.membership import Membership
    from .identity import own_identity

    folder, screen = _folder(options), Console(markup=False, highlight=False, soft_wrap=True)
    if is_held(folder / LOCK):
        raise ConfigError("this participant's daemon is running", "stop it, then leave")
    if options.withdraw:
        with GatewayClient(Membership.load(folder), own_identity()) as gateway:
            gateway.withdraw()
        screen.print("the coordinator will delete what you contributed, and asks you no more;")
        screen.print("what finished rounds have learned from it stays in the adapter")
    leave(folder)
    screen.print(f"left; the log of what was sent stays in {folder}")
    return {"folder": str(folder), "withdrawn": options.withdraw}


def _service(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.home import POLICY
    from .client.membership import Membership
    from .client.policy import Policy
    from .client.systemd_unit import Fence, readable_paths, unit_text
    from .identity import default_path

    folder = _folder(options)
    rules = Policy.load(folder / POLICY)
    readable = readable_paths([*rules.data, rules.base])
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
    options = ("--folder", "--json")
    if given[:1] == ["client"] and (len(given) == 1 or given[1].startswith(options)):
        given.insert(1, RUN)
    return given
