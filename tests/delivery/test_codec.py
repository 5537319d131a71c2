from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import json
import math
import sys
import threading
import types
import uuid
import zoneinfo
from typing import Any, ClassVar, NamedTuple

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pydantic import TypeAdapter

import nomad
from nomad.delivery import codec
from nomad.delivery.codec import MOST_NESTED, MOST_SHOWN, OUT_OF_BAND, Codec, decode_one, encode_one, to_jsonable
from nomad.errors import PayloadError

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: float
    y: float = 0.0


@dataclasses.dataclass
class Face:
    name: str
    box: Point
    kind: Colour = Colour.RED
    tags: list[str] = dataclasses.field(default_factory=list)
    seen: ClassVar[int] = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    number: int
    inner: Face | None = None


@dataclasses.dataclass
class Checked:
    """Made again as it was: neither `__init__` nor `__post_init__` runs a second time."""

    given: dataclasses.InitVar[int]
    doubled: int = dataclasses.field(init=False)

    def __post_init__(self, given: int) -> None:
        self.doubled = given * 2


@dataclasses.dataclass
class Trouble(Exception):
    code: int


class Opaque:
    """Not data."""


class Vector:
    """Has a codec in `VECTOR`."""

    def __init__(self, *parts: int) -> None:
        self.parts = parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vector) and other.parts == self.parts


VECTOR = codec.Registration(Vector, "vector", lambda v: list(v.parts), lambda parts: Vector(*parts))


def again(values: list[Any], **options: Any) -> list[Any]:
    coder = Codec(**options)
    return coder.decode(*coder.encode(values))


