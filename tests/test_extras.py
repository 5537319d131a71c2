"""What documentation and errors say to install is there to be installed."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_extras_that_are_named_exist() -> None:
    config = configparser.RawConfigParser()
    config.read(ROOT / "setup.cfg")
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    files += [path for folder in ("docs", "examples", "nomad") for path in (ROOT / folder).rglob("*.[mp][dy]")]
    named = {
        extra.strip()
        for path in files
        for extras in re.findall(r"pip install [\"']?(?:nomad|\.)\[([a-z, ]+)\]", path.read_text())
        for extra in extras.split(",")
    }
    assert named == {"bench", "examples", "scheduler"}
    assert named <= set(config["options.extras_require"])
