"""The book holds one signed entry per member, and no address that is not one."""

from __future__ import annotations

import pytest
from loopback_peers import identity

from meadow.client.address_book import AddressBook, Contact
from meadow.client.peer_tls import certificate_of, pem_of
from meadow.errors import FormatError, IdentityError

ADA, BOB = certificate_of(identity(1)), certificate_of(identity(2))


def test_members_are_found_by_name_and_by_certificate() -> None:
    book = AddressBook()
    assert book.find(ADA.peer) is None and book.owner(pem_of(ADA.der)) is None
    book.put(ADA.peer, ADA.der, "ada.example:7070")
    book.put(BOB.peer, BOB.der, "")
    assert book.find(ADA.peer) == Contact(ADA.peer, pem_of(ADA.der), "ada.example:7070")
    assert book.owner(pem_of(BOB.der)) == BOB.peer
    assert book.certificates() == (2, pem_of(ADA.der) + pem_of(BOB.der))


def test_a_certificate_is_known_whatever_its_line_breaks() -> None:
    book = AddressBook()
    book.put(ADA.peer, ADA.der, "")
    first, *middle, last = pem_of(ADA.der).decode().split("\n")[:-1]
    joined = "\n".join([first, "".join(middle), last]) + "\n"
    assert joined.encode() != pem_of(ADA.der)
    assert book.owner(joined.encode()) == ADA.peer


def test_the_version_changes_with_the_certificates_only() -> None:
    book = AddressBook()
    book.put(ADA.peer, ADA.der, "ada.example:7070")
    book.put(ADA.peer, ADA.der, "moved.example:7071")
    assert book.version == 1
    found = book.find(ADA.peer)
    assert found is not None and found.address == "moved.example:7071"
    book.put(BOB.peer, BOB.der, "")
    assert book.version == 2


def test_another_peer_s_certificate_is_refused() -> None:
    book = AddressBook()
    with pytest.raises(IdentityError, match="TLS certificate"):
        book.put(ADA.peer, BOB.der, "ada.example:7070")
    assert book.find(ADA.peer) is None and book.certificates() == (0, b"")


@pytest.mark.parametrize("address", ["peer.example.org", "host:0", "unix:/run/x:7070"])
def test_what_is_no_address_is_refused(address: str) -> None:
    book = AddressBook()
    with pytest.raises(FormatError, match="host:port"):
        book.put(ADA.peer, ADA.der, address)
    assert book.find(ADA.peer) is None
