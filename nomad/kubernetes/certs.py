"""The CA that a master keeps for its namespace, and the certificates that it signs. Pure but for random numbers.

`renewed` is all of it: from what there is and the time, what there should be. `nomad.kubernetes.certificates` keeps
that in Secrets. Nobody has to be told of a change: processes read their files again (`nomad.transport.certificates`).

A leaf lives `LEAF_LIFE` and is renewed when two thirds of that are over, and so is the CA. Its successor is published
beside it, in everybody's `ca.crt`, for `OVERLAP` before it signs anything; that is as long as a leaf lives, so who
hasn't heard of it by then has no valid certificate either. The former CA stays published, without its key, until
nothing that it signed is valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nomad.transport.certificates import Identity

CA_LIFE = timedelta(days=365)
LEAF_LIFE = timedelta(days=7)
OVERLAP = LEAF_LIFE
BACKDATED = timedelta(hours=1)
"""Certificates are valid from a little before they are made: clocks differ."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Former:
    """A CA that signs nothing any more."""

    certificate: bytes
    until: datetime
    """What it signed last has expired by then."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA with its successor and its predecessors."""

    signing: Pair
    next: Pair | None = None
    published: datetime | None = None
    """Since when the next one is in everybody's `ca.crt`; None: it isn't yet."""
    former: tuple[Former, ...] = ()

    @property
    def bundle(self) -> bytes:
        """What `ca.crt` has: the certificates of all that count, the one that signs first."""
        after = [self.next.certificate] if self.next is not None else []
        return b"".join([self.signing.certificate, *after, *[former.certificate for former in self.former]])


@dataclass(frozen=True, slots=True)
class Leaf:
    """What one role's processes get."""

    own: Pair
    authorities: bytes
    """Their `ca.crt`."""


@dataclass(frozen=True, slots=True)
class Held:
    """All that there is in a namespace."""

    authority: Authority | None = None
    leaves: Mapping[str, Leaf] = field(default_factory=dict)
    """By role."""


def new_ca(namespace: str, now: datetime) -> Pair:
    """A CA that may sign leaves only, with a name of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    name = _name(f"nomad CA {namespace} {serial:x}"[:64])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        _builder(name, name, key.public_key(), serial, now, CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pair(made, key)


def new_leaf(ca: Pair, identity: Identity, now: datetime, life: timedelta = LEAF_LIFE) -> Pair:
    """A certificate for dialling and for listening."""
    issuer = x509.load_pem_x509_certificate(ca.certificate)
    issuer_key = serialization.load_pem_private_key(ca.key, None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    subject, serial = _name(f"nomad {identity.role}"), x509.random_serial_number()
    made = (
        _builder(subject, issuer.subject, key.public_key(), serial, now, life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(both, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return _pair(made, key)


def renewed(found: Held, namespace: str, roles: Sequence[str], now: datetime) -> Held:
    """What there should be now; the same object when that is what there is.

    Whoever keeps it writes the authority before the leaves, and tells with `Authority.published` when all of
    them have it.
    """
    authority = _authority(found.authority, namespace, now)
    leaves = {role: _leaf(found.leaves.get(role), authority, Identity(namespace, role), now) for role in roles}
    wanted = Held(authority, leaves)
    return found if wanted == found else wanted


def _authority(found: Authority | None, namespace: str, now: datetime) -> Authority:
    if found is None or (not _usable(found.signing, now) and not _usable(found.next, now)):
        return Authority(new_ca(namespace, now))
    former = tuple(former for former in found.former if former.until > now)
    if found.next is not None:
        overlapped = found.published is not None and now >= found.published + OVERLAP
        if not overlapped and _usable(found.signing, now):
            return replace(found, former=former)
        left = Former(found.signing.certificate, now + LEAF_LIFE)
        return Authority(found.next, former=(left, *former))
    if _due(found.signing.certificate, now):
        return replace(found, next=new_ca(namespace, now), published=None, former=former)
    return replace(found, former=former)


def _leaf(found: Leaf | None, authority: Authority, identity: Identity, now: datetime) -> Leaf:
    """Also another one when the CA of the present one doesn't count any more."""
    if found is None or not _fits(found.own, authority, identity) or _due(found.own.certificate, now):
        return Leaf(new_leaf(authority.signing, identity, now), authority.bundle)
    return found if found.authorities == authority.bundle else replace(found, authorities=authority.bundle)


def _fits(own: Pair, authority: Authority, identity: Identity) -> bool:
    """Whether this can be read, is for `identity`, and was signed by a CA that counts."""
    try:
        certificate = x509.load_pem_x509_certificate(own.certificate)
        key = serialization.load_pem_private_key(own.key, None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, x509.ExtensionNotFound):
        return False
    if names.get_values_for_type(x509.UniformResourceIdentifier) != [identity.uri]:
        return False
    return key.public_key() == certificate.public_key() and any(
        _signed(certificate, ca) for ca in x509.load_pem_x509_certificates(authority.bundle)
    )


def _signed(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _usable(ca: Pair | None, now: datetime) -> bool:
    """Whether it can be read, and all that it signs now expires before it."""
    if ca is None:
        return False
    try:
        certificate = x509.load_pem_x509_certificate(ca.certificate)
        key = serialization.load_pem_private_key(ca.key, None)
    except (ValueError, TypeError):
        return False
    return key.public_key() == certificate.public_key() and now + LEAF_LIFE <= certificate.not_valid_after_utc


def _due(certificate: bytes, now: datetime) -> bool:
    """Whether two thirds of its life are over."""
    loaded = x509.load_pem_x509_certificate(certificate)
    begin, end = loaded.not_valid_before_utc + BACKDATED, loaded.not_valid_after_utc
    return now >= begin + (end - begin) * 2 / 3


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
