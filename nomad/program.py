"""A user's Python file as a program to submit: `nomad submit FILE` and `nomad bundle FILE` load it here.

The file runs once, as a module of its own and not as `__main__`. A `nomad.submit_pipeline(...)` at its top
level, which would submit it a second time, only notes its arguments while the file is loaded; they
say what to submit where the command line doesn't. So the same file works with `python FILE` and with
`nomad submit FILE`.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from nomad.errors import NomadError, UsageError

MODULE = "nomad_program"
"""The name under which the file is loaded: one that hides no other module, whatever the file is called."""


@dataclass(frozen=True, slots=True)
class Submission:
    """The arguments of a call of `submit_pipeline`."""

    operators: Any
    """Functions in their order, as the user gave them, or the bytes of a bundle."""
    start: str | None = None
    end: str | None = None
    id: str | None = None
    profile: Sequence[Mapping[str, float]] | None = None


@dataclass(slots=True)
class _Loading:
    thread: int
    submissions: list[Submission] = field(default_factory=list)


_loading: _Loading | None = None


def being_loaded() -> bool:
    """Whether the caller runs because `load` runs its file."""
    return _loading is not None and _loading.thread == threading.get_ident()


def note(submission: Submission) -> None:
    """Remember what the file that is being loaded would submit; called instead of submitting it."""
    assert _loading is not None
    _loading.submissions.append(submission)


def load(target: str) -> Submission:
    """What `FILE` or `FILE:NAME` wants to have submitted.

    NAME is a list of operators in the file. Without it, it's `operators`, else the list of the file's only call of
    `submit_pipeline`. The nodes, the id and the profile are those of the call, else the file's `start_node`,
    `end_node`, `pipeline_id` and, for `operators`, `profile`. Raises `UsageError` that says what is missing where.
    """
    path, name = _split(target)
    module, calls = _run(path)
    if name is None and not hasattr(module, "operators") and len(calls) == 1:
        return _completed(calls[0], module)
    if name is None and not hasattr(module, "operators") and calls:
        raise UsageError(f"{path} submits {len(calls)} pipelines: say which list of operators to take, {path}:NAME")
    if not hasattr(module, name or "operators"):
        raise UsageError(
            f"{path} defines no {name!r}{_candidates(module)}"
            if name
            else f"{path} defines no `operators`: call the list that, operators = [source, ..., sink], "
            f"or say which one to take, {path}:NAME{_candidates(module)}"
        )
    operators = getattr(module, name or "operators")
    if not isinstance(operators, (list, tuple)):
        kind = type(operators).__name__
        raise UsageError(f"{name or 'operators'} in {path} is of type {kind}, not a list of operators")
    call = next((call for call in calls if call.operators is operators), Submission(operators))
    return _completed(call, module)


def _completed(call: Submission, module: ModuleType) -> Submission:
    """`call`, with what it leaves open taken from the module's variables."""
    return replace(
        call,
        start=call.start or getattr(module, "start_node", None),
        end=call.end or getattr(module, "end_node", None),
        id=call.id or getattr(module, "pipeline_id", None),
        profile=call.profile if call.profile is not None else _own_profile(call, module),
    )


def _own_profile(call: Submission, module: ModuleType) -> Any:
    """The list `profile` of the file, which is of its list `operators`."""
    profile = getattr(module, "profile", None)
    return profile if isinstance(profile, list) and call.operators is getattr(module, "operators", None) else None


def _candidates(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, (list, tuple)) and value and all(callable(item) for item in value)
    ]
    return f"; it defines the lists {', '.join(names)}" if names else ""


def _split(target: str) -> tuple[Path, str | None]:
    """FILE and NAME; a colon in a folder's name does no harm."""
    if Path(target).is_file():
        return Path(target), None
    file, colon, name = target.rpartition(":")
    if colon and name.isidentifier():
        if not Path(file).is_file():
            raise UsageError(f"there is no file {file}")
        return Path(file), name
    if colon and Path(file).is_file():
        raise UsageError(f"after the colon of {target} must stand the name of a list of operators in {file}")
    raise UsageError(f"there is no file {target}")


def _run(path: Path) -> tuple[ModuleType, list[Submission]]:
    """Run the file as `python FILE` would: modules beside it can be imported."""
    global _loading
    spec = importlib.util.spec_from_file_location(MODULE, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} isn't a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    sys.path.insert(0, str(path.resolve().parent))
    _loading = loading = _Loading(threading.get_ident())
    try:
        spec.loader.exec_module(module)
    except SyntaxError as exc:
        raise UsageError(f"{path}, line {exc.lineno}: {exc.msg}") from exc
    except NomadError:
        raise
    except SystemExit as exc:
        raise UsageError(
            f"{path} calls sys.exit() while it is loaded: put that under `if __name__ == '__main__':`"
        ) from exc
    except Exception as exc:  # whatever the user's own code raises
        frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if frame.filename == str(path.resolve())]
        where = f", line {frames[-1].lineno}" if frames else ""
        if isinstance(exc, RuntimeError) and "asyncio.run()" in str(exc):
            raise UsageError(
                f"{path}{where} calls asyncio.run() while it is loaded: put that under `if __name__ == '__main__':`, "
                "and the list of operators above it"
            ) from exc
        hint = ""
        if isinstance(exc, ModuleNotFoundError):
            hint = f". What the file imports must be installed here, too, for {sys.executable}"
        raise UsageError(f"{path}{where}: {type(exc).__name__}: {exc}{hint}") from exc
    finally:
        _loading = None
    return module, loading.submissions
