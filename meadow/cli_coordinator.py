"""`meadow coordinator …`: the operator's side of a deployed run."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from ssl import PEM_cert_to_DER_cert
from types import FrameType
from typing import Any

from rich.console import Console

from .config import Config, load
from .display import Display
from .file_lock import is_held
from .invitation import Invitation
from .participant_name import normal_name
from .store import Disk, locked

START = "start"
"""What `meadow coordinator run.toml` means."""

Add = Callable[..., argparse.ArgumentParser]
_FOLDER = Path("coordinator")


def add_commands(commands: Any, add: Add) -> None:
    """The sub-commands of `meadow coordinator`; `add(commands, name, run, about)` makes one."""
    start = add(commands, START, _start, "begin a run, or go on with it (also: without `start`)")
    start.add_argument("config", type=Path, metavar="run.toml")
    start.add_argument("--out", type=Path, default=_FOLDER, help="the coordinator's folder")

    _on_folder(commands, add, "status", _status, "how the run stands, and who is online")
    invite = _on_folder(commands, add, "invite", _invite, "print an invitation for a participant")
    invite.add_argument("name", help="what to call the participant")
    invite.set_defaults(secret=True)  # an invitation is a password

    _on_folder(commands, add, "clients", _clients, "list participants")
    for name, about in (
        ("approve", "let a participant in, once its fingerprint is compared"),
        ("suspend", "refuse a participant until `readmit`"),
        ("readmit", "let a suspended participant in again"),
        ("revoke", "refuse a participant's key for good"),
        ("withdraw", "retract what a participant has contributed, and refuse its key"),
    ):
        change = _on_folder(commands, add, name, _CHANGES[name], about)
        change.add_argument("name")
        if name == "approve":
            change.add_argument("--fingerprint", default="", help="approve only this key")

    log = _on_folder(commands, add, "log", _log, "print the audit trail: who did what, and when")
    log.add_argument("--last", type=positive, default=50, help="so many lines")
    _on_folder(commands, add, "pause", _pause, "begin no further round until `resume`")
    _on_folder(commands, add, "resume", _resume, "go on after `pause`")

    backup = _on_folder(commands, add, "backup", _backup, "write everything into one file")
    backup.add_argument("file", type=Path)
    restore = add(commands, "restore", _restore, "unpack a backup into an empty folder")
    restore.add_argument("file", type=Path)
    restore.add_argument("--folder", type=Path, default=_FOLDER)


def _on_folder(commands: Any, add: Add, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser = add(commands, name, run, about)
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="the coordinator's folder")
    return parser


def positive(text: str) -> int:
    """An argument that counts from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


