"""Mutual proof of a shared key at the start of a connection, sans I/O. Used by data links and control channels.

    dialer                                   listener
    HELLO   version, identity, nonce, hello  ──▶            looks up the key of `identity`
            ◀──  WELCOME  nonce, welcome, mac               mac = HMAC(key, "listener" | both messages)
    CONFIRM mac                              ──▶            mac = HMAC(key, "dialer"   | both messages)

A three-message challenge-response as in ISO/IEC 9798-4 (mechanism 5): each side's MAC (HMAC-SHA256,
RFC 2104) covers both nonces, its role, and everything that was said, so that neither a replayed nor a
reflected nor an altered message passes. Nothing after it is encrypted or authenticated message by message:
docs/security.md says what follows from that. A listener that refuses answers REFUSED with a reason.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any

import msgpack

from nomad.errors import Fenced, HandshakeError
from nomad.transport.base import Frame

VERSION = 1
_HELLO, _WELCOME, _CONFIRM, _REFUSED = "hello", "welcome", "confirm", "refused"
DIALER_SAYS = 2
"""Messages of a dialer's handshake: once it has sent the last, it has had the listener's, and hears anything."""

MAX_BYTES = 64 * 1024
"""Largest handshake message that is looked at."""


class Dialer:
    """The side that dialed. `start`, then `receive` what comes back and send what it returns."""

    def __init__(self, key: bytes, identity: str, hello: dict[str, Any]):
        self._key = key
        self._hello = msgpack.packb(
            {"type": _HELLO, "version": VERSION, "identity": identity, "nonce": secrets.token_bytes(16), "body": hello}
        )

    def start(self) -> Frame:
        """The first message."""
        return (self._hello,)

    def receive(self, frame: Frame) -> tuple[Frame, dict[str, Any]]:
        """The last message and what the listener said. Raises `HandshakeError` or `Fenced`."""
        message, raw = _read(frame)
        if message["type"] == _REFUSED:
            reason = str(message.get("reason", "refused"))
            raise Fenced(reason) if message.get("fenced") else HandshakeError(reason)
        if message["type"] != _WELCOME:
            raise HandshakeError(f"expected a welcome, got {message['type']!r}")
        body = message["content"]
        transcript = self._hello + body
        if not hmac.compare_digest(_mac(self._key, b"listener", transcript), message["mac"]):
            raise HandshakeError("the listener doesn't hold this pipeline's key")
        content = _unpacked(body)
        if not isinstance(content, dict) or not isinstance(content.get("body"), dict):
            raise HandshakeError("a welcome without a valid 'content'")
        confirm = msgpack.packb({"type": _CONFIRM, "mac": _mac(self._key, b"dialer", transcript)})
        return (confirm,), content["body"]


class Listener:
    """The side that listened: `identify`, `welcome`, `confirm`, in this order."""

    def __init__(self) -> None:
        self._transcript = b""
        self._key = b""
        self._first = b""

    def identify(self, frame: Frame) -> tuple[str, dict[str, Any]]:
        """Who the dialer claims to be, and what it says; not proven yet."""
        message, raw = _read(frame)
        if message["type"] != _HELLO:
            raise HandshakeError(f"expected a hello, got {message['type']!r}")
        if message.get("version") != VERSION:
            raise HandshakeError(f"the peer speaks protocol {message.get('version')}, this side {VERSION}")
        self._first = raw
        return str(message["identity"]), dict(message["body"])

    def welcome(self, key: bytes, body: dict[str, Any]) -> Frame:
        """The answer, which proves that this side holds `key`."""
        content = msgpack.packb({"nonce": secrets.token_bytes(16), "body": body})
        self._key, self._transcript = key, self._first + content
        mac = _mac(key, b"listener", self._transcript)
        return (msgpack.packb({"type": _WELCOME, "content": content, "mac": mac}),)

    def confirm(self, frame: Frame) -> None:
        """Check the dialer's proof. Raises `HandshakeError`."""
        message, _ = _read(frame)
        mac = message.get("mac")
        if message["type"] != _CONFIRM or not isinstance(mac, bytes):
            raise HandshakeError("the handshake was broken off")
        if not hmac.compare_digest(_mac(self._key, b"dialer", self._transcript), mac):
            raise HandshakeError("the dialer doesn't hold the key")


def refusal(reason: str, *, fenced: bool = False) -> Frame:
    """What a listener sends before it closes."""
    return (msgpack.packb({"type": _REFUSED, "reason": reason, "fenced": fenced}),)


def _mac(key: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.new(key, role + b"|" + transcript, hashlib.sha256).digest()


def _read(frame: Frame) -> tuple[dict[str, Any], bytes]:
    if len(frame) != 1 or len(frame[0]) > MAX_BYTES:
        raise HandshakeError("not a handshake message")
    raw = bytes(frame[0])
    message = _unpacked(raw)
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise HandshakeError("not a handshake message")
    wanted: dict[str, dict[str, type | tuple[type, ...]]] = {
        _HELLO: {"identity": str, "nonce": bytes, "body": dict},
        _WELCOME: {"content": bytes, "mac": bytes},
    }
    for field, kind in wanted.get(message["type"], {}).items():
        if not isinstance(message.get(field), kind):
            raise HandshakeError(f"a {message['type']} without a valid {field!r}")
    return message, raw


def _unpacked(raw: bytes) -> Any:
    try:
        return msgpack.unpackb(raw)
    except (ValueError, TypeError) as exc:
        raise HandshakeError("not a handshake message") from exc
