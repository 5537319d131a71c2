"""What users give to `build`: every kind of callable, and every mistake with its way out."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad.callables import setup_of
from nomad.errors import PipelineError
from nomad.pipeline import OPERATOR_NAME, Kind, OnError, OperatorSpec, build, check_id, operator, source


def numbers():
    return 1


def counting():
    yield 1


async def waiting():
    return 1


async def streaming():
    yield 1


def double(x):
    return 2 * x


async def fetch(x):
    return x


def split(x):
    yield x


async def splitting(x):
    yield x


class Callable_:
    def __call__(self, x):
        return x

    def method(self, x):
        return x

    @staticmethod
    def static(x):
        return x

    @classmethod
    def of_class(cls, x):
        return x


class AsyncCallable:
    async def __call__(self, x):
        return x


class GeneratorCallable:
    def __call__(self, x):
        yield x


class Slotted:
    __slots__ = ()

    def __call__(self, x):
        return x


@dataclasses.dataclass
class Point:
    x: int


def spec_of(fn) -> OperatorSpec:
    return build([numbers, fn]).operators[1].spec


def refused(operators, **options) -> str:
    with pytest.raises(PipelineError) as caught:
        build(operators, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fn", "kind", "interval"),
    [
        (numbers, Kind.PERIODIC, 1.0),
        (waiting, Kind.ASYNC_PERIODIC, 1.0),
        (counting, Kind.SOURCE_GENERATOR, None),
        (streaming, Kind.ASYNC_SOURCE_GENERATOR, None),
        (functools.partial(double, 2), Kind.PERIODIC, 1.0),
        (functools.partial(split, 2), Kind.SOURCE_GENERATOR, None),
        (dict, Kind.PERIODIC, 1.0),
        (source(interval=0.1)(lambda: 1), Kind.PERIODIC, 0.1),
    ],
)
def test_kinds_of_sources(fn, kind, interval):
    spec = build([fn, print]).operators[0].spec
    assert (spec.kind, spec.interval) == (kind, interval)


@pytest.mark.parametrize(
    ("fn", "kind", "name"),
    [
        (double, Kind.FUNCTION, "double"),
        (fetch, Kind.ASYNC, "fetch"),
        (split, Kind.GENERATOR, "split"),
        (splitting, Kind.ASYNC_GENERATOR, "splitting"),
        (lambda x: x, Kind.FUNCTION, "lambda"),
        (Callable_(), Kind.FUNCTION, "Callable_"),
        (Callable_().method, Kind.FUNCTION, "method"),
        (Callable_.static, Kind.FUNCTION, "static"),
        (Callable_.of_class, Kind.FUNCTION, "of_class"),
        (AsyncCallable(), Kind.ASYNC, "AsyncCallable"),
        (GeneratorCallable(), Kind.GENERATOR, "GeneratorCallable"),
        (Slotted(), Kind.FUNCTION, "Slotted"),
        (functools.partial(pow, exp=2), Kind.FUNCTION, "pow"),
        (functools.partial(fetch), Kind.ASYNC, "fetch"),
        (functools.partial(AsyncCallable()), Kind.ASYNC, "AsyncCallable"),
        (functools.lru_cache(double), Kind.FUNCTION, "double"),
        (math.sqrt, Kind.FUNCTION, "sqrt"),
        (np.sqrt, Kind.FUNCTION, "sqrt"),
        (max, Kind.FUNCTION, "max"),
        (str.upper, Kind.FUNCTION, "upper"),
        ("-".join, Kind.FUNCTION, "join"),
        ([].append, Kind.FUNCTION, "append"),
        (int, Kind.FUNCTION, "int"),
        (Point, Kind.FUNCTION, "Point"),
        (lambda *args: args, Kind.FUNCTION, "lambda"),
        (lambda x, factor=2: x * factor, Kind.FUNCTION, "lambda"),
    ],
)
def test_kinds_of_operators(fn, kind, name):
    spec = spec_of(fn)
    assert (spec.kind, spec.name, spec.interval) == (kind, name, None)


def test_edges_join_each_to_the_next():
    pipeline = build([numbers, double, fetch, print])
    assert pipeline.edges == (("numbers", "double"), ("double", "fetch"), ("fetch", "print"))
    assert [op.function for op in pipeline.operators] == [numbers, double, fetch, print]


def test_same_names_are_numbered_around_explicit_ones():
    named = operator(double, name="double-2")
    names = [op.spec.name for op in build([numbers, double, double, named, double]).operators]
    assert names == ["numbers", "double", "double-3", "double-2", "double-4"]


def test_names_that_are_no_identifiers_are_made_valid():
    def größe(x):
        return x

    größe.__name__ = "größe in cm" + "x" * 100
    for fn in (größe, größe):
        assert OPERATOR_NAME.fullmatch(spec_of(fn).name)
    größe.__name__ = "2nd"
    assert spec_of(größe).name == "_2nd"


@given(st.lists(st.text(max_size=80), min_size=1, max_size=5))
def test_any_function_names_give_unique_valid_operator_names(texts):
    functions = []
    for text in texts:
        fn = functools.wraps(double)(lambda x: x)
        fn.__name__ = text
        functions.append(fn)
    names = [op.spec.name for op in build([numbers, *functions]).operators]
    assert len(set(names)) == len(names)
    assert all(OPERATOR_NAME.fullmatch(name) for name in names)


# -- options


def test_options_are_noted_without_wrapping():
    @operator(name="twice", memory="256Mi", requires={"gpu"}, on_error="retry", retries=5, copy_outputs=True, image="x")
    def fn(x):
        return 2 * x

    assert fn(2) == 4
    assert fn.__name__ == "fn"
    assert spec_of(fn) == OperatorSpec(
        "twice", Kind.FUNCTION, None, 256.0, frozenset({"gpu"}), OnError.RETRY, 5, True, "x"
    )


def test_decorators_without_parentheses():
    @operator
    def fn(x):
        return x

    @source
    def start():
        return 1

    assert build([start, fn]).operators[1].spec == OperatorSpec("fn", Kind.FUNCTION)


def test_a_decorated_function_can_be_pickled():
    assert pickle.loads(pickle.dumps(operator(memory="1Gi")(fetch))) is fetch
    del fetch.__nomad_options__


def test_decorators_add_up():
    fn = operator(memory="1Gi")(operator(retries=7, memory="2Gi")(lambda x: x))
    assert (spec_of(fn).memory_mb, spec_of(fn).retries) == (1024.0, 7)
    again = operator(fn, retries=2)
    assert (spec_of(again).memory_mb, spec_of(again).retries) == (1024.0, 2)
    assert spec_of(fn).retries == 7


def test_one_function_twice_with_options_of_their_own():
    pipeline = build([numbers, operator(double, name="a"), operator(double, name="b"), double])
    assert [op.spec.name for op in pipeline.operators] == ["numbers", "a", "b", "double"]


@pytest.mark.parametrize("fn", [math.sqrt, Callable_().method, Slotted(), "-".join])
def test_what_takes_no_attributes_gets_options_all_the_same(fn):
    decorated = operator(name="named")(fn)
    assert spec_of(decorated).name == "named"


def test_a_single_label_may_be_a_string():
    assert spec_of(operator(requires="gpu")(lambda x: x)).requires == {"gpu"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "much"}, "256Mi"),
        ({"memory": "-1Mi"}, "above 0"),
        ({"memory": 0}, "above 0"),
        ({"memory": True}, "True"),
        ({"on_error": "retri"}, "did you mean 'retry'"),
        ({"on_error": 3}, "'set-aside', 'retry', 'fail'"),
        ({"name": "a b"}, "letters"),
        ({"name": "a\n"}, "letters"),
        ({"name": ""}, "letters"),
        ({"name": "x" * 64}, "63"),
        ({"requires": 3}, '{"gpu"}'),
        ({"pin": 3}, '"fog"'),
        ({"pin": ""}, '"fog"'),
        ({"requires": ["a", 3]}, '{"gpu"}'),
        ({"requires": "a b"}, '{"gpu"}'),
        ({"retries": -1}, "0 or more"),
        ({"retries": 1.5}, "0 or more"),
        ({"retries": True}, "0 or more"),
        ({"copy_outputs": 1}, "bool"),
        ({"image": 1}, "str"),
    ],
)
def test_bad_options_are_refused_where_they_stand(options, says):
    with pytest.raises(PipelineError, match="double") as caught:
        operator(double, **options)
    assert says in str(caught.value)
    with pytest.raises(PipelineError):
        operator(**options)


@pytest.mark.parametrize("interval", [-1, 0, math.nan, math.inf, "1", True])
def test_bad_intervals(interval):
    with pytest.raises(PipelineError, match="above 0"):
        source(interval=interval)


def test_an_unknown_option_is_a_type_error_with_a_hint():
    with pytest.raises(TypeError, match="did you mean 'memory'"):
        operator(double, memori="1Gi")
    with pytest.raises(TypeError, match="'interval'"):
        operator(interval=1)


# -- mistakes


def test_no_list():
    assert "[source, ..., sink]" in refused(double)
    assert "[source, ..., sink]" in refused({numbers, double})
    assert "int" in refused(3)


def test_too_few():
    assert "empty" in refused([])
    assert "'numbers' stands alone" in refused([numbers])


def test_not_callable():
    message = refused([numbers, 3, print])
    assert "operator 3 (position 2 of 3)" in message
    assert "type int" in message


def test_called_already():
    assert "without parentheses" in refused([numbers, fetch(1)])
    assert "without parentheses" in refused([counting(), double])
    assert "without parentheses" in refused([streaming(), double])
    with pytest.raises(PipelineError, match="without parentheses"):
        operator()(split(1))


def test_a_class_for_its_instance():
    message = refused([numbers, Callable_])
    assert "position 2 of 2" in message
    assert "Callable_(...)" in message


def test_arity():
    assert "put a source first" in refused([double, print])
    assert "takes none" in refused([numbers, numbers])
    assert "functools.partial" in refused([numbers, lambda a, b: a])
    assert "functools.partial" in refused([numbers, np.add])
    assert "not of the class" in refused([numbers, Callable_.method])
    message = refused([numbers, lambda *, x: x])
    assert "'<lambda>' (position 2 of 2)" in message
    assert "exactly one argument" in message


def test_two_of_one_explicit_name():
    message = refused([numbers, operator(double, name="a"), operator(fetch, name="a")])
    assert "'a'" in message
    assert "position 2 of 3" in message
    assert "position 3 of 3" in message


def test_a_source_in_the_middle():
    assert "only the first operator" in refused([numbers, source(lambda x=1: x), print])


def test_an_interval_for_a_generator():
    assert "sleep between the yields" in refused([source(interval=1)(counting), print])
    del counting.__nomad_options__


def test_codec_and_profile():
    assert "'data', 'pickle'" in refused([numbers, double], codec="json")
    assert "1 entries for 2" in refused([numbers, double], profile=[{}])
    assert "cloud_execution_time" in refused([numbers, double], profile=[{"time": 1}, {}])
    assert "not below 0" in refused([numbers, double], profile=[{"output_msg_size": -1}, {}])
    assert "not below 0" in refused([numbers, double], profile=[{"output_msg_size": "1"}, {}])
    pipeline = build([numbers, double], codec="pickle", profile=[{"cloud_execution_time": 1}, {}])
    assert (pipeline.codec, pipeline.profile) == ("pickle", ({"cloud_execution_time": 1.0}, {}))


def test_ids():
    assert check_id("a-1_B") == "a-1_B"
    for bad in ("", "-a", "a b", "a.b", "x" * 64, "a\n", "ä", None):
        with pytest.raises(PipelineError, match="id of a pipeline"):
            check_id(bad)


# -- setup


class Ready:
    def __call__(self, x):
        return x

    def setup(self, path="weights.bin"):
        raise AssertionError("not here")


def test_an_object_may_have_a_setup():
    model = Ready()
    assert setup_of(model) == setup_of(operator(model, name="other")) == model.setup
    assert build([numbers, model, functools.partial(model)]).operators[1].function is model


def test_nothing_else_has_one():
    def function(x):
        return x

    function.setup = lambda: None
    for other in (function, Ready().__call__, Ready, print, Callable_()):
        assert setup_of(other) is None


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (lambda self, path: None, "takes (path): it must do without arguments"),
        (7, "is of type int: make it a method"),
        (fetch, "must be a plain method, neither async"),
        (splitting, "must be a plain method, neither async"),
    ],
)
def test_a_setup_that_cannot_be_called_is_refused(setup, said):
    model = type("Model", (Ready,), {"setup": setup})()
    with pytest.raises(PipelineError, match=re.escape(said)) as caught:
        build([numbers, model, print])
    assert str(caught.value).startswith("operator 'Model' (position 2 of 3): its `setup`, which is called once")
