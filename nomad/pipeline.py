"""What users write: operators, and the graph they form. Validated and frozen here, without any I/O.

`build(operators)` turns the user's functions into a `Pipeline`. `@operator` and `@source` attach
options to a function without changing it: a decorated function can still be called and tested.
`OperatorSpec` and `PipelineSpec` are the same thing as data, without the functions: what the master
stores, the scheduler places and the API shows.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypedDict, TypeVar, Unpack, overload

from nomad import needs, units
from nomad.callables import (
    check_arity,
    check_callable,
    check_setup,
    default_name,
    is_async,
    is_async_generator,
    is_generator,
    label,
)
from nomad.errors import PipelineError

CODECS = ("data", "pickle")
OPERATOR_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")
PIPELINE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
DEFAULT_INTERVAL = 1.0
"""Seconds between two calls of a periodic source that doesn't say."""

F = TypeVar("F", bound=Callable[..., Any])


class Kind(StrEnum):
    """How a function is called."""

    FUNCTION = "function"
    """`f(x) -> y`; None drops the message."""
    ASYNC = "async"
    """`async f(x) -> y`."""
    GENERATOR = "generator"
    """`f(x)` yields any number of messages."""
    ASYNC_GENERATOR = "async_generator"
    PERIODIC = "periodic"
    """A source: `f() -> y`, called every `interval` seconds."""
    ASYNC_PERIODIC = "async_periodic"
    SOURCE_GENERATOR = "source_generator"
    """A source: `f()` yields messages, pulled as fast as back-pressure lets it."""
    ASYNC_SOURCE_GENERATOR = "async_source_generator"


class OnError(StrEnum):
    """What happens to a message whose function raised."""

    SET_ASIDE = "set-aside"
    """Kept with its traceback, counted, visible, and can be run again."""
    RETRY = "retry"
    """Run again up to `retries` times with growing pauses, then set aside."""
    FAIL = "fail"
    """The pipeline fails."""


@dataclass(frozen=True, slots=True)
class OperatorSpec:
    """One operator as data."""

    name: str
    """Unique in its pipeline; `[A-Za-z_][A-Za-z0-9_-]*`, 63 characters at most."""
    kind: Kind
    interval: float | None = None
    """Seconds between calls of a periodic source."""
    memory_mb: float = 64.0
    """MiB that the node must have free."""
    requires: frozenset[str] = frozenset()
    """Labels that the node must have."""
    on_error: OnError = OnError.SET_ASIDE
    retries: int = 3
    copy_outputs: bool = False
    """Copy large buffers (arrays) before they are sent, so that the function may reuse them."""
    image: str = ""
    """The container image to run in, where the cluster has containers; "" is the cluster's own."""
    pin: str | None = None
    """The node that it stays on; None lets Nomad choose. The first and the last operator are pinned anyway."""
    requirements: tuple[str, ...] = ()
    """Packages that are installed for it before its code is loaded, as pip takes them."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its process."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Variable -> `name/key` of the secret that it gets its value from."""
    devices: Mapping[str, int] = field(default_factory=dict)
    """Name -> how many its node must have for it, e.g. of `nvidia.com/gpu`."""


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """A pipeline as data. Operators are in topological order: the first is the source, the last the sink."""

    id: str
    operators: tuple[OperatorSpec, ...]
    edges: tuple[tuple[str, str], ...]
    """Pairs of operator names."""
    start: str
    """The node of the first operator."""
    end: str
    """The node of the last operator."""
    codec: str = "data"
    """"data", or "pickle" where the pipeline asks for it by name."""
    profile: tuple[dict[str, float], ...] = field(default=())
    """Per operator what the user expects: cloud_execution_time (seconds), output_msg_size (bytes)."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator with its function."""

    spec: OperatorSpec
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A validated pipeline. Operators are in topological order: the first is the source, the last the sink."""

    operators: tuple[Operator, ...]
    edges: tuple[tuple[str, str], ...]
    """Pairs of operator names."""
    codec: str = "data"
    profile: tuple[dict[str, float], ...] = ()


class OperatorOptions(TypedDict, total=False):
    """How an operator is to be run."""

    name: str | None
    """Unique in its pipeline; default: the function's own name."""
    memory: str | float | None
    """What the node must have free: "256Mi", "1.5GB", or a number of MiB; default 64."""
    requires: Iterable[str] | None
    """Labels that the node must have, e.g. {"gpu"}; default none."""
    on_error: str | None
    """"set-aside" (default), "retry" or "fail"; see `OnError`."""
    retries: int | None
    """How often "retry" runs a message again; default 3."""
    copy_outputs: bool | None
    """Copy arrays before they are sent, for functions that reuse their buffers; default False."""
    image: str | None
    """The container image to run in, where the cluster has containers; default: the cluster's own."""
    pin: str | None
    """The node that it is placed on and never moved from; default: Nomad chooses."""
    requirements: Iterable[str] | None
    """Packages that are installed for it on its node, e.g. ["numpy==2.1"]; default none."""
    environment: Mapping[str, str] | None
    """Variables of its process, set before its code is loaded; default none."""
    secrets: Mapping[str, str] | None
    """Variables that get their values from the cluster's secrets, e.g. {"DB_PASSWORD": "db/password"}; default none."""
    devices: Mapping[str, int] | Iterable[str] | None
    """What its node must have for it, e.g. {"nvidia.com/gpu": 1} or {"camera"}; default none."""


