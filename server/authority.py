"""The coordinator's own certificate authority, in one folder, made on first use.

    authority.key    its ECDSA P-256 key (PKCS #8, PEM), readable to its owner alone
    authority.pem    its certificate, for ten years: what participants are told to trust
    server.pem       key and certificate of the public port
    local.pem        key and certificate of what answers on this machine's loopback

A participant's certificate serves as a client's and never as a server's, whatever its name is, and
nothing that a participant sends gets into it but its key.
"""

from __future__ import annotations

import ssl
import stat
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from ..certificate_request import requested_key
from ..errors import IdentityError
from ..file_lock import own_turn
from ..participant_name import normal_name
from ..store import Disk, explained
from .certificate_forms import (
    BACKDATED,
    HostName,
    PublicKey,
    common_name,
    host_names,
    moment_of,
    self_signed,
    unsigned,
)

SERVER_LIFE = timedelta(days=365)
CLIENT_LIFE = timedelta(days=30)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

_OWNER_ONLY = 0o600
_RESTORE = "restore the coordinator's folder from a backup"


class Authority:
    """Made by `Authority.open`.  It holds no open file; processes may share a folder."""

    def __init__(
        self,
        folder: Path,
        key: EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        disk: Disk,
        clock: Callable[[], float],
    ) -> None:
        self._folder = folder
        self._key = key
        self._certificate = certificate
        self._disk = disk
        self._clock = clock

    @classmethod
    def open(
        cls, folder: Path, disk: Disk | None = None, clock: Callable[[], float] = time.time
    ) -> Authority:
        """The authority of `folder`, made where there is none; `clock` gives Unix seconds.

        Raises IdentityError for a key that is damaged, lost, or open to others, StorageError where
        nothing can be written.
        """
        disk = disk or Disk()
        disk.folder(folder)
        with own_turn(folder / "authority.lock"):
            key = _own_key(folder, disk)
            path = folder / "authority.pem"
            if not path.exists():
                certificate = self_signed(key, clock())
                disk.write(path, certificate.public_bytes(Encoding.PEM))
            certificate = _read_certificate(path)
        if certificate.public_key() != key.public_key():
            raise IdentityError(f"{path} is not the certificate of {folder / 'authority.key'}")
        return cls(folder, key, certificate, disk, clock)

    @property
    def certificate(self) -> bytes:
        """What others have to trust (PEM)."""
        return self._certificate.public_bytes(Encoding.PEM)

    def issue_server(self, hosts: Sequence[str]) -> tuple[bytes, bytes]:
        """Certificate and key (PEM) of the public port, for host names and IP addresses.

        The same pair until two thirds of its year are over or `hosts` are others.  Raises
        ConfigError for what is no host.
        """
        return self._kept(self._folder / "server.pem", hosts)

    def issue_local(self, hosts: Sequence[str] = LOCAL_HOSTS) -> tuple[bytes, bytes]:
        """As `issue_server`, for what is reached from this machine alone."""
        return self._kept(self._folder / "local.pem", hosts)

    def issue_client(self, name: str, csr: bytes) -> bytes:
        """A participant's certificate (PEM, 30 days) for the key that signed `csr` (PEM).

        Raises IdentityError for a request that is malformed, not signed by its key, or for
        another kind of key than Ed25519.
        """
        key = Ed25519PublicKey.from_public_bytes(requested_key(csr))
        subject = common_name(normal_name(name))
        builder = self._builder(subject, key, CLIENT_LIFE, ExtendedKeyUsageOID.CLIENT_AUTH)
        return builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    @staticmethod
    def server_files(certificate: Path, key: Path) -> tuple[bytes, bytes]:
        """The operator's own certificate (with its chain) and key, both as PEM.

        Raises IdentityError where they are unreadable, do not belong together, or the key can be
        read by every user of the machine.
        """
        with explained(certificate):
            chain = certificate.read_bytes()
        with explained(key):
            mode, secret = stat.S_IMODE(key.stat().st_mode), key.read_bytes()
        if mode & 0o007:
            raise IdentityError(
                f"{key} can be read by everybody (mode {mode:o})", f"chmod o= {key}"
            )
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except ssl.SSLError as error:
            raise IdentityError(
                f"{certificate} and {key} cannot be used together: {error.reason}",
                "give a certificate with its own key, PEM, not encrypted",
            ) from error
        return chain, secret

    # Issuing

    def _kept(self, path: Path, hosts: Sequence[str]) -> tuple[bytes, bytes]:
        """The pair in a file, where it is still good, else a new one."""
        names = host_names(hosts)
        with own_turn(self._folder / "authority.lock"):
            if not path.exists() or not self._is_good(path, names):
                self._disk.write(path, self._server_pair(names), _OWNER_ONLY)
            key, certificate = _read_key(path), _read_certificate(path)
        return certificate.public_bytes(Encoding.PEM), _key_pem(key)

    def _server_pair(self, names: Sequence[HostName]) -> bytes:
        """Key and certificate in one file: there is no moment at which only one was replaced."""
        key = generate_private_key(SECP256R1())
        subject = common_name("meadow coordinator")
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        builder = self._builder(subject, key.public_key(), SERVER_LIFE, usage).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        certificate = builder.sign(self._key, SHA256())
        return _key_pem(key) + certificate.public_bytes(Encoding.PEM)

    def _is_good(self, path: Path, names: Sequence[HostName]) -> bool:
        """Whether a pair is ours, for exactly these hosts, and in the first two thirds."""
        certificate = _read_certificate(path)
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        now = moment_of(self._clock())
        late = certificate.not_valid_after_utc - SERVER_LIFE / 3
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, InvalidSignature):
            return False
        return set(found) == set(names) and certificate.not_valid_before_utc <= now < late

    def _builder(
        self, subject: x509.Name, key: PublicKey, life: timedelta, usage: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        """A certificate but for its signature; never valid for longer than the authority's."""
        own, now = self._certificate, moment_of(self._clock())
        if not own.not_valid_before_utc <= now < own.not_valid_after_utc:
            raise IdentityError(
                f"the authority's certificate does not hold on {now:%Y-%m-%d}",
                "set this machine's clock",
            )
        begins = max(now - BACKDATED, own.not_valid_before_utc)
        ends = min(now + life, own.not_valid_after_utc)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        return (
            unsigned(subject, own.subject, key, begins, ends, is_authority=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(issuer, critical=False)
        )


def expires_at(certificate: bytes) -> float:
    """The end of a certificate (PEM) in Unix seconds."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc.timestamp()


# --- files -------------------------------------------------------------------------------------


def _own_key(folder: Path, disk: Disk) -> EllipticCurvePrivateKey:
    """The authority's key, made where there is neither key nor certificate."""
    path = folder / "authority.key"
    if not path.exists():
        if (folder / "authority.pem").exists():
            raise IdentityError(f"{path} is missing, and its certificate is in use", _RESTORE)
        disk.write(path, _key_pem(generate_private_key(SECP256R1())), _OWNER_ONLY)
    return _read_key(path)


def _read_key(path: Path) -> EllipticCurvePrivateKey:
    with explained(path):
        mode, pem = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    if mode & 0o077:
        raise IdentityError(
            f"{path} can be read by others (mode {mode:o})",
            f"chmod 600 {path}; if anybody may have read it, make a new authority",
        )
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{path} holds no readable private key", _RESTORE) from error
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise IdentityError(f"{path} is not an ECDSA key on P-256", _RESTORE)
    return key


def _read_certificate(path: Path) -> x509.Certificate:
    with explained(path):
        pem = path.read_bytes()
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise IdentityError(f"{path} holds no readable certificate", _RESTORE) from error


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
