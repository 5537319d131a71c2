"""Functions to bytes, with a record of what they need. `make` is the only caller.

cloudpickle pickles what is defined in `__main__` by value and the rest by reference. Here the user's own
modules, which no pod could import, go by value as well: whatever of them the function reaches. Modules that
it imports in its body don't show in its globals; they travel whole, beside the function.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import io
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import cloudpickle

from nomad.bundle.environment import Modules, Origin
from nomad.errors import BundleError

PROTOCOL = 5
_lock = threading.Lock()  # what cloudpickle pickles by value is a setting of the process


class Recorder(cloudpickle.Pickler):  # type: ignore[misc]
    """A pickler that notes what its objects need to be loaded, and takes the user's own modules by value."""

    def __init__(self, file: io.BytesIO, modules: Modules):
        super().__init__(file, protocol=PROTOCOL)
        self.modules = modules
        self.packages: dict[str, str] = {}
        self.imports: dict[str, set[str]] = {}
        self.body_imports: dict[str, types.ModuleType] = {}
        """The user's own modules that functions import in their bodies."""
        self.classes: dict[int, type] = {}
        """Classes taken by value."""
        self.namespaces: dict[int, dict[str, Any]] = {}
        """The globals of the functions and modules taken by value."""
        self._by_value: list[types.ModuleType] = []

    def reducer_override(self, obj: Any) -> Any:
        module = obj.__name__ if isinstance(obj, types.ModuleType) else getattr(obj, "__module__", None)
        origin = self._need(module) if isinstance(module, str) else None
        if type(obj).__module__ != module:
            self._need(type(obj).__module__)
        if isinstance(obj, types.ModuleType) and origin is Origin.LOCAL:
            # cloudpickle would pickle the module's globals before it has noted the module, and never end on a cycle
            state = {key: value for key, value in vars(obj).items() if key not in _NOT_CARRIED}
            self.namespaces[id(vars(obj))] = vars(obj)
            return types.ModuleType, (obj.__name__,), state
        if isinstance(obj, functools.cached_property):  # that of Python 3.11 holds a lock
            return functools.cached_property, (obj.func,), {"attrname": obj.attrname}
        if isinstance(obj, functools._lru_cache_wrapper) and (origin is Origin.LOCAL or module == "__main__"):
            return cached, (obj.__wrapped__, obj.cache_parameters())
        reduced = super().reducer_override(obj)
        if reduced is not NotImplemented:
            if isinstance(obj, types.FunctionType):
                self.namespaces[id(obj.__globals__)] = obj.__globals__
                for name in imported_names(obj):
                    self._need_in_body(name)
            elif isinstance(obj, type):
                self.classes[id(obj)] = obj
        return reduced

    def release(self) -> None:
        """Undo what was set in cloudpickle."""
        for module in self._by_value:
            cloudpickle.unregister_pickle_by_value(module)
        self._by_value.clear()

    def _need(self, name: str) -> Origin:
        found = self.modules.find(name)
        for dist, version in found.distributions:
            self.packages[dist] = version
            self.imports.setdefault(dist, set()).add(name.partition(".")[0])
        if found.origin is Origin.EXTENSION:
            raise BundleError(
                f"it uses {name!r}, a compiled module, which can't travel: "
                "install it as a package, here and where the operators run"
            )
        if found.origin is Origin.LOCAL:
            module = sys.modules.get(name)
            if module is not None and name not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                self._by_value.append(module)
        return found.origin

    def _need_in_body(self, name: str) -> None:
        if self.modules.find(name).origin is not Origin.LOCAL:
            self._need(name)
            return
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            try:
                self.body_imports[parent] = importlib.import_module(parent)
            except Exception as exc:  # importing runs the user's code, which may raise anything
                raise BundleError(f"it imports {parent!r}, which fails: {type(exc).__name__}: {exc}") from exc


def cached(function: Any, parameters: dict[str, Any]) -> Any:
    """`function` with an empty cache: what has been computed here stays here. Pickles call this by its name."""
    return functools.lru_cache(**parameters)(function)


_NOT_CARRIED = frozenset(("__builtins__", "__loader__", "__spec__", "__cached__"))


