"""A forwarder whose gateway or SuperLink is away, moves, fails or is slow, and one that is started
again: what passes is waited for, and what stays is told.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from forwarders import Local, local
from gateways import PULL, RUN, Quick, Site, home, site

from meadow.client import forwarder as forwarding
from meadow.fleet_routes import FLEET, HEARTBEAT

pytest_plugins = ("forwarder_fixtures",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("coordinator")) as running:
        yield running


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for as long as in earnest."""
    monkeypatch.setattr(forwarding, "PATIENCE", 1.5)


def test_a_gateway_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        with local(place, anna, home(tmp_path / "home", anna)) as machine:
            assert machine.ask().status_code == 200
            place.stop()
            back = threading.Timer(1.0, place.restart)
            back.start()
            answer = machine.ask()
            back.join()
            assert (answer.status_code, answer.content) == (200, b"answer to question")


def test_a_failure_that_passes_is_not_told(tmp_path: Path) -> None:
    """A SuperNode would take it for its answer, and drop what it was sending."""
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        with local(place, anna, home(tmp_path / "home", anna)) as machine:
            place.superlink.answers[RUN] = (500, b"database is locked")
            mended = threading.Timer(1.0, place.superlink.answers.clear)
            mended.start()
            answer = machine.ask()
            mended.join()
            assert (answer.status_code, answer.content) == (200, b"answer to question")


@pytest.mark.usefixtures("patient")
def test_a_failure_that_stays_is_told(tmp_path: Path) -> None:
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        with local(place, anna, home(tmp_path / "home", anna)) as machine:
            place.superlink.answers[RUN] = (500, b"database is locked")
            assert machine.ask().status_code == 500
            assert sum(seen.path == RUN for seen in place.superlink.seen) > 1


@pytest.mark.usefixtures("patient")
def test_while_the_gateway_is_away_the_supernode_is_told_to_ask_again(tmp_path: Path) -> None:
    """503: on 401 a SuperNode would end itself, on 403 forget its message."""
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        with local(place, anna, home(tmp_path / "home", anna)) as machine:
            assert machine.ask().status_code == 200
            place.stop()
            for path in (RUN, HEARTBEAT):
                answer = machine.ask(path)
                assert answer.status_code == 503 and "cannot be reached" in answer.json()["error"]
            place.restart()
            assert machine.ask().status_code == 200


def test_who_is_suspended_waits(place: Site, tmp_path: Path) -> None:
    person = place.participant("paused")
    with local(place, person, home(tmp_path / "home", person)) as machine:
        place.roster.suspend("paused")
        answer = machine.ask()
        assert answer.status_code == 503 and "suspended" in answer.json()["error"]
        place.roster.resume("paused")
        assert machine.ask().status_code == 200


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_the_superlinks_own_word_reaches_the_supernode(machine: Local, status: int) -> None:
    machine.place.superlink.answers[RUN] = (status, b'{"detail": "because"}')
    try:
        answer = machine.ask()
    finally:
        del machine.place.superlink.answers[RUN]
    assert (answer.status_code, answer.content) == (status, b'{"detail": "because"}')


def test_doubts_about_the_time_are_cleared_up_once(machine: Local) -> None:
    """A SuperLink's 401 may be about the clock: a new session tells the time anew."""
    machine.place.superlink.answers[RUN] = (401, b"{}")
    before = len(machine.place.superlink.seen)
    try:
        assert machine.ask().status_code == 401
    finally:
        del machine.place.superlink.answers[RUN]
    assert len(machine.place.superlink.seen) == before + 2


def test_signs_of_life_keep_the_supernode_waiting(
    machine: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exchange may take longer than Flower's time-outs, as on a slow link."""
    monkeypatch.setattr(forwarding, "_SIGN_OF_LIFE", 0.1)
    timer = threading.Timer(1.2, lambda: machine.place.superlink.messages.append(b"late"))
    timer.start()
    machine.http.timeout = httpx.Timeout(0.6)
    try:
        assert machine.ask(PULL).content == b"late"
    finally:
        timer.join()
        machine.http.timeout = httpx.Timeout(30)
        machine.ask(FLEET + "confirm-message-received")


def test_a_coordinator_that_moved_is_followed(tmp_path: Path) -> None:
    with site(tmp_path / "coordinator") as place:
        anna = place.participant("anna")
        folder = home(tmp_path / "home", anna)
        with local(place, anna, folder) as machine:
            assert machine.ask().status_code == 200
            old = place.address
            place.stop()
            place.move()
            assert place.address != old
            replace(anna.membership, addresses=(old, place.address)).save(folder, Quick())
            assert machine.ask().status_code == 200


def test_the_port_and_the_certificate_survive_a_restart(place: Site, tmp_path: Path) -> None:
    """A SuperNode that was not restarted finds the forwarder again."""
    person = place.participant("steady")
    folder = home(tmp_path / "home", person)
    with local(place, person, folder) as machine:
        port, trusted = machine.forwarder.port, (folder / "forwarder-authority.pem").read_bytes()
        assert (folder / "forwarder.port").read_text() == str(port)
    with local(place, person, folder) as machine:
        assert machine.forwarder.port == port
        assert (folder / "forwarder-authority.pem").read_bytes() == trusted
        assert machine.ask().status_code == 200
    with socket.create_server(("127.0.0.1", port)):
        with local(place, person, folder) as machine:
            assert machine.forwarder.port not in (0, port)
