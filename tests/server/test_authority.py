"""The authority: what it certifies, for how long, and that OpenSSL at its strictest agrees."""

from __future__ import annotations

import os
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from enrolment import DAY, NOON, Clock, new_identity

from meadow.certificate_request import request_certificate
from meadow.errors import ConfigError, IdentityError, InvitationError, StorageError
from meadow.identity import Identity
from meadow.server.authority import Authority, expires_at

HOSTS = ["meadow.example.org", "10.0.0.1", "2001:db8::1"]
ME = new_identity()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "authority"


@pytest.fixture
def authority(folder: Path, clock: Clock) -> Authority:
    return Authority.open(folder, clock=clock)


def read(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def value(certificate: x509.Certificate, kind: Any) -> Any:
    return certificate.extensions.get_extension_for_class(kind).value


def span(certificate: x509.Certificate) -> tuple[float, float]:
    return (
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


# --- the authority itself ----------------------------------------------------------------------


def test_it_is_made_once(folder: Path, clock: Clock, authority: Authority) -> None:
    assert Authority.open(folder, clock=clock).certificate == authority.certificate
    certificate = read(authority.certificate)
    certificate.verify_directly_issued_by(certificate)
    assert span(certificate) == (NOON - 2 * DAY, NOON + 3650 * DAY)
    assert value(certificate, x509.BasicConstraints) == x509.BasicConstraints(True, 0)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def test_its_keys_are_the_owners_alone(folder: Path, authority: Authority) -> None:
    authority.issue_server(HOSTS)
    authority.issue_local()
    for path in folder.iterdir():
        secret = b"PRIVATE" in path.read_bytes()
        assert not secret or stat.S_IMODE(path.stat().st_mode) == 0o600
        assert secret == (path.name in ("authority.key", "server.pem", "local.pem"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
@pytest.mark.parametrize("name", ["authority.key", "server.pem"])
def test_a_key_that_is_open_to_others_is_refused(
    folder: Path, clock: Clock, authority: Authority, name: str, mode: int
) -> None:
    authority.issue_server(HOSTS)
    (folder / name).chmod(mode)
    with pytest.raises(IdentityError, match="can be read by others"):
        Authority.open(folder, clock=clock).issue_server(HOSTS)


def test_a_key_that_was_lost_is_not_replaced_in_silence(folder: Path, authority: Authority) -> None:
    (folder / "authority.key").unlink()
    with pytest.raises(IdentityError, match=r"is missing.*restore"):
        Authority.open(folder)


def test_a_certificate_that_was_lost_is_made_again(folder: Path, authority: Authority) -> None:
    """Its key is the same, so what it issued still holds for who trusts the new one."""
    (folder / "authority.pem").unlink()
    again = Authority.open(folder)
    assert read(again.certificate).public_key() == read(authority.certificate).public_key()


def pem_of(key: Any) -> bytes:
    encoded: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return encoded


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("authority.key", b"", "no readable private key"),
        ("authority.key", pem_of(ed25519.Ed25519PrivateKey.generate()), "not an ECDSA key"),
        ("authority.key", pem_of(ec.generate_private_key(ec.SECP384R1())), "not an ECDSA key"),
        ("authority.key", pem_of(ec.generate_private_key(ec.SECP256R1())), "not the certificate"),
        ("authority.pem", b"", "no readable certificate"),
    ],
)
def test_damaged_files(
    folder: Path, authority: Authority, name: str, content: bytes, message: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(IdentityError, match=message):
        Authority.open(folder)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Authority.open(tmp_path / "file" / "authority")


def test_processes_that_begin_at_once_have_one_authority(folder: Path) -> None:
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                (Authority.open(folder).certificate, Authority.open(folder).issue_server(HOSTS))
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1


# --- servers -----------------------------------------------------------------------------------


def test_a_server_certificate_names_its_hosts(authority: Authority) -> None:
    pem, key = authority.issue_server(HOSTS)
    certificate = read(pem)
    names = value(certificate, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["meadow.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == HOSTS[1:]
    assert span(certificate) == (NOON - 2 * DAY, NOON + 365 * DAY)
    assert list(value(certificate, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert load_pem_private_key(key, None).public_key() == certificate.public_key()


@pytest.mark.parametrize(
    ("days", "kept"),
    [(0, True), (365 * 2 / 3 - 0.01, True), (365 * 2 / 3, False), (400, False), (-1.9, True)]
    + [(-2.1, False)],
)
def test_it_is_made_anew_at_two_thirds_of_its_life(
    folder: Path, authority: Authority, clock: Clock, days: float, kept: bool
) -> None:
    """Also where it was made by a clock that ran ahead by more than it is backdated."""
    first = authority.issue_server(HOSTS)
    clock.now += days * DAY
    if days < -2:  # the authority was made by that clock, too
        with pytest.raises(IdentityError, match="clock"):
            authority.issue_server(HOSTS)
        return
    assert (Authority.open(folder, clock=clock).issue_server(HOSTS) == first) == kept


def test_a_certificate_from_a_clock_that_ran_ahead(folder: Path, clock: Clock) -> None:
    authority = Authority.open(folder, clock=clock)
    clock.now += 100 * DAY
    ahead = authority.issue_server(HOSTS)
    clock.now = NOON
    assert authority.issue_server(HOSTS) != ahead


def test_other_hosts_make_another(authority: Authority) -> None:
    first = authority.issue_server(HOSTS)
    assert authority.issue_server([*reversed(HOSTS), HOSTS[0].upper()]) == first
    for hosts in (HOSTS[:1], [*HOSTS, "b.example"]):
        assert authority.issue_server(hosts) != first
        assert authority.issue_server(hosts) == authority.issue_server(hosts)


def test_a_pair_of_another_authority_is_not_kept(tmp_path: Path, clock: Clock) -> None:
    one, two = (Authority.open(tmp_path / name, clock=clock) for name in "ab")
    one.issue_server(HOSTS)
    (tmp_path / "a" / "server.pem").rename(tmp_path / "b" / "server.pem")
    pem, _ = two.issue_server(HOSTS)
    read(pem).verify_directly_issued_by(read(two.certificate))


def test_the_loopback_has_its_own(authority: Authority) -> None:
    pem, key = authority.issue_local()
    assert authority.issue_local() == (pem, key) != authority.issue_server(["localhost"])
    names = value(read(pem), x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


@pytest.mark.parametrize(
    "host", ["", "*.example.org", "a b", "a:1", "https://a", "-a", "a..b", "ä.example", "x" * 64]
)
def test_what_is_no_host(authority: Authority, host: str) -> None:
    with pytest.raises(ConfigError, match="no host name"):
        authority.issue_server([host])
    with pytest.raises(ConfigError, match="needs a host"):
        authority.issue_server([])


# --- participants ------------------------------------------------------------------------------


def test_a_participants_certificate(authority: Authority) -> None:
    pem = authority.issue_client("Klinikum Süd", request_certificate(ME))
    certificate = read(pem)
    certificate.verify_directly_issued_by(read(authority.certificate))
    assert certificate.public_key() == ME.public
    assert certificate.subject.rfc4514_string() == "CN=Klinikum Süd"
    assert span(certificate) == (NOON - 2 * DAY, NOON + 30 * DAY)
    assert expires_at(pem) == NOON + 30 * DAY
    assert value(certificate, x509.BasicConstraints) == x509.BasicConstraints(False, None)
    assert list(value(certificate, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_no_certificate_outlives_the_authority(authority: Authority, clock: Clock) -> None:
    clock.now += 3640 * DAY
    ends = read(authority.certificate).not_valid_after_utc
    pem = authority.issue_client("a", request_certificate(ME))
    assert read(pem).not_valid_after_utc == ends
    clock.now += 11 * DAY
    with pytest.raises(IdentityError, match="does not hold on"):
        authority.issue_client("a", request_certificate(ME))


def greedy_request() -> bytes:
    """Everything that a participant may want and must not get."""
    wanted: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=True, path_length=None), True),
        (x509.KeyUsage(True, False, False, False, False, True, True, False, False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([x509.DNSName("meadow.example.org")]), False),
        (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x"), False),
    ]
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "somebody else"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "meadow authority"),
        ]
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    for extension, critical in wanted:
        builder = builder.add_extension(extension, critical)
    builder = builder.add_attribute(x509.oid.AttributeOID.CHALLENGE_PASSWORD, b"x")
    return builder.sign(ME.private, None).public_bytes(Encoding.PEM)


def test_nothing_of_a_request_counts_but_its_key(authority: Authority) -> None:
    """Two requests of one key, the modest and the greedy, lead to the same certificate."""

    def content(pem: bytes) -> Any:
        certificate = read(pem)
        key = certificate.public_key()
        return certificate.subject, key, span(certificate), list(certificate.extensions)

    greedy, modest = greedy_request(), request_certificate(ME)
    assert content(authority.issue_client("a", greedy)) == content(
        authority.issue_client("a", modest)
    )


def test_other_keys_and_names_are_refused(authority: Authority) -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    for key in (ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)):
        with pytest.raises(IdentityError, match="Ed25519"):
            authority.issue_client("a", builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    with pytest.raises(InvitationError):
        authority.issue_client("a/b", request_certificate(ME))


# --- in a real handshake -----------------------------------------------------------------------


class Pair:
    """A client and a server that shake hands in memory, as strictly as OpenSSL can."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder = folder
        self.authority = authority
        self.serve(*authority.issue_server(HOSTS))
        self.client = self.context(ssl.PROTOCOL_TLS_CLIENT)

    def serve(self, certificate: bytes, key: bytes) -> None:
        """Show this certificate, and no other (a context keeps one for each kind of key)."""
        self.server = self.context(ssl.PROTOCOL_TLS_SERVER)
        self.server.verify_mode = ssl.CERT_REQUIRED
        self.load(self.server, certificate, key)

    def context(self, protocol: Any) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=self.authority.certificate.decode())
        return context

    def load(self, context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
        path = self.folder / "pair.pem"
        path.write_bytes(certificate + key)
        context.load_cert_chain(path)

    def shake(self, host: str) -> Any:
        """The client's certificate as the server sees it."""
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = self.client.wrap_bio(down, up, server_hostname=host)
        server = self.server.wrap_bio(up, down, server_side=True)
        open_ends = [client, server, client, server]
        for end in open_ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
        return server.getpeercert(binary_form=True)


@pytest.fixture
def now(tmp_path: Path) -> Authority:
    """An authority of the present, since OpenSSL looks at the real clock."""
    return Authority.open(tmp_path / "now")


@pytest.fixture
def pair(tmp_path: Path, now: Authority) -> Pair:
    return Pair(tmp_path, now)


def owned(identity: Identity) -> bytes:
    return pem_of(identity.private)


@pytest.mark.parametrize("host", HOSTS)
def test_both_sides_accept_each_other(pair: Pair, now: Authority, host: str) -> None:
    pem = now.issue_client("a", request_certificate(ME))
    pair.load(pair.client, pem, owned(ME))
    seen = x509.load_der_x509_certificate(pair.shake(host))
    assert seen.public_key() == ME.public


def test_a_participant_cannot_pose_as_the_coordinator(pair: Pair, now: Authority) -> None:
    """Not even one whose name is the coordinator's host."""
    pem = now.issue_client(HOSTS[0], request_certificate(ME))
    pair.load(pair.client, pem, owned(ME))
    pair.serve(pem, owned(ME))
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        pair.shake(HOSTS[0])


def test_a_participant_cannot_certify_another(pair: Pair, now: Authority) -> None:
    """A certificate that it issues with its own leads nowhere."""
    own = read(now.issue_client("a", request_certificate(ME)))
    child, (begins, ends) = new_identity(), (own.not_valid_before_utc, own.not_valid_after_utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "b")])
    forged = (
        x509.CertificateBuilder(own.subject, name, child.public, 1, begins, ends)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        .sign(ME.private, None)
    )
    chain = forged.public_bytes(Encoding.PEM) + own.public_bytes(Encoding.PEM)
    pair.load(pair.client, chain, owned(child))
    with pytest.raises(ssl.SSLError):
        pair.shake(HOSTS[0])


def test_another_authoritys_participant(pair: Pair, tmp_path: Path) -> None:
    foreign = Authority.open(tmp_path / "foreign").issue_client("a", request_certificate(ME))
    pair.load(pair.client, foreign, owned(ME))
    with pytest.raises(ssl.SSLError):
        pair.shake(HOSTS[0])


def test_another_host(pair: Pair, now: Authority) -> None:
    pair.load(pair.client, now.issue_client("a", request_certificate(ME)), owned(ME))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        pair.shake("other.example.org")


# --- the operator's own ------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Iterator[tuple[Path, Path]]:
    certificate, key = tmp_path / "fullchain.pem", tmp_path / "privkey.pem"
    pem, secret = authority.issue_server(HOSTS)
    certificate.write_bytes(pem + authority.certificate)
    key.touch(0o640)
    key.write_bytes(secret)
    yield certificate, key


def test_an_own_certificate_is_taken_as_it_is(files: tuple[Path, Path]) -> None:
    assert Authority.server_files(*files) == (files[0].read_bytes(), files[1].read_bytes())


def test_own_files_that_do_not_serve(files: tuple[Path, Path]) -> None:
    certificate, key = files
    with pytest.raises(IdentityError, match="cannot be used together"):
        Authority.server_files(key, key)
    os.chmod(key, 0o644)
    with pytest.raises(IdentityError, match="read by everybody"):
        Authority.server_files(certificate, key)
    os.chmod(key, 0o600)
    key.write_bytes(pem_of(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(IdentityError, match="cannot be used together"):
        Authority.server_files(certificate, key)
    key.unlink()
    with pytest.raises(StorageError):
        Authority.server_files(certificate, key)