def identical(a: Any, b: Any) -> bool:
    """Equal, of the same types, NaNs too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(identical, a.values(), b.values()))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


VALUES: list[Any] = [
    None, True, 0, -1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**40, -(10**40),
    1.5, -0.0, math.nan, math.inf,
    "", "text", "näïve 漢字 \0", b"", b"bytes", [], [1, [2, [3]]], {}, {"a": 1, 2: b"x", None: [], (1, 2): {3}},
    (), (1,), (1, (2, [3, (4,)])), set(), {"a"}, {1, (2, 3)}, frozenset({1, frozenset({2})}),
    1 + 2j, decimal.Decimal("1.10"), decimal.Decimal("-0"), decimal.Decimal("1E+999"), uuid.UUID(int=5),
    dt.date(2024, 2, 29), dt.timedelta(days=-1, microseconds=7), dt.timedelta.max, dt.timedelta.min,
    dt.datetime(2024, 1, 2, 3, 4, 5, 6), dt.datetime.min, dt.datetime.max,
    dt.datetime(2024, 1, 2, tzinfo=dt.UTC),
    dt.datetime(2024, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=-3, seconds=1))),
    dt.time(1, 2, 3, 4), dt.time(1, 2, tzinfo=dt.UTC),
    Colour.RED, Level.HIGH, Access.READ | Access.WRITE, Access(0), Point(1.0), [Point(1.0, 2.0)],
    Face("a", Point(1.0), Colour.GREEN, ["x"]), Frozen(1, Frozen(2).inner), Frozen(1, Face("b", Point(0.5))),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_comes_back_as_it_was(value: Any) -> None:
    for got in (*again([value]), again([[value, 1], {"k": value}])[0][0], decode_one(encode_one(value))):
        assert identical(got, value)


def test_datetimes_keep_their_zone_and_their_fold() -> None:
    for fold in (0, 1):  # the hour that Berlin has twice
        moment = dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=fold)
        got = decode_one(encode_one(moment))
        assert got == moment
        assert (got.tzinfo, got.fold, got.utcoffset()) == (BERLIN, fold, moment.utcoffset())
        alarm = dt.time(2, 30, tzinfo=BERLIN, fold=fold)
        got = decode_one(encode_one(alarm))
        assert (got, got.tzinfo, got.fold) == (alarm, BERLIN, fold)


def test_bytearrays_and_memoryviews_arrive_as_bytes() -> None:
    assert again([bytearray(b"ab"), memoryview(b"cd"), [bytearray(b"e" * OUT_OF_BAND)]]) == [
        b"ab",
        b"cd",
        [b"e" * OUT_OF_BAND],
    ]


def test_dict_subclasses_arrive_as_dicts() -> None:
    values = [collections.OrderedDict(b=1, a=2), collections.defaultdict(list, a=[1]), collections.Counter("aab")]
    got = again(values)
    assert got == values
    assert [type(v) for v in got] == [dict, dict, dict]
    assert list(got[0]) == ["b", "a"]


def test_a_dataclass_is_made_again_without_its_init() -> None:
    value = Checked(3)
    value.doubled = 7
    assert decode_one(encode_one(value)).doubled == 7


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.decimals(allow_nan=False)
    | st.datetimes(timezones=st.none() | st.just(BERLIN)) | st.dates() | st.times() | st.timedeltas() | st.uuids()
    | st.complex_numbers(allow_nan=False) | st.sampled_from([*Colour, *Level, *Access]),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=30)
@given(st.lists(PLAIN, max_size=5))
def test_any_plain_data_comes_back(values: list[Any]) -> None:
    assert identical(again(values), values)
    assert identical(decode_one(encode_one(values)), values)
    json.dumps(to_jsonable(encode_one(values)), allow_nan=False)


# numpy


ARRAYS = [
    np.arange(6, dtype="<i4"), np.arange(6, dtype=">f8").reshape(2, 3), np.array(7), np.array(True), np.zeros((0, 3)),
    np.zeros((3, 0), "u1"), np.asfortranarray(np.arange(12).reshape(3, 4)), np.arange(20)[::-3],
    np.arange(24).reshape(4, 6)[1:3, ::2],
    np.array(["a", "lång"]), np.array([b"x", b"yz"]), np.array([1 + 2j]), np.array([1.5], dtype="f2"),
    np.array(["2024-01-01", "NaT"], dtype="M8[ns]"), np.array([3], dtype="m8[s]"),
    np.array([(1, 2.5, b"ab")], dtype=[("a", "<i2"), ("b", ">f4"), ("c", "S3")]),
    np.zeros(2, dtype=[("m", "f4", (2, 3)), ("n", [("x", "u1"), ("y", "i8")])]),
    np.zeros(2, dtype=np.dtype({"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [0, 8], "itemsize": 24})),
    np.array([b"\1\2\3\4"], dtype="V4"),
]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
@pytest.mark.parametrize("times", [1, OUT_OF_BAND])
def test_arrays_come_back_read_only(array: np.ndarray, times: int) -> None:
    """Small ones in the body, large ones out of band; in a batch and alone."""
    if times > 1:
        array = np.repeat(array, times, axis=0) if array.ndim else np.broadcast_to(array, (times, 3))
    for got in (*again([array]), again([{"k": (array,)}])[0]["k"][0], decode_one(encode_one(array))):
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert got.tobytes() == array.tobytes()
        assert not got.flags.writeable


@settings(max_examples=50)
@given(npst.arrays(npst.array_dtypes() | npst.scalar_dtypes(), npst.array_shapes(min_dims=0, min_side=0, max_dims=4)))
def test_any_array_comes_back(array: np.ndarray) -> None:
    try:
        (got,) = again([array])
    except PayloadError:
        assert not array.dtype.itemsize
        return
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert got.tobytes() == array.tobytes()


SCALARS = [
    np.float32(1.5), np.int8(-3), np.bool_(True), np.str_("äb"), np.bytes_(b"xy"),
    np.datetime64("2024-01-01T00:00", "s"),
]  # fmt: skip


@pytest.mark.parametrize("scalar", SCALARS, ids=repr)
def test_numpy_scalars_keep_their_type(scalar: np.generic) -> None:
    got = decode_one(encode_one(scalar))
    assert got == scalar
    assert got.dtype == scalar.dtype
    json.dumps(to_jsonable(encode_one(scalar)))


def test_empty_numpy_text_arrives_as_plain_text() -> None:
    assert again([np.str_(""), np.bytes_(b"")]) == ["", b""]


def test_large_buffers_are_not_copied_on_either_side() -> None:
    image = np.zeros((64, OUT_OF_BAND // 64), "u1")
    text = b"x" * OUT_OF_BAND
    body, buffers = Codec().encode([image, {"deep": [image[:32]]}, image])
    assert len(body) < OUT_OF_BAND / 2 + 100
    assert all(np.shares_memory(np.frombuffer(b, "u1"), image) for b in buffers)
    first, deep, again_ = Codec().decode(body, buffers)
    assert np.shares_memory(first, image)
    assert np.shares_memory(again_, image)
    assert not np.shares_memory(deep["deep"][0], image)  # half of it is small enough to be copied into the body
    body, buffers = Codec().encode([text, b"small", text])
    assert [b is text for b in buffers] == [True, True]
    assert Codec().decode(body, buffers) == [text, b"small", text]


def test_what_encodes_alone_has_nothing_out_of_band() -> None:
    value = [np.zeros(OUT_OF_BAND), b"x" * OUT_OF_BAND]
    assert identical(decode_one(encode_one(value)), value)


@pytest.mark.parametrize(
    "array",
    [np.array([object()]), np.array([1, "a"], dtype=object), np.zeros(1, dtype=[("a", "O")]), np.zeros(2, "V0")],
    ids=lambda a: str(a.dtype),
)
def test_arrays_without_plain_bytes_are_refused(array: np.ndarray) -> None:
    with pytest.raises(PayloadError, match="numpy array"):
        encode_one(array)


# Classes


def test_a_registered_codec_carries_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_registry", {})
    codec.register(Vector, lambda v: list(v.parts), lambda parts: Vector(*parts), "vector")
    assert codec.registered() == {"vector": codec.registered()["vector"]}
    assert again([[Vector(1, 2)]]) == [[Vector(1, 2)]]
    assert decode_one(encode_one(Vector(3))) == Vector(3)
    assert to_jsonable(encode_one(Vector(3))) == {"$type": "vector", "value": [3]}


def test_a_codec_that_came_with_the_bundle_carries_a_class() -> None:
    coder = Codec({"vector": VECTOR})
    assert coder.decode(*coder.encode([Vector(1)])) == [Vector(1)]
    with pytest.raises(PayloadError, match="vector, which this operator's code doesn't know"):
        decode_one(coder.encode_one(Vector(1)))


def test_classes_that_came_with_the_bundle_are_found_by_name() -> None:
    made = dataclasses.make_dataclass("Made", ["x"])
    made.__module__ = "users_module"
    data = encode_one(made(5))
    with pytest.raises(PayloadError, match="users_module.Made, which this operator's code doesn't know"):
        decode_one(data)
    assert decode_one(data, {"users_module:Made": made}).x == 5


def test_a_class_travels_under_the_name_that_the_bundle_gives_it() -> None:
    """A class of a function's body has lost its qualified name in the process that it travelled to."""
    travelled = dataclasses.make_dataclass("Local", ["x"], namespace={"__module__": "users"})
    other = dataclasses.make_dataclass("Local", ["y"], namespace={"__module__": "users"})
    coder = Codec({"users:f.<locals>.Local": travelled, "users:g.<locals>.Local": other})
    first, second = coder.decode(*coder.encode([travelled(1), other(2)]))
    assert (type(first), type(second)) == (travelled, other)


