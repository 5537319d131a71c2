"""Prints what extras of Nomad ask for, one package a line: `python images/extras.py examples,scheduler`.

The operator image has only a part of Nomad's requirements, so `pip install nomad[extra]`, which asks for all of
them, isn't how its extras get there. Used by the Dockerfiles; reads setup.cfg in the current folder.
"""

from __future__ import annotations

import configparser
import sys


def main(extras: str) -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read("setup.cfg", encoding="utf-8")
    known = setup["options.extras_require"]
    for extra in filter(None, extras.split(",")):
        if extra not in known:
            sys.exit(f"setup.cfg has no extra {extra!r}; there are {', '.join(sorted(known))}")
        sys.stdout.write(known[extra].strip() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:2] or [""])
