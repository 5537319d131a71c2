"""What the first process of a container has to do, beside the operator: hand signals on and bury orphans.

The kernel treats process 1 in its own way: it ignores every signal that it has no handler for (SIGKILL from within
too), and is given all processes whose parents have ended. So where `python -m nomad.actor` is process 1, the pod is a
child of it, and process 1 only waits. Called by `nomad.actor.__main__` before anything large is imported: what is
loaded by then is kept twice.
"""

from __future__ import annotations

import os
import signal

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def stand_aside() -> None:
    """Return in a process that isn't the first one; where this is the first one, that doesn't return."""
    if os.getpid() != 1:
        return
    signals = {*HANDED_ON, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # what comes from now on is waited for
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the pod listens to it; it has nothing to hand over yet
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return
    os._exit(watch_over(child))


def watch_over(child: int) -> int:
    """Hand signals on to `child` and bury whatever ends, until that does; its exit code, 128 + n for signal n."""
    signals = {*HANDED_ON, signal.SIGCHLD}
    while True:
        number = signal.sigwait(signals)
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        status = _bury(child)
        if status is not None:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def _bury(child: int) -> int | None:
    """Take note of all that has ended; the status of `child` if it has."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == child:
            return status
