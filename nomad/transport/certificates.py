"""Who a process is towards others, by certificates: the folder that they lie in, and the TLS contexts made of them.

Used by `nomad.transport.tls`; who issues certificates takes `Identity` from here. The folder has `tls.crt` (the
process's own certificate, PEM), `tls.key` and `ca.crt` (all CAs whose certificates count). It is looked at again for
each new connection, so that certificates are renewed without anybody being told, and connections that stand go on.

Host names say nothing here: pods come and go, and their addresses with them. A certificate counts when one of the CAs
signed it, and says who its holder is in a URI of its subject alternative names: `spiffe://nomad/<namespace>/<role>`.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from nomad.errors import CertificateError

log = logging.getLogger(__name__)

VARIABLE = "NOMAD_TLS"
"""Environment variable: the folder."""
CERTIFICATE, KEY, AUTHORITIES = "tls.crt", "tls.key", "ca.crt"
TRUST_DOMAIN = "spiffe://nomad/"
MASTER, POD = "master", "pod"
"""Roles. All processes but the master's are pods: operators, agents, relays."""
_ATTEMPTS = 3
"""How often files that change while they are read are read again."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a certificate is for."""

    namespace: str
    """What belongs together: all that one master knows."""
    role: str

    @property
    def uri(self) -> str:
        """As it stands in a certificate."""
        return f"{TRUST_DOMAIN}{self.namespace}/{self.role}"

    @classmethod
    def of(cls, uri: str) -> Identity | None:
        """The identity that `uri` tells, None if it tells none."""
        if not uri.startswith(TRUST_DOMAIN):
            return None
        namespace, _, role = uri.removeprefix(TRUST_DOMAIN).partition("/")
        return cls(namespace, role) if namespace and role and "/" not in role else None


def identity_of_peer(certificate: Mapping[str, Any] | None) -> Identity | None:
    """Whom a verified certificate, as `ssl.SSLObject.getpeercert` gives it, is for."""
    names = (certificate or {}).get("subjectAltName", ())
    found = [identity for kind, name in names if kind == "URI" and (identity := Identity.of(name))]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the files said."""

    stamps: tuple[tuple[int, ...], ...]
    identity: Identity
    expires: datetime
    client: ssl.SSLContext
    server: ssl.SSLContext


class Credentials:
    """Certificates in a folder, as they are there now. May be used from several threads."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None
        self._unusable: tuple[tuple[int, ...], ...] | None = None
        """Files that were complained about."""

    @property
    def identity(self) -> Identity:
        """Who this process is. Raises `CertificateError`."""
        return self._current().identity

    def client(self) -> ssl.SSLContext:
        """For a connection to be dialled now. Raises `CertificateError`, also for a certificate that has expired."""
        loaded = self._current()
        if loaded.expires.timestamp() <= time.time():
            raise CertificateError(f"the certificate in {self.folder} expired at {loaded.expires:%Y-%m-%d %H:%M} UTC")
        return loaded.client

    def server(self) -> ssl.SSLContext:
        """For listening: each connection gets the certificates of its time. Raises `CertificateError`."""
        self._current()
        return _Renewed(self)

    def server_now(self) -> ssl.SSLContext:
        """For a connection that is accepted now. Raises `CertificateError`."""
        return self._current().server

    def _current(self) -> _Loaded:
        with self._lock:
            for _ in range(_ATTEMPTS):
                stamps: tuple[tuple[int, ...], ...] = ()  # of files that aren't there
                try:
                    stamps = self._stamps()
                    if self._loaded is not None and stamps in (self._loaded.stamps, self._unusable):
                        return self._loaded
                    loaded = self._load(stamps)
                    if self._stamps() == stamps:
                        self._loaded, self._unusable = loaded, None
                        return loaded
                except (OSError, ValueError, CertificateError) as exc:
                    if self._loaded is None:
                        raise self._error(exc) from exc
                    if self._unusable != stamps:
                        self._unusable = stamps
                        log.warning("%s; the certificates from before stay in use", self._error(exc))
                    return self._loaded
            raise CertificateError(f"the certificates in {self.folder} change all the time")

    def _stamps(self) -> tuple[tuple[int, ...], ...]:
        """Other ones when a file has changed."""
        found = [os.stat(self.folder / name) for name in (CERTIFICATE, KEY, AUTHORITIES)]
        return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found)

    def _load(self, stamps: tuple[tuple[int, ...], ...]) -> _Loaded:
        own = x509.load_pem_x509_certificate((self.folder / CERTIFICATE).read_bytes())
        client, server = (self._context(kind) for kind in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER))
        return _Loaded(stamps, self._identity_in(own), own.not_valid_after_utc, client, server)

    def _identity_in(self, certificate: x509.Certificate) -> Identity:
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        except x509.ExtensionNotFound:
            uris = []
        found = [identity for uri in uris if (identity := Identity.of(uri))]
        if len(found) != 1:
            raise CertificateError(f"{self.folder / CERTIFICATE} doesn't say whose it is: no {TRUST_DOMAIN}… in it")
        return found[0]

    def _context(self, kind: int) -> ssl.SSLContext:
        context = ssl.SSLContext(kind)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if kind == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # each connection is checked from the start, with the certificates of its time
            context.sslobject_class = _Accepted
        context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
        context.load_verify_locations(self.folder / AUTHORITIES)
        return context

    def _error(self, exc: Exception) -> CertificateError:
        if isinstance(exc, CertificateError):
            return exc
        if isinstance(exc, FileNotFoundError):
            needs = f"{CERTIFICATE}, {KEY} and {AUTHORITIES}"
            return CertificateError(f"there is no {exc.filename or self.folder}: TLS needs {needs}")
        return CertificateError(f"the certificates in {self.folder} can't be used: {exc}")


class _Accepted(ssl.SSLObject):
    """A handshake that says here why it fails: event loops hang up without telling the dialer."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLCertVerificationError as exc:
            log.warning("a connection was refused, because of its certificate: %s", exc.verify_message)
            raise


class _Renewed(ssl.SSLContext):
    """A context for event loops to keep, which stands for the one that `Credentials` has at the time."""

    _credentials: Credentials

    def __new__(cls, credentials: Credentials) -> _Renewed:
        context = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        context._credentials = credentials
        return context

    def __init__(self, credentials: Credentials) -> None:
        pass

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        return self._credentials.server_now().wrap_bio(*args, **options)


_chosen: Credentials | None = None
_found: dict[str, Credentials] = {}


def use(folder: str | os.PathLike[str] | None) -> None:
    """Take this process's certificates from `folder` from now on; None: from where the environment says."""
    global _chosen
    _chosen = None if folder is None else Credentials(folder)


def credentials() -> Credentials:
    """Those of this process. Raises `CertificateError` when nothing says where they are."""
    if _chosen is not None:
        return _chosen
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise CertificateError(
            f"TLS needs certificates: set {VARIABLE} to a folder with {CERTIFICATE}, {KEY} and {AUTHORITIES}"
        )
    return _found.setdefault(folder, Credentials(folder))