def _start(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.coordinator_daemon import check_settings
    from .server.coordinator_home import CoordinatorHome

    config, disk, home = load(options.config), Disk(), CoordinatorHome(options.out.resolve())
    check_settings(config)
    home.make(disk)
    with locked(home.lock, "a coordinator runs there: `meadow coordinator status`"):
        finished = _served(config, home, disk, console)
    screen = Console()
    if finished:
        screen.print(f"adapter: {home.run / 'adapter'}", soft_wrap=True, highlight=False)
    else:
        screen.print("stopped; the same command goes on", soft_wrap=True, highlight=False)
    return {"finished": finished, "folder": str(home.folder)}


def _served(config: Config, home: Any, disk: Disk, console: Console) -> bool:
    """Work on the run until it is finished, or until somebody asks to stop."""
    from .identity import own_identity
    from .peft_adapters.blueprint import open_blueprint
    from .server.coordinator_daemon import CoordinatorDaemon
    from .server.flower_engine import FlowerEngine
    from .server.run_beginning import begin, check_deployable

    with Display(console) as display:
        display.enter("preparing")
        blueprint = open_blueprint(config.model)
        check_deployable(config, blueprint)
        bundle = FlowerEngine(home.flower, disk).bundle_digest()
        if begin(home, config, blueprint, bundle, own_identity(), disk):
            console.print("the terms have changed: every participant has to `meadow client agree`")
        if home.finished.exists():
            return True
        daemon = CoordinatorDaemon(home, config, display)
        display.enter("starting")

        def opened() -> None:
            _print_invitations(home, config)
            display.enter("paused" if home.paused.exists() else "waiting for participants")

        with stoppable() as stopped:
            return daemon.run(lambda: bool(stopped), opened)


def _print_invitations(home: Any, config: Config) -> None:
    from .server.coordinator_daemon import not_invited
    from .server.roster import Roster

    screen = Console(markup=False, highlight=False, soft_wrap=True)
    with Roster.open(home.roster) as roster:
        names = not_invited(config, roster)
    for name in names:
        text = make_invitation(home, config, name)
        screen.print(f"invitation for {name} (send it as you would a password):")
        screen.print(f"  meadow client join {text} --data FOLDER")


def make_invitation(home: Any, config: Config, name: str) -> str:
    """A new invitation's text, which is kept nowhere."""
    from .server.authority import Authority
    from .server.coordinator_daemon import public_addresses
    from .server.roster import Roster

    seconds = config.coordinator.invitation_hours * 3600
    trusted = Authority.open(home.authority).certificate.decode()
    authority = b"" if config.coordinator.certificate else PEM_cert_to_DER_cert(trusted)
    with Roster.open(home.roster) as roster:
        token = roster.invite(name, seconds)
    invitation = Invitation(
        normal_name(name),
        tuple(public_addresses(config)),
        authority,
        token,
        int(time.time() + seconds),
    )
    return invitation.text()


def _invite(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    home, config = _opened(options)
    text = make_invitation(home, config, options.name)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return {"name": options.name, "invitation": text}


def _status(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.coordinator_status import status_of

    home, _ = _opened(options)
    found = status_of(home)
    screen = Console(markup=False, highlight=False, soft_wrap=True)
    states = ("finished", "paused") if found["finished"] else ("running", "paused")
    said = [state for state in states if found[state]] or ["not running"]
    screen.print(f"{found['folder']}: {', '.join(said)}")
    screen.print(f"round {found['round']} of {found['rounds']} is closed{_losses(found)}")
    for person in found["participants"]:
        heard = f"last heard of {_day(person['seen'])}" if person["seen"] else "never heard of"
        online = "online" if person["online"] else heard
        screen.print(f"  {person['name']:<20} {person['status']:<10} {online}")
    for note in found["asked"]:
        screen.print(f"{_day(note['time'])}  {note['name']}: {note['kind']} {note['text']}")
    for event in found["events"]:
        screen.print(f"{_day(event['time'])}  {event['text']}")
    return found


def _losses(found: dict[str, Any]) -> str:
    if found["loss"] is None:
        return ""
    return f"; held-out loss {found['base_loss']:.4f} at first, {found['loss']:.4f} now"


def _clients(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from .server.coordinator_status import status_of

    home, _ = _opened(options)
    people: list[dict[str, Any]] = status_of(home)["participants"]
    screen = Console(markup=False, highlight=False, soft_wrap=True)
    screen.print(_row("name", "status", "fingerprint", "last heard of", "certificate until"))
    for person in people:
        seen, until = _day(person["seen"]), _day(person["certificate_expires"])
        screen.print(_row(person["name"], person["status"], person["fingerprint"], seen, until))
    return people


def _row(name: str, status: str, fingerprint: str, seen: str, until: str) -> str:
    """One participant in one line: a fingerprint is read aloud, and compared, as a whole."""
    return f"{name:<20} {status:<10} {fingerprint:<39}  {seen:<16}  {until}".rstrip()


def _approve(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.coordinator_daemon import approve, require_fingerprint
    from .server.flower_engine import FlowerEngine
    from .server.roster import Roster

    home, _ = _opened(options)
    with Roster.open(home.roster) as roster:
        if options.fingerprint:
            require_fingerprint(roster, options.name, options.fingerprint)
        approve(roster, FlowerEngine(home.flower, Disk()), options.name, home.running)
        return _told(roster, options.name)


def _suspend(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    return _changed(options, lambda roster: roster.suspend(options.name))


def _readmit(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    return _changed(options, lambda roster: roster.resume(options.name))


def _revoke(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    return _changed(options, lambda roster: roster.revoke(options.name))


def _withdraw(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What `meadow client leave --withdraw` asks for, for who cannot ask any more."""
    from .server.deployment import read_inbox
    from .server.roster import Roster

    home, _ = _opened(options)
    with Roster.open(home.roster) as roster:
        roster.withdraw(options.name)
    screen = Console(markup=False, highlight=False, soft_wrap=True)
    if is_held(home.server_app_lock):
        screen.print("before a round is combined again the contributions are deleted")
    else:
        read_inbox(home, lambda event: screen.print(event.data["text"]))
    return {"name": options.name}


_CHANGES = {
    "approve": _approve,
    "suspend": _suspend,
    "readmit": _readmit,
    "revoke": _revoke,
    "withdraw": _withdraw,
}


def _changed(options: argparse.Namespace, change: Callable[[Any], Any]) -> dict[str, Any]:
    from .server.roster import Roster

    home, _ = _opened(options)
    with Roster.open(home.roster) as roster:
        change(roster)
        return _told(roster, options.name)


def _told(roster: Any, name: str) -> dict[str, Any]:
    person = roster.by_name(name)
    Console().print(f"{person.name}: {person.status}", markup=False, highlight=False)
    return {"name": person.name, "status": person.status}


def _log(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from .server.roster import Roster

    home, _ = _opened(options)
    with Roster.open(home.roster) as roster:
        notes = roster.notes()[-options.last :]
    screen = Console()
    for note in notes:
        text = f"{_day(note.time)}  {note.kind:<10} {note.name:<20} {note.text}"
        screen.print(text, markup=False, highlight=False, soft_wrap=True)
    return [{"kind": note.kind, "name": note.name, "text": note.text} for note in notes]


def _pause(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    home, _ = _opened(options)
    Disk().write(home.paused, b"")
    Console().print("paused: the round that is open is finished, and no other begins")
    return {"paused": True}


def _resume(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    home, _ = _opened(options)
    if home.paused.exists():
        Disk().delete(home.paused)
    Console().print("resumed")
    return {"paused": False}


def _backup(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.coordinator_backup import backup

    home, _ = _opened(options)
    backup(home.folder, options.file)
    Console().print(f"{options.file}: keep it as you would a password", soft_wrap=True)
    return {"file": str(options.file)}


def _restore(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .server.coordinator_backup import restore

    restore(options.file, options.folder)
    again = f"meadow coordinator {options.folder / 'run.toml'} --out {options.folder}"
    Console().print(f"restored; `{again}` goes on", soft_wrap=True, markup=False, highlight=False)
    return {"folder": str(options.folder)}


def _opened(options: argparse.Namespace) -> tuple[Any, Config]:
    from .server.coordinator_home import CoordinatorHome

    home = CoordinatorHome(options.folder.resolve())
    return home, home.config()


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """A list that is no longer empty once the user or the system asks to stop."""
    stopped: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    before = [(number, signal.signal(number, note)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield stopped
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def with_start(arguments: Sequence[str]) -> list[str]:
    """`meadow coordinator run.toml` is `meadow coordinator start run.toml`."""
    given = list(arguments)
    if given[:1] == ["coordinator"] and given[1:] and given[1].endswith((".toml", "-out", "-json")):
        given.insert(1, START)
    return given
