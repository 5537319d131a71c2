"""What travels: the user's own code by value, packages by name and version, and clear refusals."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from importlib.metadata import version

import cloudpickle
import pytest

from nomad import bundle, errors
from nomad.delivery import codec
from nomad.pipeline import build, operator
from tests.bundle.conftest import KEY, PUBLIC


def numbers():
    return 1


counting = functools.partial(iter, [1])  # defined in no module of the user's


def packed(*functions, **options):
    return bundle.read(bundle.make(build([numbers, *functions], **options), KEY), PUBLIC)


def refused(fn) -> str:
    with pytest.raises(errors.BundleError) as caught:
        bundle.make(build([numbers, fn]), KEY)
    return str(caught.value)


def test_what_stands_in_the_manifest():
    made = packed(
        operator(memory="128Mi", requires={"b", "a"}, on_error="retry")(lambda x: x),
        codec="pickle",
        profile=[{"output_msg_size": 3}, {"cloud_execution_time": 0.5}],
    )
    spec = made.spec("test", "edge", "cloud")
    assert spec.id == "test"
    assert [op.name for op in spec.operators] == ["numbers", "lambda"]
    assert spec.operators == made.operators
    assert spec.operators[1].requires == {"a", "b"}
    assert spec.operators[1].memory_mb == 128
    assert spec.operators[1].on_error == "retry"
    assert spec.edges == (("numbers", "lambda"),)
    assert (spec.start, spec.end, spec.codec) == ("edge", "cloud", "pickle")
    assert spec.profile == ({"output_msg_size": 3.0}, {"cloud_execution_time": 0.5})
    with pytest.raises(errors.PipelineError):
        made.spec("a b", "edge", "cloud")


def test_a_pin_travels_and_is_left_out_where_there_is_none():
    assert [op.pin for op in packed(operator(pin="fog")(lambda x: x)).operators] == [None, "fog"]
    assert b'"pin"' not in packed(print).manifest_bytes


def test_what_an_operator_needs_travels_and_is_left_out_where_it_needs_nothing():
    needy = operator(
        requirements=["numpy==2.1"], environment={"A": "b"}, secrets={"P": "db/password"}, devices={"camera": 2}
    )(lambda x: x)
    made = packed(needy)
    assert made.operators[1].requirements == ("numpy==2.1",)
    assert made.operators[1].environment == {"A": "b"}
    assert made.operators[1].secrets == {"P": "db/password"}
    assert made.operators[1].devices == {"camera": 2}
    for word in (b'"requirements"', b'"environment"', b'"secrets"', b'"devices"'):
        assert word in made.manifest_bytes
        assert word not in packed(print).manifest_bytes


def test_the_same_pipeline_gives_the_same_bytes():
    pipeline = build([numbers, math.sqrt, print])
    assert bundle.make(pipeline, KEY) == bundle.make(pipeline, KEY)


def test_plain_functions_need_no_packages():
    made = packed(lambda x: math.sqrt(x), print, str.upper, int)
    assert made.packages == {}


def test_packages_are_found_wherever_they_are_used(project):
    script = project(
        script="""
        import functools
        import numpy
        import cv2 as vision

        def by_global(x): return numpy.sqrt(x)
        def by_alias(x): return vision.countNonZero(x)
        def in_body(x):
            def nested(y):
                import yaml.nodes
                return yaml
            return nested(x)
        def by_default(x, array=numpy.zeros(1)): return x
        def closed(array=numpy.zeros(1)):
            return lambda x: array
        by_closure = closed()
        def from_in_body(x):
            from google_is_not_installed import y
            from yaml import nodes
        class Model:
            def __init__(self): self.array = numpy.zeros(1)
            def __call__(self, x): return x
        model = Model()
        partial = functools.partial(numpy.add, 1)
        ufunc = numpy.sqrt
        """
    )
    numpy, cv2, yaml = ({dist: version(dist)} for dist in ("numpy", "opencv-python-headless", "PyYAML"))
    expected = {
        "by_global": numpy,
        "by_alias": cv2,
        "in_body": yaml,
        "by_default": numpy,
        "by_closure": numpy,
        "from_in_body": yaml,
        "model": numpy,
        "partial": numpy,
        "ufunc": numpy,
    }
    assert {name: packed(getattr(script, name)).packages for name in expected} == expected
    assert packed(script.by_alias).imports == {"opencv-python-headless": ("cv2",)}


def test_own_modules_travel_and_theirs_too(project, pod):
    script = project(
        script="""
        import helpers
        from package import one
        def work(x): return [helpers.double(x), one.f(x)]
        """,
        helpers="""
        from package.two import FACTOR
        def double(x): return x * FACTOR
        """,
        package__one="""
        import package.two
        import package.one
        def f(x): return package.two.g(x)
        """,
        package__two="""
        import package.one
        FACTOR = 2
        def g(x):
            from . import three
            from package.three import K
            import package.three as again
            assert again is three
            return x + K
        """,
        package__three="""
        import numpy
        import helpers
        K = 40
        """,
    )
    pipeline = build([numbers, script.work])
    assert pod(pipeline, "work", "f(2)") == "[4, 42]"
    assert bundle.read(bundle.make(pipeline, KEY), PUBLIC).packages.keys() == {"numpy"}
    assert not cloudpickle.list_registry_pickle_by_value()


def test_functions_of_one_module_share_its_globals(project, pod):
    script = project(
        script="""
        count = 0
        def add():
            global count
            count += 1
        def work(x):
            add(); add()
            return count
        """
    )
    assert pod(build([numbers, script.work]), "work", "f(0)") == "2"


def test_kinds_survive(project, pod):
    script = project(
        script="""
        async def fetch(x): return x + 1
        class Add:
            def __init__(self, n): self.n = n
            def __call__(self, x): return x + self.n
        add = Add(3)
        bound = Add(4).__call__
        """
    )
    pipeline = build([numbers, script.fetch, script.add, script.bound, math.sqrt])
    assert pod(pipeline, "fetch", "asyncio.run(f(1))") == "2"
    assert pod(pipeline, "Add", "f(1)") == "4"
    assert pod(pipeline, "__call__", "f(1)") == "5"
    assert pod(pipeline, "sqrt", "f(4), loaded.spec.kind.value") == "2.0 function"


# -- classes of messages


def test_classes_that_messages_may_carry(project, pod):
    script = project(
        script="""
        import dataclasses, enum, typing
        from helpers import Shared
        @dataclasses.dataclass
        class Point: x: int
        class Color(enum.Enum): RED = 1
        class Pair(typing.NamedTuple):
            a: int
        class Plain: pass
        def make(x): return Point(x)
        """,
        helpers="""
        import dataclasses
        @dataclasses.dataclass
        class Shared: x: int
        """,
    )
    pipeline = build([counting, script.make])
    expected = ["helpers:Shared", "script:Color", "script:Pair", "script:Point"]
    expression = "sorted(loaded.types), type(f(1)) is loaded.types['script:Point']"
    assert pod(pipeline, "make", expression) == f"{expected} True"


def test_a_class_of_a_closure(project, pod):
    @dataclasses.dataclass
    class Inner:
        x: int

    name = f"{__name__}:test_a_class_of_a_closure.<locals>.Inner"
    assert pod(build([numbers, lambda x: Inner(x)]), "lambda", f"f(1).x, {name!r} in loaded.types") == "1 True"


def test_registered_codecs_travel(project, pod, monkeypatch):
    monkeypatch.setattr(codec, "_registry", {})
    script = project(
        script="""
        class Celsius:
            def __init__(self, degrees): self.degrees = degrees
        def encode(value): return value.degrees
        def decode(data): return Celsius(data)
        def make(x): return Celsius(x)
        """
    )
    codec.register(script.Celsius, script.encode, script.decode)
    expression = (
        "__import__('nomad.delivery.codec').delivery.codec.Codec(loaded.types)."
        "decode_one(__import__('nomad.delivery.codec').delivery.codec.Codec(loaded.types).encode_one(f(5))).degrees"
    )
    assert pod(build([numbers, script.make]), "make", expression) == "5"


def test_with_pickle_own_classes_can_be_pickled_where_they_arrive(project, pod):
    script = project(
        script="""
        import dataclasses
        @dataclasses.dataclass
        class Point: x: int
        def make(x): return Point(x)
        """
    )
    expression = "__import__('pickle').loads(__import__('pickle').dumps(f(1))).x"
    assert pod(build([numbers, script.make], codec="pickle"), "make", expression) == "1"


def test_with_pickle_classes_of_any_kind_can_be_pickled(project, pod):
    script = project(
        script="""
        class Odd:
            def __init__(self, x): self.x = x
        def make(x): return Odd(x)
        def use(odd): return odd.x
        """
    )
    pipeline = build([numbers, script.make, script.use], codec="pickle")
    expression = "__import__('pickle').loads(__import__('pickle').dumps(f(1))).x"
    assert pod(pipeline, "make", expression) == "1"
    data = f"__import__('sys').modules['{script.__name__}'].Odd(2)"
    assert pod(pipeline, "use", f"f(__import__('pickle').loads(__import__('pickle').dumps({data})))") == "2"


def test_a_class_that_cannot_travel_is_named(project):
    script = project(
        script="""
        import dataclasses, threading
        @dataclasses.dataclass
        class Locked:
            x: int
            lock = threading.Lock()
        def work(x): return x
        """
    )
    message = refused(script.work)
    assert "messages of class script.Locked" in message
    assert "class attribute 'lock'" in message


# -- what can't travel

lock = threading.Lock()


class Holder:
    def __init__(self):
        self.parts = {"inner": [lock]}

    def __call__(self, x):
        return x


def uses_global(x):
    with lock:
        return x


def make_closure():
    handle = threading.Lock()
    return lambda x: handle


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (uses_global, "its global 'lock' is of type _thread.lock"),
        (make_closure(), "its variable 'handle' of the enclosing function is of type _thread.lock"),
        (Holder(), "its attribute 'parts' -> item 'inner' -> item 0 is of type _thread.lock"),
        (Holder().__call__, "attribute 'parts' -> item 'inner' -> item 0 is of type _thread.lock"),
        (functools.partial(pow, lock), "its bound argument 0 is of type _thread.lock"),
        (lambda x, held=lock: x, "its default 0 is of type _thread.lock"),
    ],
)
def test_what_cannot_be_packed_is_found(fn, says):
    message = refused(fn)
    assert message.startswith("operator '")
    assert "(position 2 of 2) can't be packed: " in message
    assert says in message
    assert "Create it inside the function" in message


def test_a_long_way_to_it_is_abridged():
    held = lock
    for _ in range(1_500):
        held = [held]
    message = refused(lambda x: held)
    assert "item 0 -> item 0 -> ... -> item 0" in message
    assert len(message) < 500


def test_a_module_that_cannot_be_packed(project):
    script = project(
        script="""
        def work(x):
            import held
        def broken(x):
            import fails
        """,
        held="import threading\nlock = threading.Lock()",
        fails="1 / 0",
    )
    assert "its module 'held' -> global 'lock'" in refused(script.work)
    assert "it imports 'fails', which fails: ZeroDivisionError" in refused(script.broken)
    assert not cloudpickle.list_registry_pickle_by_value()


def test_a_compiled_module_beside_the_script(project, tmp_path):
    script = project(script="class Fake: pass\ndef work(x): return Fake")
    script.Fake.__module__ = "compiled"
    compiled = type(script)("compiled")
    compiled.Fake, compiled.__file__ = script.Fake, str(tmp_path / "compiled.so")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "compiled", compiled)
        message = refused(script.work)
    assert "'compiled', a compiled module" in message


def test_too_large():
    data = b"x" * (bundle.MAX_BUNDLE + 1)
    message = refused(lambda x: data)
    assert "operator 'lambda' takes 64" in message
    assert "Load large data" in message
