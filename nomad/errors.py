"""Every error that Nomad raises, by situation. The tree:

    NomadError
    ├── UsageError                 the caller's input is wrong; nothing was started
    │   ├── PipelineError          operators, graph or options
    │   ├── BundleError            code that can't be packed, is malformed, or is not for this Python
    │   │   ├── BundleTampered     the signature or a hash doesn't match
    │   │   └── EnvironmentMismatch  other Python minor version, or a package is missing
    │   ├── PayloadError           a value that is not data for the codec in use
    │   ├── TopologyError          nodes or links of a topology file
    │   ├── ScenarioError          a benchmark's scenario can't be read, or can't be run here
    │   ├── PlacementError         a placement problem that can't be read
    │   └── AddressError           an address no transport can use
    ├── RequestError               the master refused; carries its problem document
    │   ├── AuthenticationError    401
    │   ├── NotFoundError          404
    │   ├── ConflictError          409
    │   └── InvalidRequestError    400, 413, 415, 422
    ├── MasterUnreachable          nobody answers at the master's address
    ├── StateError                 the state folder can't be used
    ├── PodStartError              a runtime couldn't start a pod
    ├── PackagesError              what an operator requires can't be installed
    ├── ApiError                   Kubernetes' API refused; status, reason and its own sentence
    │   ├── ApiUnauthorized        401
    │   ├── ApiForbidden           403
    │   ├── ApiNotFound            404
    │   ├── ApiConflict            409: changed by somebody else meanwhile
    │   │   └── ApiExists          409: there is one of that name already
    │   ├── ApiGone                410: a resource version or a page that is too old
    │   ├── ApiInvalid             400, 422
    │   └── ApiUnavailable         nobody answers, 429 or 5xx: worth another try, later
    │       └── ApiCrowded         503: this process asks the API for as much at a time as it may
    ├── TransportError
    │   ├── ConnectionClosed       closed by us
    │   ├── ConnectionBroken       closed or broken by the peer or the network
    │   ├── FrameTooLarge          refused before anything was sent or allocated
    │   └── CertificateError       this process has no certificates for TLS, or they can't be used
    └── DeliveryError
        ├── ProtocolError          the peer sent what the state table doesn't allow
        ├── HandshakeError         the peer couldn't prove that it holds the key
        └── Fenced                 the peer belongs to an older epoch

Errors cross process borders as text and data (`describe`), never as pickles.
"""

from __future__ import annotations

import traceback as _traceback
from typing import Any


class NomadError(Exception):
    """Root of the tree; catch it to catch all of them."""


class UsageError(NomadError, ValueError):
    """The caller's input is wrong. The message names the thing and the way out."""


class PipelineError(UsageError):
    """An operator, the graph or an option of a pipeline is not valid."""


class BundleError(UsageError):
    """Operator code can't be packed, or a bundle can't be read."""


class BundleTampered(BundleError):
    """A bundle's signature or one of its hashes doesn't match its bytes."""


class EnvironmentMismatch(BundleError):
    """A bundle needs another Python minor version or a package that isn't there."""


class PayloadError(UsageError):
    """A message holds a value of a type that the pipeline's codec doesn't carry."""


class TopologyError(UsageError):
    """A topology (nodes and links) is not valid."""


class ScenarioError(UsageError):
    """A benchmark's scenario is not valid, or what it needs isn't there."""


class PlacementError(UsageError):
    """A placement problem is not valid."""


class AddressError(UsageError):
    """An address is malformed or names an unknown transport."""


class RequestError(NomadError):
    """The master refused a request.

    `status` is the HTTP status, `problem` the RFC 9457 document it sent.
    """

    def __init__(self, message: str, *, status: int = 0, problem: dict[str, Any] | None = None):
        super().__init__(message)
        self.status = status
        self.problem = problem or {}


class AuthenticationError(RequestError):
    """The token is missing or wrong."""


class NotFoundError(RequestError):
    """The named thing doesn't exist."""


