"""Values to bytes and back. Data only: nothing that is decoded here can run code.

A batch is one msgpack array. Types that msgpack lacks travel as extension types; large buffers
(numpy arrays, bytes) travel *out of band*: the body holds a reference, and the buffer itself is handed
to the transport without a copy and read in place at the other end, so arrays arrive read-only. bytearray and
memoryview arrive as bytes.

Classes travel by name. A name is looked up among the classes that came with the pipeline's signed bundle, then
among the plain types that the process has imported by itself; nothing is imported because a message says so.
`register` adds a codec for a class of one's own; dataclasses, named tuples and enums need none.

A pipeline that asks for the codec "pickle" by name gets pickle protocol 5, and with it the duty to
trust every node that the pipeline runs on.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import json
import math
import pickle
import sys
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import msgpack

from nomad.errors import PayloadError
from nomad.transport.base import Buffer

OUT_OF_BAND = 8 * 1024
"""Bytes from which a buffer travels out of band: below, a copy is cheaper than a part of its own."""

_TUPLE, _SET, _FROZENSET, _DATETIME, _DATE, _TIME, _TIMEDELTA = 1, 2, 3, 4, 5, 6, 7
_DECIMAL, _BIGINT, _COMPLEX, _UUID = 8, 9, 10, 11
_ARRAY, _ARRAY_INLINE, _SCALAR, _OBJECT, _BYTES = 12, 13, 14, 15, 16

MOST_NESTED = 64
"""How deep tuples, sets, objects and other extension types may be nested in each other (lists and dicts: 511).
msgpack takes 40 KiB of the C stack for each level when it decodes, and a stack that overflows kills the process."""
MOST_SHOWN = 200
"""How deep what is shown as JSON may be nested; pydantic writes no more than 250 levels."""

_DOWNCAST = (OrderedDict, defaultdict, Counter)


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """A codec for one class: `encode(value)` gives data of known types, `decode(data)` the value again."""

    cls: type
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


Types: TypeAlias = Mapping[str, "type | Registration"]
"""What may arrive by name: classes and registered codecs, as a pipeline's bundle carries them."""

_registry: dict[type, Registration] = {}


def register(cls: type, encode: Callable[[Any], Any], decode: Callable[[Any], Any], name: str | None = None) -> None:
    """Let messages carry instances of `cls`.

    `encode` turns an instance into data (any type that messages can carry), `decode` is its inverse.
    Call it where the operators are defined, before the pipeline is submitted: the codec travels with the
    pipeline's code. `name` defaults to `module:qualname`.
    """
    _registry[cls] = Registration(cls, name or type_name(cls), encode, decode)


def registered() -> dict[str, Registration]:
    """The codecs registered in this process, by name."""
    return {r.name: r for r in _registry.values()}


def type_name(cls: type) -> str:
    """The name under which a class travels."""
    return f"{cls.__module__}:{cls.__qualname__}"


def is_plain_type(cls: Any) -> bool:
    """Whether instances of `cls` travel by name without a registered codec."""
    if not isinstance(cls, type):
        return False
    return dataclasses.is_dataclass(cls) or issubclass(cls, enum.Enum) or _is_named_tuple(cls)


