"""The certificates and keys of a test cluster, in files: one CA for everything."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS = 30


class Authority:
    """A CA whose files are in `folder`: ca.crt, ca.key, and what `issue` makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nomad-test-cluster")])
        if (folder / "ca.key").exists():
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            self._key = key
        else:
            self._key = ec.generate_private_key(ec.SECP256R1())
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            builder = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, 0), True)
            self._write("ca", self._key, builder.add_extension(usage, True).sign(self._key, hashes.SHA256()))

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.crt"

    def issue(
        self, file: str, name: str, groups: Iterable[str] = (), addresses: Iterable[str] = ()
    ) -> tuple[Path, Path]:
        """`file`.crt and `file`.key, of a user in `groups` or of a server at `addresses` (names and IP addresses)."""
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject.append(x509.NameAttribute(NameOID.COMMON_NAME, name))
        key = ec.generate_private_key(ec.SECP256R1())
        uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        builder = self._builder(x509.Name(subject), key).add_extension(uses, False)
        if named := [_general_name(address) for address in addresses]:
            builder = builder.add_extension(x509.SubjectAlternativeName(named), False)
        self._write(file, key, builder.sign(self._key, hashes.SHA256()))
        return self.folder / f"{file}.crt", self.folder / f"{file}.key"

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=DAYS))
        )

    def _write(self, file: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        (self.folder / f"{file}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        write_key(self.folder / f"{file}.key", key)


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    plain = serialization.NoEncryption()
    path.touch(0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )


def signing_key(path: Path) -> Path:
    """The key that service accounts' tokens are signed with."""
    if not path.exists():
        write_key(path, ec.generate_private_key(ec.SECP256R1()))
    return path


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)
