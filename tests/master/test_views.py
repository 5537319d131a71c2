"""What is shown of a failure."""

from __future__ import annotations

from nomad.master.views import FailureView


def test_a_failure_in_a_sentence_names_the_exception() -> None:
    assert str(FailureView(time=0.0, message="0", type="KeyError")) == "KeyError: 0"
    assert (
        str(FailureView(time=0.0, message="its process was killed by SIGKILL")) == "its process was killed by SIGKILL"
    )