class Codec:
    """Encodes and decodes batches for one pipeline. One per thread that uses it: packers keep state.

    `mode` is "data" or "pickle"; `types` are the classes that may arrive by name.
    """

    def __init__(self, types: Types | None = None, mode: str = "data"):
        if mode not in ("data", "pickle"):
            raise PayloadError(f'unknown codec {mode!r}: use "data", or "pickle" for pipelines that need it')
        self.mode = mode
        self._classes: dict[str, type] = {}
        self._codecs = dict(registered())
        for name, entry in (types or {}).items():
            if isinstance(entry, Registration):
                self._codecs[name] = entry
            else:
                self._classes[name] = entry
        self._by_class = {r.cls: r for r in self._codecs.values()}
        self._names = {cls: name for name, cls in self._classes.items()}
        """A class that was defined in a function and travelled has lost its qualified name: the bundle knows it."""
        self._made: dict[type, bool] = {}
        self._packers: list[msgpack.Packer] = []
        self._depth = 0
        self._buffers: list[Buffer] | None = None
        packer = msgpack.Packer(use_bin_type=True, strict_types=True)
        self.pack: Callable[[list[Any]], bytes] | None = packer.pack if mode == "data" else None
        """`encode` of small values that msgpack knows, without a function in Python; raises anything for others."""
        ext_hook = functools.partial(self._ext, (), 1)
        self._unpack = functools.partial(msgpack.unpackb, ext_hook=ext_hook, strict_map_key=False, raw=False)
        self.unpack: Callable[[Buffer], Any] | None = self._unpack if mode == "data" else None
        """`decode` of a body that refers to no buffers, likewise."""

    def encode(self, values: list[Any]) -> tuple[bytes, list[Buffer]]:
        """A batch as its body and the buffers that travel out of band.

        Raises `PayloadError` when a value isn't data; no value of the batch is lost by it.
        """
        buffers: list[Buffer] = []
        if self.mode == "pickle":
            return _pickle(values, buffers), buffers
        if values and type(values[0]) is bytes:
            values = _bytes_out(values, buffers)
        self._buffers = buffers
        return self._pack(values), buffers

    def decode(self, body: Buffer, buffers: Sequence[Buffer] = (), *, batch: bool = True) -> Any:
        """The values of a batch. Arrays are read-only views of `buffers`. Raises `PayloadError`."""
        try:
            if self.mode == "pickle":
                values = pickle.loads(body, buffers=buffers)  # noqa: S301 - asked for by name
            elif buffers:
                values = self._unpack(body, ext_hook=functools.partial(self._ext, buffers, 1))
            else:
                values = self._unpack(body)
        except PayloadError:
            raise
        except Exception as exc:  # what the bytes say is tried, and registered codecs are the user's own code
            raise PayloadError(f"a message can't be decoded: {type(exc).__name__}: {exc}") from exc
        if batch and not isinstance(values, list):
            raise PayloadError("a message can't be decoded: it isn't a batch")
        return values

    def encode_one(self, value: Any) -> bytes:
        """One value, self-contained: nothing out of band."""
        if self.mode == "pickle":
            return _pickle(value, None)
        self._buffers = None
        return self._pack(value)

    def decode_one(self, data: Buffer) -> Any:
        """The inverse of `encode_one`."""
        return self.decode(data, batch=False)

    # -- encoding

    def _pack(self, value: Any) -> bytes:
        # Packers aren't reentrant, and `_default` packs what is inside an extension: one packer per depth.
        depth = self._depth
        if depth > MOST_NESTED:
            raise PayloadError(f"a value can't be sent: it is nested deeper than {MOST_NESTED} levels")
        if depth == len(self._packers):
            self._packers.append(msgpack.Packer(use_bin_type=True, strict_types=True, default=self._default))
        self._depth = depth + 1
        try:
            return self._packers[depth].pack(value)  # type: ignore[no-any-return]
        except PayloadError:
            raise
        except Exception as exc:  # a registered codec and the attributes of an object are the user's own code
            raise PayloadError(f"a value can't be sent: {type(exc).__name__}: {exc}") from exc
        finally:
            self._depth = depth

    def _default(self, value: Any) -> Any:
        cls = type(value)
        if cls is tuple:
            return msgpack.ExtType(_TUPLE, self._pack(list(value)))
        if (registration := self._by_class.get(cls)) is not None:
            return msgpack.ExtType(_OBJECT, self._pack([registration.name, registration.encode(value)]))
        if (simple := _SIMPLE.get(cls)) is not None:
            code, encode = simple
            return msgpack.ExtType(code, self._pack(encode(value)))
        if cls.__module__ == "numpy" and (packed := self._numpy(value)) is not None:
            return packed
        if isinstance(value, enum.Enum):
            # Members of a flag can be combined to values without a name.
            member = value.value if isinstance(value, enum.Flag) else value.name
            return msgpack.ExtType(_OBJECT, self._pack([self._name(cls), member]))
        if dataclasses.is_dataclass(cls) and self._plain(cls):
            state = {f.name: getattr(value, f.name) for f in dataclasses.fields(cls)}
            return msgpack.ExtType(_OBJECT, self._pack([self._name(cls), state]))
        if _is_named_tuple(cls):
            return msgpack.ExtType(_OBJECT, self._pack([self._name(cls), dict(zip(cls._fields, value, strict=True))]))
        if cls in _DOWNCAST:
            return dict(value)
        raise PayloadError(
            f"a message can't carry {type_name(cls).replace('builtins:', '').replace(':', '.')}. Return plain data "
            "(numbers, text, bytes, lists, dicts, dates, numpy arrays), make it a dataclass, give it a codec with "
            'nomad.register(cls, encode, decode), or submit the pipeline with codec="pickle".'
        )

    def _name(self, cls: type) -> str:
        return self._names.get(cls) or type_name(cls)

    def _plain(self, cls: type) -> bool:
        """Whether `_object` can make an instance from fields alone; not if the class is an exception or a list, too."""
        if cls not in self._made:
            try:
                object.__new__(cls)
            except TypeError:
                self._made[cls] = False
            else:
                self._made[cls] = True
        return self._made[cls]

    def _numpy(self, value: Any) -> Any:
        np = sys.modules["numpy"]
        if isinstance(value, np.generic):
            if value.dtype.hasobject or value.dtype.kind == "V":
                return None
            if not value.dtype.itemsize:  # empty text or bytes: nothing that numpy could read back
                return value.item()
            return msgpack.ExtType(_SCALAR, self._pack([value.dtype.str, value.tobytes()]))
        if not isinstance(value, np.ndarray) or type(value) not in (np.ndarray, np.memmap):
            return None
        if value.dtype.hasobject:
            raise PayloadError(
                "a message can't carry a numpy array of Python objects (dtype=object): give it a numeric or "
                "fixed-width dtype, or return a list"
            )
        if not value.dtype.itemsize:
            raise PayloadError(f"a message can't carry a numpy array of dtype {value.dtype}, whose items have no bytes")
        descr = np.lib.format.dtype_to_descr(value.dtype)
        shape = list(value.shape)
        if self._buffers is None or value.nbytes < OUT_OF_BAND:
            return msgpack.ExtType(_ARRAY_INLINE, self._pack([descr, shape, value.tobytes()]))
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        self._buffers.append(memoryview(flat).toreadonly())
        return msgpack.ExtType(_ARRAY, self._pack([descr, shape, len(self._buffers) - 1]))

    # -- decoding

    def _ext(self, buffers: Sequence[Buffer], depth: int, code: int, data: bytes) -> Any:
        if code == _BYTES:
            return bytes(buffers[msgpack.unpackb(data)])
        _check_depth(depth)
        value = _unpack(data, functools.partial(self._ext, buffers, depth + 1))
        if code == _TUPLE:
            return tuple(value)
        if code in _RESTORE:
            return _RESTORE[code](value)
        if code == _OBJECT:
            return self._object(*value)
        if code in (_ARRAY, _ARRAY_INLINE, _SCALAR):
            return _restore_numpy(code, value, buffers)
        raise PayloadError(f"a message holds an unknown extension type {code}: the sender runs a newer Nomad")

    def _object(self, name: str, state: Any) -> Any:
        if (registration := self._codecs.get(name)) is not None:
            return registration.decode(state)
        cls = self._classes.get(name) or _imported(name)
        if cls is None:
            raise PayloadError(
                f"a message holds {name.replace(':', '.')}, which this operator's code doesn't know: define the class "
                "in the module of the operators, so that it travels with the pipeline"
            )
        if issubclass(cls, enum.Flag):
            return cls(state)
        if issubclass(cls, enum.Enum):
            return cls[state]
        if _is_named_tuple(cls):
            return cls(**state)
        value = object.__new__(cls)  # as it was, without running __init__ or __post_init__ again
        for key in (f.name for f in dataclasses.fields(cls)):  # type: ignore[arg-type]
            object.__setattr__(value, key, state[key])
        return value