class SourceOptions(OperatorOptions, total=False):
    """How a source is to be run."""

    interval: float | None
    """Seconds from one call to the next; default 1. Not for generators: they are pulled as back-pressure lets them."""


@overload
def operator(fn: F, /) -> F: ...
@overload
def operator(fn: None = None, /, **options: Unpack[OperatorOptions]) -> Callable[[F], F]: ...
@overload
def operator(fn: Callable[..., Any], /, **options: Unpack[OperatorOptions]) -> Callable[..., Any]: ...
def operator(fn: Callable[..., Any] | None = None, /, **options: Unpack[OperatorOptions]) -> Any:
    """Say how an operator is to be run: `@operator(memory="256Mi")`, or `operator(math.sqrt, name="root")`.

    As a decorator it notes the options on the function and returns the function itself, which can still be called,
    tested and pickled. Called with a function *and* options it leaves the function as it is and returns a
    `functools.partial` of it that carries them, so that one function can stand in a pipeline twice.

    Options: name, memory, requires, on_error, retries, copy_outputs, image, pin, requirements, environment, secrets,
    devices; see `OperatorOptions`. One that is left out or None is as an earlier decorator said, else the default.
    Raises `PipelineError` for a value that isn't valid.
    """
    return _with_options(fn, options, OperatorOptions, {})


@overload
def source(fn: F, /) -> F: ...
@overload
def source(fn: None = None, /, **options: Unpack[SourceOptions]) -> Callable[[F], F]: ...
@overload
def source(fn: Callable[..., Any], /, **options: Unpack[SourceOptions]) -> Callable[..., Any]: ...
def source(fn: Callable[..., Any] | None = None, /, **options: Unpack[SourceOptions]) -> Any:
    """Say how a source is to be run: the options of `operator`, and `interval`, the seconds from one call to the next.

    The interval of a function is 1 s by default. A generator takes none: it is pulled as fast as back-pressure lets it.
    """
    return _with_options(fn, options, SourceOptions, {"source": True})


