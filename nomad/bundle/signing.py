"""Keys and signatures: Ed25519, by `cryptography`. Keys are raw bytes, 32 each."""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nomad.errors import BundleTampered


def new_signing_key() -> bytes:
    """A new secret key (the seed)."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def public_key(signing_key: bytes) -> bytes:
    """The key that verifies what `signing_key` signs."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).public_key().public_bytes_raw()


def sign(data: bytes, signing_key: bytes) -> bytes:
    """The signature (64 bytes) of `data`."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).sign(data)


def verify(data: bytes, signature: bytes, verify_key: bytes) -> None:
    """Raise `BundleTampered` unless `signature` is of `data` and by the owner of `verify_key`."""
    try:
        Ed25519PublicKey.from_public_bytes(verify_key).verify(signature, data)
    except InvalidSignature:
        raise BundleTampered(
            "the bundle's signature doesn't match: it was changed on its way, or signed with a key that this cluster "
            "doesn't know. Sign with the key that `nomad up` or `nomad login` wrote to the credentials file, or set "
            "NOMAD_SIGNING_KEY"
        ) from None


def verify_hash(data: bytes, expected: str, what: str) -> None:
    """Raise `BundleTampered` unless the SHA-256 of `data` is `expected` (hex)."""
    if digest(data) != expected:
        raise BundleTampered(f"{what} of the bundle isn't what was signed: its hash differs from the manifest's")


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
