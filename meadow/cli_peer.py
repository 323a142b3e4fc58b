"""`meadow peer …`: a run without a coordinator."""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from .address import split_address
from .cli_peer_replay import FOLDER, add_replay, ledger_of, read_file
from .config import Config, load
from .display import Display
from .errors import ConfigError, DataError, FormatError, IdentityError
from .events import Event, Observer
from .interruption import until_interrupted

Add = Callable[..., argparse.ArgumentParser]
_ENDING = "ending after the record at hand; once more: at once, without that record"


def add_commands(commands: Any, add: Add, positive: Callable[[str], int]) -> None:
    """The sub-commands of `meadow peer`; `add(commands, name, run, about)` makes one, and
    `positive` reads a number of at least 1."""
    card = add(commands, "card", _card, "print what others need to know of this machine")
    card.add_argument("--address", default="", help="host:port by which others reach it")
    card.add_argument("--out", type=Path, help="also write the card there")

    charter = add(commands, "charter", _charter, "found a run: write its signed charter")
    charter.add_argument("config", type=Path, metavar="run.toml")
    charter.add_argument(
        "--founder", type=Path, action="append", default=[], help="another founder's card"
    )
    charter.add_argument("--out", type=Path, default=Path("charter.json"), metavar="charter.json")

    join = add(commands, "join", _join, "write a request to join a run, for a member to sign")
    join.add_argument("config", type=Path, metavar="run.toml", help="names the charter")
    join.add_argument("--out", type=Path, default=Path("join.request"))

    introduce = add(commands, "introduce", _introduce, "sign a request, so that its peer can join")
    introduce.add_argument("request", type=Path)
    introduce.add_argument("--folder", type=Path, required=True, help="my peer's folder")

    run = add(commands, "run", _run, "train on this machine's text, and gossip")
    run.add_argument("config", type=Path, metavar="run.toml")
    run.add_argument("--out", type=Path, help="the peer's folder (default: peers/NAME)")

    add_replay(commands, add)

    verify = add(commands, "verify", _verify, "measure some of my own records again")
    verify.add_argument("config", type=Path, metavar="run.toml")
    verify.add_argument("--folder", type=Path, required=True, help="my peer's folder")
    verify.add_argument("--records", type=positive, default=3, help="how many, at random")

    demo = add(commands, "demo", _demo, "five peers on this machine; one is killed, one joins late")
    demo.add_argument("--out", type=Path, default=Path("meadow-peers"))


