"""What kind of callable a user gave, what it is called, and whether it can be an operator.

`nomad.pipeline` asks; who calls operators asks for their `setup`. Nothing here calls the user's function.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from nomad.errors import PipelineError


def label(obj: object) -> str:
    """How errors call `obj`: its name in quotes, or else its repr, shortened."""
    name = _name(obj)
    if name is not None:
        return repr(name)
    text = repr(obj)
    return text if len(text) <= 60 else text[:57] + "..."


def default_name(fn: Callable[..., Any]) -> str:
    """A valid operator name made of the function's (or its class's) own name."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", (_name(fn) or "").strip("<>"))[:56]
    return name if re.match(r"[A-Za-z_]", name) else f"_{name}"


def is_generator(fn: Callable[..., Any]) -> bool:
    """Whether calling `fn` gives a generator."""
    return inspect.isgeneratorfunction(_called(fn))


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether calling `fn` gives something to await."""
    return inspect.iscoroutinefunction(_called(fn))


def is_async_generator(fn: Callable[..., Any]) -> bool:
    """Whether calling `fn` gives an async generator."""
    return inspect.isasyncgenfunction(_called(fn))


def setup_of(fn: Any) -> Callable[[], Any] | None:
    """The method `setup` of an object that is an operator, through partials; None where there is none."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.isclass(fn) or not hasattr(type(fn), "setup"):
        return None
    found: Callable[[], Any] = fn.setup
    return found


def check_setup(fn: Any, where: str) -> None:
    """Raise `PipelineError` unless `fn` has no `setup`, or one that can be called without arguments, and waited for."""
    setup = setup_of(fn)
    if setup is None:
        return
    what = f"{where}: its `setup`, which is called once in its process before the first message comes,"
    if not callable(setup):
        raise PipelineError(f"{what} is of type {type(setup).__name__}: make it a method, or call it otherwise")
    if is_async(setup) or is_generator(setup) or is_async_generator(setup):
        raise PipelineError(f"{what} must be a plain method, neither async nor a generator")
    try:
        inspect.signature(setup).bind()
    except TypeError:
        takes = f"takes {inspect.signature(setup)}"
        raise PipelineError(f"{what} {takes}: it must do without arguments, or be called otherwise") from None
    except ValueError:  # some that are written in C don't tell
        return


def check_callable(obj: Any, where: str) -> None:
    """Raise `PipelineError` unless `obj` can be called, again and again, in another process."""
    if inspect.iscoroutine(obj):
        obj.close()  # nobody will await it; Python would warn about that on top
        raise PipelineError(f"{where} is a coroutine, already called: give the function itself, without parentheses")
    if inspect.isgenerator(obj) or inspect.isasyncgen(obj):
        raise PipelineError(
            f"{where} is a generator that has been made already and can't travel to another process: "
            "give the generator function itself, without parentheses"
        )
    if not callable(obj):
        raise PipelineError(f"{where} is of type {type(obj).__name__} and can't be called: give a function")
    if inspect.isclass(obj) and _own_call(obj) is not None:
        raise PipelineError(
            f"{where} is a class whose instances are callable: give an instance, {obj.__name__}(...); "
            f"or, to make an instance of every message, `lambda x: {obj.__name__}(x)`"
        )


def check_arity(fn: Callable[..., Any], where: str, *, source: bool) -> None:
    """Raise `PipelineError` unless `fn` can be called without arguments (a source) or with one (the others).

    Callables that don't tell their signature (some are written in C) are taken to be fine.
    """
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):
        return
    try:
        signature.bind(*([] if source else [None]))
    except TypeError:
        pass
    else:
        return
    takes = f"takes {signature}"
    if source:
        raise PipelineError(
            f"{where} {takes}, but the first operator is the source and is called without arguments: "
            "put a source first, or bind the arguments with functools.partial"
        )
    required = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in _VARIADIC]
    if not required:
        hint = "only the first operator, the source, takes none"
    elif required[0] == "self":
        hint = "give the method of an instance, not of the class"
    else:
        hint = "bind the other arguments by name with functools.partial"
    raise PipelineError(f"{where} {takes}, but it is called with exactly one argument, the message: {hint}")


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _name(obj: object) -> str | None:
    while isinstance(obj, functools.partial):
        obj = obj.func
    name = getattr(obj, "__name__", None)
    if isinstance(name, str):
        return name
    return type(obj).__name__ if callable(obj) else None


def _called(fn: Any) -> Any:
    """The function that runs when `fn` is called: through partials, and `__call__` of objects."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.isroutine(fn) or inspect.isclass(fn):
        return fn
    return _own_call(type(fn)) or fn


def _own_call(cls: type) -> Any:
    """`cls.__call__` as its instances have it (a class itself always has one, from its metaclass)."""
    return next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)
