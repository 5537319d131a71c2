"""Writes what docs/delivery.md shows of the code: the states of a link, and the numbers that the protocol uses.

python docs/make_states.py            write it
python docs/make_states.py --check    exit code 1 when it isn't up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from nomad import control, setaside
from nomad.actor import instance, mode, operator, outbox, progress, source
from nomad.delivery import codec, driver, frames, handshake, inlink, outlink, receiver, sender
from nomad.delivery.states import TABLE, Event, State
from nomad.settings import Windows
from nomad.transport import base

DOCUMENT = Path(__file__).with_name("delivery.md")

MEANING = {
    State.NEW: "never connected",
    State.HELLO: "a connection stands, the handshake is under way",
    State.OPEN: "messages flow",
    State.LOST: "the connection is gone, all buffers are kept",
    State.CLOSED: "the end",
    Event.CONNECTED: "there is a connection",
    Event.AGREED: "the handshake succeeded",
    Event.DISCONNECTED: "the connection broke or was given up",
    Event.CLOSE: "the operator is stopped",
}


def states() -> str:
    """The diagram and the table."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.NEW}"]
    for (state, event), following in TABLE.items():
        if event is not Event.CLOSE:
            lines.append(f"    {state} --> {following}: {event}")
    for state in State:
        if state is not State.CLOSED:
            lines.append(f"    {state} --> {State.CLOSED}: {Event.CLOSE}")
    lines += [f"    {State.CLOSED} --> [*]", "```", ""]
    lines.append("| state | " + " | ".join(Event) + " |")
    lines.append("| --- |" + " --- |" * len(Event))
    for state in State:
        cells = (TABLE.get((state, event), "refused") for event in Event)
        lines.append(f"| **{state}** | " + " | ".join(cells) + " |")
    lines += ["", *(f"- *{word}*: {meaning}" for word, meaning in MEANING.items())]
    return "\n".join(lines)


def numbers() -> str:
    """The table of constants."""
    windows = Windows()
    rows = [
        ("window of a link", f"{windows.messages} messages, {size(windows.bytes)}"),
        ("a batch weighs, beyond its values", size(frames.BATCH_OVERHEAD)),
        ("batch, at most", f"{outbox.BATCH_MESSAGES} messages, about {size(outbox.BATCH_BYTES)}"),
        ("batch that is split", f"over {size(outbox.LARGE_BATCH)}"),
        ("message, at most", f"{size(base.MAX_FRAME_BYTES)} in {base.MAX_PARTS} large buffers"),
        ("buffers travel out of band from", size(codec.OUT_OF_BAND)),
        ("a body shares the head's buffer up to", size(frames.INLINE_BODY)),
        ("tuples, sets and objects nested in each other", f"{codec.MOST_NESTED} levels"),
        ("path of a position, at most", f"{frames.MOST_PATH} bytes"),
        ("lanes", str(frames.LANES)),
        ("messages that one instance of a source may send", f"2^{progress.SOURCE_BITS}"),
        ("acknowledgement goes out after", f"1/{receiver.ACK_SHARE} of the window, or {seconds(receiver.ACK_DELAY)}"),
        ("sent before the first acknowledgement, at most", f"1/{receiver.GRANT_SHARE} of the window"),
        ("connections that wait beside the one of a link", str(inlink.MOST_WAITING)),
        ("an instance that takes another's place may catch up for", seconds(operator.HOLD_MOST)),
        ("the one before goes on getting what is new for", seconds(outlink.TAIL_SECONDS)),
        ("a source that is to rest is waited for", seconds(source.STILL_SECONDS)),
        ("messages set aside are handed over in parts of", size(instance.PART)),
        ("silence before a ping", seconds(sender.SILENCE)),
        ("silence before a connection is given up", seconds(sender.GIVE_UP)),
        (
            "pause before dialing again",
            f"{seconds(outlink.BACKOFF_FIRST)}, doubled up to {seconds(outlink.BACKOFF_MOST)}",
        ),
        ("time for a handshake", seconds(driver.HANDSHAKE_TIMEOUT)),
        ("handshake message, and any frame before it is over, at most", size(handshake.MAX_BYTES)),
        ("control message to the master, at most", size(control.MOST_SAID)),
        ("control message of the master's, at most", size(control.MOST_TOLD)),
        ("output that is followed, or message set aside that is shown, at most", size(control.MOST_SHOWN)),
        ("a generator source runs ahead by", f"{source.AHEAD} values, about {size(source.AHEAD_BYTES)}"),
        ("a function is quick up to, slow from", f"{seconds(mode.QUICK)}, {seconds(mode.SLOW)} per call"),
        ("pause before a retry", f"{seconds(operator.RETRY_FIRST)}, doubled up to {seconds(operator.RETRY_MOST)}"),
        ("messages set aside, at most", f"{setaside.MOST_MESSAGES}, {size(setaside.MOST_BYTES)}"),
    ]
    return "\n".join(["| what | how much |", "| --- | --- |", *(f"| {what} | {much} |" for what, much in rows)])


def size(nbytes: int) -> str:
    """Bytes as people write them."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):g} {unit}"
    return f"{nbytes} B"


def seconds(time: float) -> str:
    """A duration as people write it."""
    return f"{time:g} s" if time >= 1 else f"{time * 1000:g} ms"


def written(document: str) -> str:
    """`document` with the generated parts replaced."""
    for name, text in (("states", states()), ("numbers", numbers())):
        begin, end = f"<!-- {name}: made by make_states.py -->\n", f"<!-- {name}: end -->"
        before, _, rest = document.partition(begin)
        _, _, after = rest.partition(end)
        if not after:
            raise SystemExit(f"{DOCUMENT} lacks the lines that mark {name!r}")
        document = f"{before}{begin}\n{text}\n\n{end}{after}"
    return document


def main() -> int:
    """Write the document, or check it."""
    before = DOCUMENT.read_text()
    after = written(before)
    if sys.argv[1:] == ["--check"]:
        if before != after:
            print(f"{DOCUMENT} isn't up to date: run python docs/make_states.py")  # noqa: T201 - for whoever ran it
        return int(before != after)
    DOCUMENT.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