@pytest.mark.parametrize(
    "value",
    [Opaque(), [Opaque()], {"a": (Opaque(),)}, Frozen(1, Opaque()), Point(Opaque())],  # type: ignore[arg-type]
    ids=["alone", "list", "tuple", "dataclass", "named tuple"],
)
def test_an_unknown_type_is_named_with_the_way_out(value: Any) -> None:
    with pytest.raises(PayloadError) as caught:
        Codec().encode([1, value])
    message = str(caught.value)
    assert f"{__name__}.Opaque" in message
    assert 'codec="pickle"' in message
    assert "nomad.register(" in message
    assert callable(nomad.register)


@pytest.mark.parametrize(
    "value",
    [
        print,
        lambda: 0,
        Opaque,
        fractions.Fraction(1, 2),
        range(3),
        iter(()),
        sys,
        type("T", (str,), {})("x"),
        Trouble(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_data_is_refused(value: Any) -> None:
    with pytest.raises(PayloadError, match=r"can't carry .*\. Return plain data"):
        encode_one(value)


@pytest.mark.parametrize("value", ["\ud800", memoryview(bytes(8))[::2]], ids=["surrogate", "strided memoryview"])
def test_what_msgpack_refuses_is_refused_as_a_payload(value: Any) -> None:
    with pytest.raises(PayloadError, match="a value can't be sent"):
        encode_one(value)


def test_an_error_in_the_users_codec_is_an_error_of_the_value() -> None:
    def fails(value: Any) -> Any:
        raise LookupError("of mine")

    encoding = Codec({"vector": dataclasses.replace(VECTOR, encode=fails)})
    with pytest.raises(
        PayloadError, match=r"can't be sent: LookupError: 'of mine'|can't be sent: LookupError: of mine"
    ):
        encoding.encode([Vector(1)])
    decoding = Codec({"vector": dataclasses.replace(VECTOR, decode=fails)})
    with pytest.raises(PayloadError, match="can't be decoded: LookupError"):
        decoding.decode(*Codec({"vector": VECTOR}).encode([Vector(1)]))


def test_a_dataclass_with_a_missing_field_is_refused() -> None:
    value = Face("a", Point(1.0))
    del value.name
    with pytest.raises(PayloadError, match="AttributeError"):
        encode_one(value)


def test_a_failing_encode_leaves_the_codec_usable() -> None:
    coder = Codec({"vector": VECTOR})
    good = [1, (2, Vector(3)), np.zeros(OUT_OF_BAND)]
    for bad in (Opaque(), (1, [(Opaque(),)]), Vector(Opaque()), "\ud800", nested(tuple, MOST_NESTED + 1)):
        with pytest.raises(PayloadError):
            coder.encode([*good, bad])
        with pytest.raises(PayloadError):
            coder.encode_one(bad)
        assert identical(coder.decode(*coder.encode(good))[2], good[2])
        assert coder.decode_one(coder.encode_one(good[:2])) == good[:2]


# What a message must not do


def extension(code: int, content: Any) -> bytes:
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb(content)))


OBJECT = 15


@pytest.mark.parametrize(
    "name",
    [
        f"{__name__}:Opaque", "builtins:object", "os:system", "subprocess:Popen", "builtins:eval",
        f"{__name__}:Trouble.__class__", "::", "", ":",
    ],
)  # fmt: skip
def test_a_message_can_not_make_what_is_not_plain_data(name: str) -> None:
    for state in ({}, [], "x"):
        with pytest.raises(PayloadError, match="which this operator's code doesn't know"):
            decode_one(extension(OBJECT, [name, state]))


def test_a_message_can_not_cause_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    lazy = types.ModuleType("lazy")
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    before = set(sys.modules)
    for name in ("wave:Wave_params", "lazy:Thing", "lazy:Thing.Inner"):
        with pytest.raises(PayloadError, match="doesn't know"):
            decode_one(extension(OBJECT, [name, {}]))
    assert set(sys.modules) == before
    assert asked == []


@given(st.integers(-1, 20), PLAIN)
def test_malformed_content_is_a_payload_error(code: int, content: Any) -> None:
    data = msgpack.packb(msgpack.ExtType(code & 127, encode_one(content)))
    for read in (decode_one, to_jsonable, Codec().decode):
        try:
            read(data)
        except PayloadError:
            pass


@given(st.binary(max_size=60))
def test_garbage_is_a_payload_error(data: bytes) -> None:
    for read in (decode_one, to_jsonable, Codec().decode):
        try:
            read(data)
        except PayloadError:
            pass


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x05N", b"garbage", b"\xff" * 60])
def test_a_pickle_that_is_none_is_a_payload_error(data: bytes) -> None:
    """Not of any bytes: some have Python take 64 GB, and a pipeline that wants pickles trusts who sends them."""
    with pytest.raises(PayloadError):
        decode_one(data, codec="pickle")


@given(st.data())
def test_a_damaged_message_is_a_payload_error(data: st.DataObject) -> None:
    body, buffers = Codec().encode(
        [Face("a", Point(1.0)), np.zeros(2, [("a", "i4")]), {1: dt.datetime(2024, 1, 1, tzinfo=BERLIN)}]
    )
    at = data.draw(st.integers(0, len(body) - 1))
    damaged = body[:at] + bytes([data.draw(st.integers(0, 255))]) + body[at + 1 :]
    try:
        Codec().decode(damaged[: data.draw(st.integers(at, len(body)))], buffers)
    except PayloadError:
        pass


@pytest.mark.parametrize("zone", ["Europe", "../../../etc/passwd", "No/Such", ""])
def test_a_time_zone_that_is_none_is_a_payload_error(zone: str) -> None:
    with pytest.raises(PayloadError, match="can't be decoded"):
        decode_one(extension(4, ["2024-01-01T00:00:00+01:00", zone, 0]))


def test_a_batch_is_a_list() -> None:
    with pytest.raises(PayloadError, match="isn't a batch"):
        Codec().decode(msgpack.packb({"a": 1}))


def nested(kind: type, levels: int) -> Any:
    value: Any = kind()
    for _ in range(levels - 1):
        value = kind([value])
    return value


def test_nesting_is_bounded_on_both_sides() -> None:
    """A level takes 40 KiB of the C stack in msgpack's decoder; without a bound a deep value kills the process."""
    deepest = nested(tuple, MOST_NESTED)
    assert again([deepest]) == [deepest]
    assert decode_one(encode_one(nested(list, 500))) == nested(list, 500)
    for value in (nested(tuple, MOST_NESTED + 1), nested(tuple, 5000), nested(list, 5000)):
        with pytest.raises(PayloadError):
            encode_one(value)
    forged = msgpack.packb([])
    for _ in range(400):
        forged = msgpack.packb(msgpack.ExtType(1, forged))
    errors = []

    def read() -> None:
        for reader in (decode_one, to_jsonable):
            with pytest.raises(PayloadError, match="nested deeper") as caught:
                reader(forged)
            errors.append(caught.value)

    thread = threading.Thread(target=read)  # threads have the smaller stack
    thread.start()
    thread.join()
    assert len(errors) == 2


# As JSON


def test_what_json_shows() -> None:
    value = {
        "int": 2**70, "nan": math.nan, "bytes": b"ab", "tuple": (1, {2}),
        "time": dt.datetime(2024, 1, 2, tzinfo=dt.UTC), "delta": dt.timedelta(seconds=90),
        "decimal": decimal.Decimal("1.10"), "uuid": uuid.UUID(int=1), "complex": 1j,
        "face": Face("a", Point(1.0)), "array": np.zeros((2, 3), "f4"),
        "scalar": np.float32(0.5), "date": np.datetime64("2024-01-01"), "clock": dt.time(1, 2), 5: None,
        (1, 2): True, Colour.RED: [np.zeros(1, [("a", "i4")])],
    }  # fmt: skip
    shown = to_jsonable(encode_one(value))
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown == {
        "int": 2**70, "nan": "nan", "bytes": {"$bytes": "YWI="}, "tuple": [1, [2]], "time": "2024-01-02T00:00:00+00:00",
        "delta": "0:01:30", "decimal": "1.10", "uuid": "00000000-0000-0000-0000-000000000001", "complex": "1j",
        "face": {
            "$type": f"{__name__}:Face",
            "name": "a",
            "box": {"$type": f"{__name__}:Point", "x": 1.0, "y": 0.0},
            "kind": {"$type": f"{__name__}:Colour", "value": "RED"},
            "tags": [],
        },
        "array": {"$ndarray": {"dtype": "<f4", "shape": [2, 3]}}, "scalar": 0.5,
        "date": "2024-01-01", "clock": "01:02:00", "5": None, "[1, 2]": True,
        f'{{"$type": "{__name__}:Colour", "value": "RED"}}': [{"$ndarray": {"dtype": [["a", "<i4"]], "shape": [1]}}],
    }  # fmt: skip


def test_json_needs_no_classes() -> None:
    gone = dataclasses.make_dataclass("Gone", ["x"])
    gone.__module__ = "no_such_module"
    assert to_jsonable(encode_one(gone(1))) == {"$type": "no_such_module:Gone", "x": 1}


def test_what_is_too_deep_for_json_is_refused() -> None:
    """What isn't can be written: by pydantic, which the REST interface does."""
    TypeAdapter(Any).dump_json({"value": [to_jsonable(encode_one(nested(list, MOST_SHOWN)))]})
    for levels in (MOST_SHOWN + 1, 500):
        with pytest.raises(PayloadError, match="a message can't be shown: "):
            to_jsonable(encode_one(nested(list, levels)))


# Pickle


def test_pickle_only_by_name() -> None:
    value = [fractions.Fraction(1, 2), range(3), np.zeros(OUT_OF_BAND), Face("a", Point(1.0))]
    coder = Codec(mode="pickle")
    body, buffers = coder.encode(value)
    assert len(buffers) == 1
    got = coder.decode(body, buffers)
    assert got[:2] == value[:2]
    assert np.shares_memory(got[2], value[2])
    assert not got[2].flags.writeable
    assert coder.decode_one(coder.encode_one(value[0])) == value[0]
    with pytest.raises(PayloadError):
        decode_one(coder.encode_one(value[0]))
    with pytest.raises(PayloadError, match='unknown codec \'marshal\': use "data", or "pickle"'):
        Codec(mode="marshal")


def test_what_can_not_be_pickled_is_a_payload_error() -> None:
    with pytest.raises(PayloadError, match="can't be pickled"):
        Codec(mode="pickle").encode([threading.Lock()])
    with pytest.raises(PayloadError, match="can't be decoded"):
        Codec(mode="pickle").decode(b"\x80\x05garbage.")