def _bytes_out(values: list[Any], buffers: list[Buffer]) -> list[Any]:
    """`values` with references instead of large bytes, which are put with `buffers`."""
    out = []
    for value in values:
        if type(value) is bytes and len(value) >= OUT_OF_BAND:
            number = len(buffers)
            buffers.append(value)
            value = _REFERENCES[number] if number < len(_REFERENCES) else _reference(number)
        out.append(value)
    return out


def _reference(number: int) -> msgpack.ExtType:
    return msgpack.ExtType(_BYTES, msgpack.packb(number))


_REFERENCES = tuple(map(_reference, range(64)))


def encode_one(value: Any, codec: str = "data") -> bytes:
    """One value, self-contained. Raises `PayloadError`."""
    return Codec(mode=codec).encode_one(value)


def decode_one(data: Buffer, types: Types | None = None, codec: str = "data") -> Any:
    """The value in `data`. Raises `PayloadError`."""
    return Codec(types, codec).decode_one(data)


def to_jsonable(data: Buffer) -> Any:
    """An encoded value as JSON can show it, without needing its classes. Raises `PayloadError`.

    Arrays become `{"$ndarray": {"dtype", "shape"}}`, bytes `{"$bytes": base64}`, objects
    `{"$type": name, ...fields}`; tuples and sets become lists, keys, dates, decimals and the rest text.
    """
    try:
        shown = _jsonable(_unpack(data, lambda code, part: _show_ext(code, part, 1), object_pairs_hook=_Pairs))
    except PayloadError:
        raise
    except Exception as exc:  # as in `Codec._decoded`
        raise PayloadError(f"a message can't be shown: {type(exc).__name__}: {exc}") from exc
    _check_shown(shown, MOST_SHOWN)
    return shown


