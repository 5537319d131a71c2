"""The command line, `nomad`. `main` is the console script; the commands are in the modules beside it.

    main      the group, exit codes, warnings
    common    what commands share: connecting, output, parameter types
    up        a cluster on this machine
    programs  from a Python file to a pipeline: submit, bundle
    pipelines what runs: ls, show, logs, tail, set-aside, stop, rm
    cluster   nodes, links, link set, events

Nothing but click is imported before a command runs, so that `nomad version` and completion are quick.
"""

import signal


def main() -> None:
    """The console script. Ctrl-C while it is still being imported ends it at once, and without a traceback."""
    if mine := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from nomad.cli.main import main

    if mine:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


__all__ = ["main"]
