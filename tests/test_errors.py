"""Errors of others as data."""

from __future__ import annotations

from nomad import control
from nomad.errors import describe, message_of


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def test_an_error_whose_str_raises_can_be_described() -> None:
    try:
        raise Mute
    except Mute as exc:
        described = describe(exc)
    assert described["type"] == "Mute"
    assert "str() of it raises RuntimeError" in described["message"]
    assert "raise Mute" in described["traceback"]


def test_a_huge_message_is_cut() -> None:
    text = message_of(ValueError("y" * 3_000_000))
    assert len(text) < 5_000
    assert text.endswith("... (3000000 characters)")


def test_a_message_that_utf8_cannot_hold_can_be_sent() -> None:
    """As half of an emoji, cut out of JSON."""
    try:
        raise ValueError("x \ud83d")
    except ValueError as exc:
        exc.add_note("in \udc00")
        described = describe(exc)
    assert described["message"] == r"x \ud83d"
    assert r"in \udc00" in described["traceback"]
    assert control.unpack(control.pack({"type": "failed", "error": described}))["error"] == described
