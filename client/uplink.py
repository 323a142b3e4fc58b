"""The forwarder's way to the gateway: follows the membership as it changes, renews the certificate,
and puts the coordinator's time in place of this machine's.

What a SuperNode is told of the gateway's own refusals is "not available now": it then asks again,
whereas it ends itself on 401 and drops its message on 403.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ..closeable import Closeable
from ..errors import GatewayError
from ..fleet_routes import ACTIVATE, DEACTIVATE, REFUSAL, REQUEST_HEADERS
from ..identity import Identity
from ..store import Disk, explained
from .departure import departure
from .flower_key import FlowerKey
from .gateway_client import Enrolment, Exchanged, GatewayClient, good
from .gateway_connection import Answer
from .home import MEMBERSHIP
from .membership import Membership

log = logging.getLogger(__name__)

RENEW_AT = 2 / 3
"""Of a certificate's life."""
_FINAL = (400, 404, 411, 413, 417)  # asking again would change nothing

Stamp = tuple[int, ...]


class Uplink(Closeable):
    """One participant's.  Threads may share it."""

    def __init__(
        self,
        folder: Path,
        identity: Path,
        key: FlowerKey,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
        exchanged: Exchanged = lambda path, status, up, down: None,
    ) -> None:
        """`folder` is the participant's, `identity` the file of its Ed25519 key, `clock` this
        machine's; `exchanged` is told of all that goes to the gateway."""
        self._folder, self._identity, self._key = folder, identity, key
        self._disk, self._clock, self._exchanged = disk or Disk(), clock, exchanged
        self._lock = threading.Lock()
        self._client: GatewayClient | None = None
        self._stamp: Stamp = ()
        self._closed = False

    def close(self) -> None:
        """Who still asks is refused: nobody would close what is opened from now on."""
        with self._lock:
            self._closed = True
            if self._client is not None:
                self._client.close()

    def fleet(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """The SuperLink's answer to one of Flower's requests.

        Raises GatewayError where the gateway cannot be reached or refuses for now, other errors of
        meadow where the participant's folder cannot be used.
        """
        client = self.client()
        kept = {name: headers[name] for name in REQUEST_HEADERS if name in headers}
        if path == ACTIVATE:
            self._depart(client, kept)
        answer = client.signed("POST", path, body, kept | self._key.headers(client.now()))
        if answer.status == 401 and REFUSAL.lower() not in answer.headers:
            client.open_session(client.session)  # one of the clocks was set anew
            answer = client.signed("POST", path, body, kept | self._key.headers(client.now()))
        return _passed(answer)

    def _depart(self, client: GatewayClient, kept: dict[str, str]) -> None:
        """Take leave for the SuperNode before this one; no harm where it did so itself."""
        if node := client.membership.node_id:
            body, headers = departure(int(node)), kept | self._key.headers(client.now())
            client.signed("POST", DEACTIVATE, body, headers)

    def refusal(self, round: int, reason: str) -> None:
        """Tell the coordinator; one that cannot be reached reads it nowhere."""
        try:
            self.client().refusal(round, reason)
        except GatewayError as error:
            log.warning("the coordinator was not told: %s", error)

    def renew_if_due(self) -> bool:
        """Get another certificate in the last third of the old one's life; whether that was so.

        Where one has expired, by this machine's clock, the invitation's token is shown again.
        """
        membership = Membership.load(self._folder)
        begins, ends = membership.lifetime()
        due = begins + RENEW_AT * (ends - begins)
        if self._clock() < ends and self.client().now() < due:
            return False
        found = self._again(membership) if self._clock() >= ends else self.client().renew()
        if not found.certificate:
            raise GatewayError(f"the coordinator says that {found.name} is {found.status}")
        return self._keep(found.certificate, membership.certificate)

    def _keep(self, new: str, old: str) -> bool:
        """Put a certificate in the place of an old one, unless that was replaced meanwhile: by one
        for another key, perhaps."""

        def renewed(now: Membership) -> Membership:
            return now.with_certificate(new) if now.certificate == old else now

        kept = Membership.change(self._folder, self._disk, renewed).certificate == new
        log.info(
            "the certificate was renewed" if kept else "the certificate was replaced meanwhile"
        )
        return kept

    def client(self) -> GatewayClient:
        """The client for the membership and the key as they are now.

        Raises GatewayError once the uplink is closed.
        """
        with self._lock:
            if self._closed:
                raise GatewayError("the forwarder is ending")
            stamp = (*_look(self._folder / MEMBERSHIP), *_look(self._identity))
            if self._client is None or stamp != self._stamp:
                membership = Membership.load(self._folder)
                identity = Identity.load_or_create(self._identity, self._disk)
                old, self._client = self._client, self._talk(membership, identity)
                self._stamp = stamp
                if old is not None:
                    old.close()
            return self._client

    def _again(self, membership: Membership) -> Enrolment:
        identity = Identity.load_or_create(self._identity, self._disk)
        with self._talk(membership.with_certificate(""), identity) as client:
            return client.enrol(self._key.public_pem)

    def _talk(self, membership: Membership, identity: Identity) -> GatewayClient:
        return GatewayClient(membership, identity, exchanged=self._exchanged)


def _passed(answer: Answer) -> Answer:
    """The answer, unless the gateway refuses in a way that may pass.  Raises GatewayError."""
    if REFUSAL.lower() in answer.headers and answer.status not in _FINAL:
        good(answer)
    return answer


def _look(path: Path) -> Stamp:
    with explained(path):
        found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