def build(
    operators: Iterable[Callable[..., Any]],
    *,
    codec: str = "data",
    profile: Sequence[Mapping[str, float]] | None = None,
) -> Pipeline:
    """The pipeline in which each of `operators` feeds the next; the first is the source, the last the sink.

    An operator is anything that can be called: a function, `async def`, generator function, lambda, bound method,
    partial, callable object, builtin, or a class that converts its one argument (`int`, a dataclass). The source is
    called without arguments, the others with one. An object with a method `setup()` has that called once in its
    process, before it gets any message. An operator without an explicit name is called after its function; the second
    of the same name gets `-2`, and so on.

    `codec` is "data", or "pickle" to let messages be anything that can be pickled. `profile` says per operator what is
    expected of it: `{"cloud_execution_time": seconds, "output_msg_size": bytes}`.

    Raises `PipelineError`, which names the operator, its position and the way out.
    """
    if isinstance(operators, (str, bytes, Mapping, AbstractSet)) or not isinstance(operators, Iterable):
        kind = "a single function" if callable(operators) else f"of type {type(operators).__name__}"
        raise PipelineError(f"operators is {kind}: give a list of functions in their order, [source, ..., sink]")
    functions = list(operators)
    if len(functions) < 2:
        what = f"{label(functions[0])} stands alone" if functions else "the list of operators is empty"
        raise PipelineError(f"{what}: a pipeline needs at least a source and a sink, e.g. [source, print]")
    if codec not in CODECS:
        raise PipelineError(f"codec {codec!r} is unknown: use one of {', '.join(map(repr, CODECS))}")
    where = [f"operator {label(fn)} (position {i} of {len(functions)})" for i, fn in enumerate(functions, 1)]
    options = []
    for index, fn in enumerate(functions):
        check_callable(fn, where[index])
        options.append(_options_of(fn))
        if index > 0 and options[index].get("source"):
            raise PipelineError(f"{where[index]} is marked as a source, but only the first operator can be one")
        check_arity(fn, where[index], source=index == 0)
        check_setup(fn, where[index])
    names = _names(functions, options, where)
    built = []
    for index, fn in enumerate(functions):
        kind, interval = _source_kind(fn, options[index], where[index]) if index == 0 else (_kind(fn), None)
        known = {k: v for k, v in options[index].items() if k not in ("name", "interval", "source")}
        spec = OperatorSpec(names[index], kind, interval, **known)
        try:
            needs.check_apart(spec.environment, spec.secrets)
        except PipelineError as exc:
            raise PipelineError(f"{where[index]}: {exc}") from None
        built.append(Operator(spec, fn))
    return Pipeline(tuple(built), tuple(zip(names, names[1:], strict=False)), codec, check_profile(profile, names))


def check_id(pipeline_id: str) -> str:
    """`pipeline_id` when it can name a pipeline; else raises `PipelineError`."""
    if not isinstance(pipeline_id, str) or not PIPELINE_ID.fullmatch(pipeline_id):
        raise PipelineError(
            f"{pipeline_id!r} can't be the id of a pipeline: it takes 1 to 63 letters, digits, '-' and '_', "
            "and starts with a letter or a digit"
        )
    return pipeline_id


_ATTRIBUTE = "__nomad_options__"