def imported_names(function: types.FunctionType) -> Iterator[str]:
    """The modules that `function`, or a function nested in it, imports in its body."""
    package = function.__globals__.get("__package__") or ""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes.extend(const for const in code.co_consts if isinstance(const, types.CodeType))
        constants: list[Any] = []
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                level, names = constants[-2], constants[-1]
                base = instruction.argval
                if level:
                    try:
                        base = importlib.util.resolve_name("." * level + base, package)
                    except ImportError:
                        continue  # a relative import outside a package fails where it runs, too
                yield base
                for name in names or ():
                    yield f"{base}.{name}"  # a module, or else anything in `base`
            elif instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
                constants.append(instruction.argval)


@contextlib.contextmanager
def recorded(modules: Modules) -> Iterator[Any]:
    """`dumps(obj) -> (bytes, Recorder)`, with cloudpickle's settings put back at the end."""
    recorders: list[Recorder] = []

    def dumps(obj: Any) -> tuple[bytes, Recorder]:
        buffer = io.BytesIO()
        recorder = Recorder(buffer, modules)
        recorders.append(recorder)
        recorder.dump(obj)
        return buffer.getvalue(), recorder

    with _lock:
        try:
            yield dumps
        finally:
            for recorder in recorders:
                recorder.release()


def culprit(obj: Any, dumps: Any) -> tuple[list[str], Any]:
    """The smallest part of `obj` that can't be pickled, and the way to it, in words."""
    if isinstance(obj, tuple):  # (function, carried modules): their place in the bundle is of no interest
        obj = next((part for part in (obj[0], *obj[1].values()) if not _can(part, dumps)), obj)
    path = [f"module {obj.__name__!r}"] if isinstance(obj, types.ModuleType) else []
    seen = {id(obj)}
    while True:
        for step, part in _parts(obj):
            if id(part) not in seen and not _can(part, dumps):
                seen.add(id(part))
                path.append(step)
                obj = part
                break
        else:
            return path, obj


def _can(obj: Any, dumps: Any) -> bool:
    try:
        dumps(obj)
    except Exception:  # noqa: BLE001 - pickling runs the user's __reduce__, which may raise anything
        return False
    return True


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, types.FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                yield f"variable {name!r} of the enclosing function", cell.cell_contents
        for name in _global_names(obj.__code__):
            if name in obj.__globals__:
                yield f"global {name!r}", obj.__globals__[name]
        yield from ((f"default {i}", v) for i, v in enumerate(obj.__defaults__ or ()))
        yield from ((f"default of {k!r}", v) for k, v in (obj.__kwdefaults__ or {}).items())
        yield from ((f"attribute {k!r}", v) for k, v in vars(obj).items())
    elif isinstance(obj, types.MethodType):
        yield f"its object of class {type(obj.__self__).__name__}", obj.__self__
        yield f"method {obj.__name__!r}", obj.__func__
    elif isinstance(obj, functools.partial):
        yield "function", obj.func
        yield from ((f"bound argument {i}", v) for i, v in enumerate(obj.args))
        yield from ((f"bound argument {k!r}", v) for k, v in obj.keywords.items())
    elif isinstance(obj, types.ModuleType):
        yield from ((f"global {k!r}", v) for k, v in vars(obj).items() if k not in _NOT_CARRIED)
    elif isinstance(obj, type):
        yield from ((f"class attribute {k!r}", v) for k, v in vars(obj).items() if not k.startswith("__weakref"))
    elif isinstance(obj, dict):
        yield from ((f"item {k!r}", v) for k, v in obj.items())
    elif isinstance(obj, (list, tuple, set, frozenset)):
        yield from ((f"item {i}", v) for i, v in enumerate(obj))
    else:
        yield from ((f"attribute {k!r}", v) for k, v in getattr(obj, "__dict__", {}).items())
        for cls in type(obj).__mro__:
            for slot in _slots(cls):
                if hasattr(obj, slot):
                    yield f"attribute {slot!r}", getattr(obj, slot)
        yield f"class {type(obj).__name__}", type(obj)


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _global_names(const)
