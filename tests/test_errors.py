"""Errors of others as data."""

from __future__ import annotations

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