def _card(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    member = _own_member(options.address)
    text = json.dumps(member.to_json(), indent=1)
    if options.out is not None:
        _write(options.out, text.encode())
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return dict(member.to_json())


def _own_member(address: str) -> Any:
    from .client.peer_tls import certificate_of
    from .identity import own_identity
    from .strategies.charter import Member

    certificate = certificate_of(own_identity())
    member = Member(certificate.peer, certificate.der, address)
    _refuse_uncallable(member)
    return member


def _refuse_uncallable(member: Any) -> None:
    """Raise IdentityError or FormatError for a member to whom no peer could connect."""
    from .client.peer_tls import check_certificate

    check_certificate(member.peer, member.certificate)
    if member.address:
        split_address(member.address)


def _charter(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.peer_terms import draft, refuse_other_place, terms_of
    from .client.workbench import open_workbench
    from .identity import own_identity
    from .peft_adapters.pool_size import warnings_of

    config = load(options.config)
    terms_of(config)
    refuse_other_place(config)
    if options.out.exists():
        raise ConfigError(f"{options.out} exists", "name another file with --out")
    own = _own_member(config.peer.address or config.peer.listen)
    members = {member.peer: member for member in (own, *map(_read_card, options.founder))}
    with Display(console) as display:
        display.enter("loading the base")
        bench = open_workbench(config)
        charter = draft(config, bench, members.values(), secrets.token_hex(32))
        for warning in warnings_of(charter.pool.rank, charter.pool.sites):
            display(Event("notice", 0, {"text": warning}))
    _write(options.out, charter.sign(own_identity()))
    founders = [member.peer.hex() for member in charter.founders]
    Console().print(
        f"wrote {options.out}: run {charter.pool.run_id[:16]}, {len(founders)} founders; give it to"
        " all of them",
        soft_wrap=True,
    )
    return {"path": str(options.out), "run": charter.pool.run_id, "founders": founders}


def _read_card(path: Path) -> Any:
    from .strategies.charter import Member

    hint = "`meadow peer card` writes one"
    try:
        member = Member.from_json(json.loads(read_file(path, hint)))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is no card", hint) from error
    _refuse_uncallable(member)
    return member


def _join(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.peer_terms import refuse_other_place
    from .identity import own_identity
    from .strategies.introductions import JoinRequest

    config = load(options.config)
    refuse_other_place(config)
    charter, _ = _read_charter(config, options.config)
    own = _own_member(config.peer.address or config.peer.listen)
    if own.peer in {member.peer for member in charter.founders}:
        raise ConfigError("this machine is a founder of the run", "`meadow peer run` takes part")
    request = JoinRequest.sign(own_identity(), charter.run, own.certificate, own.address)
    _write(options.out, request.encoded)
    Console().print(
        f"wrote {options.out}: a member of the run has to sign it", markup=False, soft_wrap=True
    )
    return {"path": str(options.out), "peer": own.peer.hex()}


def _introduce(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.peer import CHARTER, INBOX
    from .client.peer_inbox import SUFFIX
    from .identity import own_identity
    from .strategies.charter import Charter
    from .strategies.introductions import Introduction, JoinRequest

    _refuse_others_folder(options.folder)
    charter = Charter.read(read_file(options.folder / CHARTER, FOLDER))
    request = JoinRequest.decode(
        read_file(options.request, "`meadow peer join` writes one"), charter.run
    )
    _refuse_uncallable(request.member)
    introduction = Introduction.sign(own_identity(), request)
    name = request.member.peer.hex()
    _write(options.folder / INBOX / f"{name}{SUFFIX}", introduction.encoded)
    Console().print(
        f"introduced {name[:16]}; the peer of {options.folder} tells the others",
        markup=False,
        soft_wrap=True,
    )
    return {"peer": name, "introducer": introduction.introducer.hex()}


def _refuse_others_folder(folder: Path) -> None:
    """Raise IdentityError unless the folder is that of this user's own peer."""
    from .client.record_store import owner_of
    from .identity import HOME, own_identity
    from .strategies.peer_keys import peer_of

    owner, own = owner_of(folder), peer_of(own_identity())
    if owner != own:
        raise IdentityError(
            f"{folder} is the folder of peer {owner.hex()[:16]}, and this is {own.hex()[:16]}",
            f"set {HOME} to the folder of that peer's key",
        )


def _run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.peer import Peer
    from .client.peer_steps import Stepper
    from .client.peer_terms import refuse_other_place, refuse_other_terms
    from .client.workbench import open_workbench
    from .identity import own_identity

    config = load(options.config)
    charter, charter_file = _read_charter(config, options.config)
    refuse_other_terms(config, charter)
    refuse_other_place(config)
    folder = options.out or Path("peers") / options.config.stem
    with Display(console) as display:
        display.enter("loading")
        silo = _own_silo(config)
        bench = open_workbench(config)
        person, cut = bench.encode(silo, config)
        if cut:
            display(Event("notice", 0, {"text": f"rows longer than max_length, cut: {cut}"}))
        stepper = Stepper(config, charter, own_identity(), bench, person, display.advance)
        observer = _narrated(display)
        with Peer(charter_file, own_identity(), stepper, bench, folder, observer) as peer:
            with until_interrupted(peer.stop, lambda: display.enter(_ENDING)):
                peer.start()
                display.enter("training and gossiping; Ctrl-C ends it, the same command goes on")
                peer.work()
                peer.report()
            return {"folder": str(folder), "truncated": cut, **peer.status()}


def _narrated(display: Display) -> Observer:
    """The display, told of a peer's events in words."""

    def tell(event: Event) -> None:
        data = event.data
        loss = f"{data['loss']:.4f}" if "loss" in data else "not measured"
        if event.kind == "record":
            display.enter(f"record {event.round}: training loss {loss}")
        elif event.kind == "measured":
            text = f"{data['records']} records, held-out loss {loss}"
            display.enter(f"state {data['state'][:16]}: {text}")
        elif event.kind == "listening":
            display.enter(f"listening at {data['address']}")
        else:
            display(event)

    return tell


def _own_silo(config: Config) -> Any:
    """The rows that this peer trains on: one participant's, or all of the source's as one."""
    from .client.data import Silo, silos_of

    silos = silos_of(config)
    wanted = config.peer.participant
    if wanted:
        names = [silo.client for silo in silos]
        if wanted not in names:
            raise DataError(
                f"[peer] participant = {wanted!r} has no rows", f"known: {', '.join(names)}"
            )
        return silos[names.index(wanted)]
    return Silo(
        "",
        tuple(row for silo in silos for row in silo.train),
        tuple(row for silo in silos for row in silo.held_out),
    )


def _read_charter(config: Config, path: Path) -> tuple[Any, bytes]:
    """The charter that the run.toml at `path` names, relative to itself, and its bytes."""
    from .strategies.charter import Charter

    hint = "[peer] charter names it; one of the run's founders has it"
    data = read_file(path.parent / config.peer.charter, hint)
    return Charter.read(data), data


def _verify(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .client.peer_audit import audit
    from .client.peer_steps import Stepper
    from .client.workbench import open_workbench
    from .identity import own_identity

    config = load(options.config)
    _refuse_others_folder(options.folder)
    ledger = ledger_of(options.folder)
    with Display(console) as display:
        display.enter("loading")
        bench = open_workbench(config)
        person, _ = bench.encode(_own_silo(config), config)
        stepper = Stepper(config, ledger.charter, own_identity(), bench, person, display.advance)
        display.enter("measuring again")
        rows = list(audit(stepper, ledger, options.folder, options.records, Random()))
    for row in rows:
        Console().print(
            f"record {row.sequence}: {row.equal} of {row.steps} bytes are the same,"
            f" the others differ by at most {row.worst}"
        )
    return {"records": [vars(row) for row in rows]}


def _demo(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from .simulation import peer_demo

    with Display(console) as display:
        report = peer_demo.run(options.out, display.enter)
    screen = Console()
    for line in peer_demo.lines(report):
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    return report


def _write(path: Path, data: bytes) -> None:
    """In one piece: a peer at work may be looking at the folder."""
    from .store import Disk

    Disk().folder(path.parent)
    Disk().write(path, data)