class _Pairs(list[tuple[Any, Any]]):
    """A map whose keys, shown, may not be hashable any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown:
    """What stands for a value, as JSON has it already."""

    value: Any


def _jsonable(value: Any) -> Any:
    if isinstance(value, _Shown):
        return value.value
    if isinstance(value, _Pairs):
        return {_key(k): _jsonable(v) for k, v in value}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _check_shown(shown: Any, levels: int) -> None:
    if not levels:
        raise PayloadError(f"a message can't be shown: it is nested deeper than {MOST_SHOWN} levels")
    for part in shown.values() if isinstance(shown, dict) else shown if isinstance(shown, list) else ():
        if isinstance(part, (dict, list)):
            _check_shown(part, levels - 1)


def _key(value: Any) -> str:
    shown = _jsonable(value)
    return shown if isinstance(shown, str) else json.dumps(shown)


def _show_ext(code: int, data: bytes, depth: int) -> Any:
    _check_depth(depth)
    value = _unpack(data, lambda inner, part: _show_ext(inner, part, depth + 1), object_pairs_hook=_Pairs)
    if code in (_ARRAY, _ARRAY_INLINE):
        return _Shown({"$ndarray": {"dtype": _jsonable(value[0]), "shape": _jsonable(value[1])}})
    if code == _OBJECT:
        name, state = value
        fields = _jsonable(state)
        return _Shown({"$type": name, **(fields if isinstance(fields, dict) else {"value": fields})})
    if code == _SCALAR:
        return _restore_numpy(code, value, ()).item()
    if code in (_TUPLE, _SET, _FROZENSET):
        return value
    if code in (_DATETIME, _TIME):
        return value[0]
    if code in _RESTORE:
        return _RESTORE[code](value)
    return value


def _unpack(data: Buffer, ext: Callable[[int, bytes], Any], **options: Any) -> Any:
    return msgpack.unpackb(data, ext_hook=ext, strict_map_key=False, raw=False, **options)


def _check_depth(depth: int) -> None:
    if depth > MOST_NESTED:
        raise PayloadError(f"a message is nested deeper than {MOST_NESTED} levels")


def _pickle(value: Any, buffers: list[Buffer] | None) -> bytes:
    def out_of_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND:
            return True
        buffers.append(view.toreadonly())  # type: ignore[union-attr]
        return False

    try:
        return pickle.dumps(value, protocol=5, buffer_callback=None if buffers is None else out_of_band)
    except Exception as exc:  # pickling runs the user's __reduce__, which may raise anything
        raise PayloadError(f"a value can't be pickled: {exc}") from exc


def _is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and cls is not tuple and hasattr(cls, "_fields")


def _imported(name: str) -> type | None:
    """A plain type that this process has already imported on its own account.

    A message can't cause an import, so what a module's `__getattr__` would give isn't asked for.
    """
    module_name, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        if not hasattr(found, "__dict__"):
            return None
        found = vars(found).get(part)
    return found if is_plain_type(found) and type_name(found) == name else None


def _datetime(value: dt.datetime | dt.time) -> list[Any]:
    zone = value.tzinfo.key if isinstance(value.tzinfo, zoneinfo.ZoneInfo) else None
    return [value.isoformat(), zone, value.fold]


def _restore_datetime(cls: type[dt.datetime] | type[dt.time], state: list[Any]) -> dt.datetime | dt.time:
    text, zone, fold = state
    value = cls.fromisoformat(text)
    if zone is not None:
        value = value.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    return value.replace(fold=fold)


def _restore_numpy(code: int, value: list[Any], buffers: Sequence[Buffer]) -> Any:
    try:
        import numpy as np
    except ImportError as exc:
        raise PayloadError(
            "a message holds a numpy array, but numpy is not installed where this operator runs"
        ) from exc
    if code == _SCALAR:
        return np.frombuffer(value[1], dtype=np.dtype(value[0]))[0]
    descr, shape, content = value
    buffer = buffers[content] if code == _ARRAY else content
    array = np.frombuffer(buffer, dtype=np.lib.format.descr_to_dtype(descr)).reshape(shape)
    array.flags.writeable = False
    return array


_SIMPLE: dict[type, tuple[int, Callable[[Any], Any]]] = {
    set: (_SET, list),
    frozenset: (_FROZENSET, list),
    dt.datetime: (_DATETIME, _datetime),
    dt.date: (_DATE, dt.date.isoformat),
    dt.time: (_TIME, _datetime),
    dt.timedelta: (_TIMEDELTA, lambda v: [v.days, v.seconds, v.microseconds]),
    decimal.Decimal: (_DECIMAL, str),
    int: (_BIGINT, lambda v: v.to_bytes(v.bit_length() // 8 + 1, "little", signed=True)),
    complex: (_COMPLEX, lambda v: [v.real, v.imag]),
    uuid.UUID: (_UUID, lambda v: v.bytes),
}

_RESTORE: dict[int, Callable[[Any], Any]] = {
    _SET: set,
    _FROZENSET: frozenset,
    _DATETIME: lambda v: _restore_datetime(dt.datetime, v),
    _DATE: dt.date.fromisoformat,
    _TIME: lambda v: _restore_datetime(dt.time, v),
    _TIMEDELTA: lambda v: dt.timedelta(*v),
    _DECIMAL: decimal.Decimal,
    _BIGINT: lambda v: int.from_bytes(v, "little", signed=True),
    _COMPLEX: lambda v: complex(*v),
    _UUID: lambda v: uuid.UUID(bytes=v),
}
