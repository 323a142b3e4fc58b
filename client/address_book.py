"""Who may connect, and where to find them: the certificates and addresses of the members.

The network's view of the membership.  Which introductions count is decided elsewhere; here a
member's newest entry replaces an older one, and no certificate enters that its peer did not sign.
Threads may share a book; it can grow while connections are open.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass

from ..address import split_address
from .peer_tls import check_certificate, pem_of


@dataclass(frozen=True)
class Contact:
    """A member as the network needs it."""

    peer: bytes
    """Raw Ed25519 public key, 32 bytes."""
    certificate: bytes
    """PEM."""
    address: str
    """"host:port", or "" for a peer that calls others and cannot be called."""


class AddressBook:
    """Contacts by peer and by certificate."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contacts: dict[bytes, Contact] = {}
        self._owners: dict[bytes, bytes] = {}  # PEM -> peer
        self._version = 0

    def put(self, peer: bytes, certificate: bytes, address: str) -> None:
        """Add a member (certificate in DER), or replace what was known of it.

        Raises IdentityError for a certificate that is not this peer's, FormatError for an address
        that is not one.
        """
        check_certificate(peer, certificate)
        if address:
            split_address(address)
        contact = Contact(peer, pem_of(certificate), address)
        with self._lock:
            old = self._contacts.get(peer)
            if old is not None and old.certificate != contact.certificate:
                del self._owners[old.certificate]
            self._contacts[peer] = contact
            self._owners[contact.certificate] = peer
            self._version += old is None or old.certificate != contact.certificate

    def find(self, peer: bytes) -> Contact | None:
        """The entry of a member; None for a stranger."""
        with self._lock:
            return self._contacts.get(peer)

    def owner(self, pem: bytes) -> bytes | None:
        """The member whose certificate this is, whatever the line breaks of the PEM."""
        normal = pem_of(ssl.PEM_cert_to_DER_cert(pem.decode("ascii")))
        with self._lock:
            return self._owners.get(normal)

    @property
    def version(self) -> int:
        """Changes exactly when the set of certificates does."""
        with self._lock:
            return self._version

    def certificates(self) -> tuple[int, bytes]:
        """Version, and all certificates (PEM, joined) in that version."""
        with self._lock:
            return self._version, b"".join(self._owners)