class ConflictError(RequestError):
    """The named thing exists already, or its state doesn't allow the request."""


class InvalidRequestError(RequestError):
    """The request's content was refused."""


class MasterUnreachable(NomadError, ConnectionError):
    """Nobody answers at the master's address."""


class StateError(NomadError):
    """The state folder is not writable, in use, or from a newer version."""


class PodStartError(NomadError):
    """A runtime couldn't start a pod: its node is unknown, or the system refused."""


class PackagesError(NomadError):
    """Packages that an operator requires can't be installed; `final`: not the next time either."""

    def __init__(self, message: str, *, final: bool = False):
        super().__init__(message)
        self.final = final


class ApiError(NomadError):
    """Kubernetes' API refused a request.

    `status` is the HTTP status (0: there was no answer), `reason` Kubernetes' word for it, the message its sentence,
    `details` what it adds: the kind and name of the object, causes by field.
    """

    def __init__(self, message: str, *, status: int = 0, reason: str = "", details: dict[str, Any] | None = None):
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.details = details or {}


class ApiUnauthorized(ApiError):
    """The API doesn't know who asks, or doesn't any more."""


class ApiForbidden(ApiError):
    """The account that asks has no right to; also what an admission policy or a quota refuses."""


class ApiNotFound(ApiError):
    """There is no such object, or no such kind of object."""


class ApiConflict(ApiError):
    """The object was changed, or replaced by another of its name, since it was read; or another owns the field."""


class ApiExists(ApiConflict):
    """There is an object of that name already."""


class ApiGone(ApiError):
    """A resource version, or the next page of a list, is too old to go on from: list again."""


class ApiInvalid(ApiError):
    """The object or the request isn't valid."""


class ApiUnavailable(ApiError, ConnectionError):
    """Nobody answers, or not now: try again, `retry_after` seconds later where the API said so."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        reason: str = "",
        details: dict[str, Any] | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message, status=status, reason=reason, details=details)
        self.retry_after = retry_after


class ApiCrowded(ApiUnavailable):
    """This process has as many requests of that kind under way as it may, and hasn't sent another one."""

    def __init__(self, message: str):
        super().__init__(message, status=503, reason="Crowded")


class TransportError(NomadError, ConnectionError):
    """Bytes could not be carried."""


class ConnectionClosed(TransportError):
    """The connection was closed by this side."""


class ConnectionBroken(TransportError):
    """The peer closed the connection, or the network broke it."""


class FrameTooLarge(TransportError):
    """A frame exceeds the transport's limit."""


class CertificateError(TransportError):
    """This process has no certificates for TLS, or they can't be used."""


class DeliveryError(NomadError):
    """The delivery protocol can't go on over this connection."""


class ProtocolError(DeliveryError):
    """The peer sent something that the protocol doesn't allow."""


class HandshakeError(DeliveryError):
    """The peer could not prove that it holds the key, or speaks another version."""


class Fenced(DeliveryError):
    """The peer is an instance of an older epoch and must not be heard."""


def describe(exc: BaseException, *, limit: int = 20_000) -> dict[str, str]:
    """`exc` as data: its type, message and traceback text (the last `limit` characters)."""
    text = "".join(_traceback.format_exception(exc))
    return {
        "type": _packable(type(exc).__qualname__),
        "message": message_of(exc),
        "traceback": _packable(text[-limit:]),
    }


def message_of(exc: BaseException, *, limit: int = 4_000) -> str:
    """The message of an error that isn't ours: whatever its `__str__` does, and the first `limit` characters of it."""
    try:
        text = str(exc)
    except Exception as failure:  # noqa: BLE001 - the user's own code, which may raise anything
        return f"(its message can't be shown: str() of it raises {type(failure).__qualname__})"
    return _packable(text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)")


def _packable(text: str) -> str:
    """`text` with its lone surrogates, which UTF-8 can't hold, as escapes: it is to be sent, and kept in files."""
    return text.encode("utf-8", "backslashreplace").decode()
