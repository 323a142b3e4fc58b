"""Flower's own SuperLink and SuperNode, with gateway and forwarder between them, as processes."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from gateways import Person, Quick, home

from meadow.client.membership import Membership
from meadow.flower_commands import environment, program, run
from meadow.invitation import Invitation
from meadow.processes import free_port
from meadow.server.authority import Authority
from meadow.server.roster import Roster


@contextmanager
def started(
    name: str, command: Sequence[str], folder: Path, variables: dict[str, str]
) -> Iterator[Path]:
    """A process that is asked to end when the block does; its output's file."""
    said = folder / f"{name}.log"
    with said.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield said
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def until(condition: Callable[[], bool], what: str, logs: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        texts = "\n".join(path.read_text()[-2000:] for path in logs.glob("*.log"))
        assert time.monotonic() < end, f"{what} did not happen:\n{texts}"
        time.sleep(0.1)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
def test_a_supernode_comes_online_and_nothing_but_the_fleet_is_there(tmp_path: Path) -> None:
    folder, variables = tmp_path, environment(tmp_path / "flwr")
    authority = Authority.open(folder / "authority", Quick())
    certificate, key = authority.issue_local()
    (folder / "ca.pem").write_bytes(authority.certificate)
    (folder / "superlink.pem").write_bytes(certificate)
    (folder / "superlink.key").write_bytes(key)
    (folder / "secret").write_bytes(os.urandom(32))
    (folder / "secret").chmod(0o600)
    port = free_port()
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "site"\n\n[superlink.site]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{folder / "ca.pem"}"\n'
    )
    superlink = [
        program("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(port), "--database", str(folder / "state.db")),
        *("--ssl-ca-certfile", str(folder / "ca.pem")),
        *("--ssl-certfile", str(folder / "superlink.pem")),
        *("--ssl-keyfile", str(folder / "superlink.key")),
        *("--superexec-auth-secret-file", str(folder / "secret")),
        *("--isolation", "process", "--enable-supernode-auth"),
    ]
    gateway = [
        *(sys.executable, "-m", "meadow.server.gateway", "--folder", str(folder)),
        *("--listen", "127.0.0.1:0", "--superlink", f"127.0.0.1:{port}"),
        *("--superlink-authority", str(folder / "ca.pem"), "--ready", str(folder / "gw.port")),
    ]
    with (
        started("superlink", superlink, folder, variables),
        started("gateway", gateway, folder, {}),
        Roster.open(folder / "roster.db") as roster,
    ):
        until(lambda: listens(port) and (folder / "gw.port").exists(), "the start", folder)
        address = f"127.0.0.1:{(folder / 'gw.port').read_text()}"
        der = ssl.PEM_cert_to_DER_cert(authority.certificate.decode())
        invitation = Invitation("anna", (address,), der, roster.invite("anna", 600), 2**40)
        person = Person(Membership.of(invitation))
        with person.client() as client:
            client.enrol(person.flower.public_pem)
            public = person.flower.private.public_key()
            (folder / "anna.pub").write_bytes(
                public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            )
            register = ["supernode", "register", str(folder / "anna.pub"), "site"]
            node = int(run(register, variables, folder)["node-id"])
            roster.approve("anna", node)
            found = client.enrol(person.flower.public_pem)
        person.membership = person.membership.with_certificate(found.certificate)
        own = home(folder / "anna" / "home", person)
        (folder / "anna" / "identity.pem").write_bytes(
            (folder / "anna" / "home-identity.pem").read_bytes()
        )
        (folder / "anna" / "identity.pem").chmod(0o600)
        forwarder = [
            *(sys.executable, "-m", "meadow.client.forwarder", "--folder", str(own)),
            *("--bundle", str(folder / "anna" / "bundle.fab"), "--ready", str(own / "fw.port")),
        ]
        with started("forwarder", forwarder, folder, {"MEADOW_HOME": str(folder / "anna")}):
            until(lambda: (own / "fw.port").exists(), "the forwarder's start", folder)
            supernode = [
                program("flower-supernode"),
                *("--superlink", f"127.0.0.1:{(own / 'fw.port').read_text()}"),
                *("--root-certificates", str(own / "forwarder-authority.pem")),
                *("--auth-supernode-private-key", str(own / "flower-key")),
                *("--port", str(free_port())),
            ]
            node_home = environment(folder / "node")

            def status() -> str:
                rows = run(["supernode", "list", "site"], variables, folder)["nodes"]
                return str({int(row["node-id"]): row["status"] for row in rows}[node])

            with started("supernode", supernode, folder, node_home):
                until(lambda: status() == "online", "the SuperNode's coming online", folder)
                until(
                    lambda: "pull-messages" in (own / "traffic.jsonl").read_text(),
                    "a question for messages",
                    folder,
                )
                with person.client() as client:
                    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs"):
                        answer = client.signed("POST", path, b"", person.headers(client))
                        assert answer.status == 404
            until(lambda: status() == "offline", "its going offline", folder)