def _with_options(fn: Any, given: Mapping[str, Any], known: type, marks: Mapping[str, Any]) -> Any:
    options: dict[str, Any] = dict(marks)
    for option, value in given.items():
        if option not in known.__annotations__:
            near = difflib.get_close_matches(option, known.__annotations__, n=1)
            raise TypeError(f"unknown option {option!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        if value is not None:
            field_name, check = _OPTIONS[option]
            try:
                options[field_name] = check(value)
            except PipelineError as exc:
                raise PipelineError(f"operator {label(fn)}: {exc}" if fn is not None else str(exc)) from None
    if fn is None:
        return lambda fn: _attach(fn, options)
    return _attach(functools.partial(fn) if given and callable(fn) else fn, options)


def _attach(fn: Any, options: dict[str, Any]) -> Any:
    check_callable(fn, f"operator {label(fn)}")
    options = {**_options_of(fn), **options}
    try:
        setattr(fn, _ATTRIBUTE, options)
    except (AttributeError, TypeError):  # builtins, bound methods, objects with __slots__: they carry no attributes
        fn = functools.partial(fn)
        setattr(fn, _ATTRIBUTE, options)
    return fn


def _options_of(fn: Any) -> dict[str, Any]:
    """The options noted on `fn`, or on what `fn` is a partial of."""
    inner = _options_of(fn.func) if isinstance(fn, functools.partial) else {}
    return {**inner, **getattr(fn, _ATTRIBUTE, {})}


def _kind(fn: Any) -> Kind:
    if is_async_generator(fn):
        return Kind.ASYNC_GENERATOR
    if is_generator(fn):
        return Kind.GENERATOR
    return Kind.ASYNC if is_async(fn) else Kind.FUNCTION


def _source_kind(fn: Any, options: Mapping[str, Any], where: str) -> tuple[Kind, float | None]:
    kind = _kind(fn)
    if kind in (Kind.GENERATOR, Kind.ASYNC_GENERATOR):
        if "interval" in options:
            raise PipelineError(
                f"{where} is a generator, which takes no interval: leave it out and sleep between the yields, "
                "or return one value from a plain function"
            )
        return (Kind.SOURCE_GENERATOR if kind is Kind.GENERATOR else Kind.ASYNC_SOURCE_GENERATOR), None
    return (Kind.PERIODIC if kind is Kind.FUNCTION else Kind.ASYNC_PERIODIC), options.get("interval", DEFAULT_INTERVAL)


def _names(functions: Sequence[Any], options: Sequence[Mapping[str, Any]], where: Sequence[str]) -> list[str]:
    taken: dict[str, str] = {}
    for own, place in zip(options, where, strict=True):
        if "name" in own:
            if own["name"] in taken:
                raise PipelineError(
                    f"{place} and {taken[own['name']]} are both named {own['name']!r}: "
                    'give one another name, e.g. operator(f, name="other")'
                )
            taken[own["name"]] = place
    names = []
    for fn, own, place in zip(functions, options, where, strict=True):
        base = name = own.get("name") or default_name(fn)
        number = 1
        while "name" not in own and name in taken:
            number += 1
            name = f"{base}-{number}"
        taken[name] = place
        names.append(name)
    return names


def check_profile(profile: Any, names: Sequence[str]) -> tuple[dict[str, float], ...]:
    """What is expected of each operator, in order; None is nothing. Raises `PipelineError`."""
    if profile is None:
        return ()
    entries = list(profile)
    if len(entries) != len(names):
        raise PipelineError(
            f"the profile has {len(entries)} entries for {len(names)} operators: give one each, in order"
        )
    for name, entry in zip(names, entries, strict=True):
        for key, value in dict(entry).items():
            if key not in PROFILE_FIELDS:
                raise PipelineError(f"profile of {name!r}: unknown {key!r}; known are {', '.join(PROFILE_FIELDS)}")
            if not _is_number(value) or value < 0:
                raise PipelineError(f"profile of {name!r}: {key} is {value!r}, but must be a number, not below 0")
    return tuple({key: float(value) for key, value in entry.items()} for entry in entries)


PROFILE_FIELDS = ("cloud_execution_time", "output_msg_size")


def _name_option(value: Any) -> str:
    if not isinstance(value, str) or not OPERATOR_NAME.fullmatch(value):
        raise PipelineError(
            f"name {value!r} is not valid: it takes 1 to 63 letters, digits, '-' and '_', the first a letter or '_'"
        )
    return value


def _memory_option(value: Any) -> float:
    try:
        size = units.memory_mb(value)
    except ValueError as exc:
        raise PipelineError(f"memory {exc}") from None
    if size <= 0:
        raise PipelineError(f"memory {value!r} is not valid: it must be above 0")
    return size


def _requires_option(value: Any) -> frozenset[str]:
    labels = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [None]
    for item in labels:
        if not isinstance(item, str) or not re.fullmatch(r"[^\s,]+", item):
            raise PipelineError(f'requires {value!r} is not valid: give a set of labels, e.g. {{"gpu"}}')
    return frozenset(labels)


def _on_error_option(value: Any) -> OnError:
    try:
        return OnError(value)
    except ValueError:
        near = difflib.get_close_matches(str(value), list(OnError), n=1)
        hint = f"did you mean {str(near[0])!r}?" if near else f"use one of {', '.join(repr(str(v)) for v in OnError)}"
        raise PipelineError(f"on_error {value!r} is unknown: {hint}") from None


def _retries_option(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PipelineError(f"retries {value!r} is not valid: give a whole number, 0 or more")
    return value


def _interval_option(value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise PipelineError(
            f"interval {value!r} is not valid: give seconds above 0; for as fast as possible, write a generator"
        )
    return float(value)


def _pin_option(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise PipelineError(f'pin {value!r} is not valid: give the id of a node, e.g. "fog"')
    return value


def _of_type(option: str, cls: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, cls):
            raise PipelineError(f"{option} {value!r} is not valid: give a {cls.__name__}")
        return value

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "name": ("name", _name_option),
    "memory": ("memory_mb", _memory_option),
    "requires": ("requires", _requires_option),
    "on_error": ("on_error", _on_error_option),
    "retries": ("retries", _retries_option),
    "copy_outputs": ("copy_outputs", _of_type("copy_outputs", bool)),
    "image": ("image", _of_type("image", str)),
    "pin": ("pin", _pin_option),
    "interval": ("interval", _interval_option),
    "requirements": ("requirements", needs.requirements),
    "environment": ("environment", needs.environment),
    "secrets": ("secrets", needs.secrets),
    "devices": ("devices", needs.devices),
}
"""Option -> the field it sets and the check that makes its value."""
