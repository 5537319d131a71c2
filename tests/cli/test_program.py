"""A user's file as a program to submit: what is found in it, what it doesn't do, and what is said when it can't be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nomad import bundle, program
from nomad.errors import PipelineError, UsageError
from nomad.pipeline import build
from nomad.program import load
from tests.cli.conftest import Nomad

README = """
import nomad
NOMAD_MASTER = "http://127.0.0.1:9"
def write_to_file(x):
    with open("/tmp/output.txt", 'a') as f:
        f.write(str(x) + "\\n")
def square(x):
    return x*x
def source():
    import random
    return random.randint(0,10)
operators = [source, square, write_to_file]
start_node = "edge"
end_node = "cloud"
pipeline_id = 'test'
nomad.submit_pipeline(operators, start_node, end_node, pipeline_id, connection_str = NOMAD_MASTER)
"""
FUNCTIONS = """
def source(): return 1
def sink(x): pass
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop(program.MODULE, None)


class File:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "program.py"

    def __call__(self, text: str) -> str:
        self.path.write_text(text)
        return str(self.path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path)


def names(submission: program.Submission) -> list[str]:
    return [function.__name__ for function in submission.operators]


def test_the_program_of_the_readme_is_submitted_once(nomad: Nomad) -> None:
    """Its own `submit_pipeline`, to a master that isn't there, does nothing while the file is loaded."""
    made = nomad.json("submit", nomad.file(README))
    assert (made["id"], made["start"], made["end"]) == ("test", "edge", "cloud")
    assert len(nomad.master.pipelines()) == 1


def test_the_command_line_comes_first(nomad: Nomad) -> None:
    made = nomad.json("submit", nomad.file(README), "--start", "fog", "--id", "other")
    assert (made["id"], made["start"], made["end"]) == ("other", "fog", "cloud")


def test_operators_and_variables(file: File) -> None:
    found = load(file(FUNCTIONS + "operators = [source, sink]\nstart_node = 'a'\npipeline_id = 'x'\n"))
    assert (names(found), found.start, found.end, found.id) == (["source", "sink"], "a", None, "x")


def test_the_profile_is_that_of_the_list_operators(file: File) -> None:
    target = file(FUNCTIONS + "operators = [source, sink]\nmine = [source, sink]\nprofile = [{}, {}]\n")
    assert load(target).profile == [{}, {}]
    assert load(f"{target}:mine").profile is None
    assert load(file(FUNCTIONS + "operators = [source, sink]\ndef profile(): ...\n")).profile is None


def test_a_name(file: File) -> None:
    target = file(FUNCTIONS + "operators = 1\nmine = [source, sink]\n")
    assert names(load(f"{target}:mine")) == ["source", "sink"]


def test_the_only_call_says_it_all(file: File) -> None:
    target = file(FUNCTIONS + "import nomad\nnomad.submit_pipeline([source, sink], 'a', 'b', 'x', profile=[{}, {}])\n")
    found = load(target)
    assert (names(found), found.start, found.end, found.id) == (["source", "sink"], "a", "b", "x")
    assert found.profile == [{}, {}]


def test_the_call_that_belongs_to_the_name(file: File) -> None:
    target = file(
        FUNCTIONS
        + "import nomad\none = [source, sink]\ntwo = [source, sink, sink]\n"
        + "nomad.submit_pipeline(one, 'a', 'b', 'x')\nnomad.submit_pipeline(two, 'c', 'd', 'y')\n"
    )
    assert load(f"{target}:two").id == "y"
    with pytest.raises(UsageError, match="submits 2 pipelines: say which"):
        load(target)


def test_main_isnt_run(file: File) -> None:
    assert load(file(FUNCTIONS + "operators = [source, sink]\nif __name__ == '__main__': raise SystemExit(1)\n"))


def test_modules_beside_the_file_can_be_imported(file: File) -> None:
    file.path.with_name("beside_the_program.py").write_text("def sink(x): pass\n")
    found = load(file("from beside_the_program import sink\ndef source(): return 1\noperators = [source, sink]\n"))
    made = bundle.read(bundle.make(build(found.operators), bytes(32)), bundle.public_key(bytes(32)))
    sys.modules.pop("beside_the_program")
    sys.path.remove(str(file.path.parent))
    loaded = bundle.load_operator(
        made.manifest_bytes, made.signature, bundle.public_key(bytes(32)), "sink", made.code["sink"], made.types
    )
    assert loaded.function(1) is None


def test_classes_of_the_file_travel(file: File) -> None:
    found = load(
        file(
            "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int\n"
            "def source(): return Point(1)\ndef sink(p): return p.x\noperators = [source, sink]\n"
        )
    )
    key = bundle.public_key(bytes(32))
    made = bundle.read(bundle.make(build(found.operators), bytes(32)), key)
    sys.modules.pop(program.MODULE)
    loaded = bundle.load_operator(made.manifest_bytes, made.signature, key, "source", made.code["source"], made.types)
    assert [name.rpartition(":")[2] for name in loaded.types] == ["Point"]
    assert loaded.function().x == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no `operators`: call the list that"),
        ("x = 1\nsteps = [print, len]\n", r"program.py:NAME; it defines the lists steps$"),
        ("operators = print\n", "operators in .* is of type builtin_function_or_method, not a list of operators"),
        ("def f(:\n", "program.py, line 1: invalid syntax"),
        ("\n\n1 / 0\n", "program.py, line 3: ZeroDivisionError: division by zero"),
        (
            "import nowhere_to_be_found\n",
            "line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'. What the file imports must be "
            f"installed here, too, for {sys.executable}",
        ),
        ("import sys\nsys.exit(3)\n", r"calls sys.exit\(\) while it is loaded: put that under `if __name__"),
        (
            "import nomad\nimport asyncio\nasyncio.run(nomad.submit([print, print], start='a', end='b'))\n",
            "submits a pipeline when it is loaded: put that under `if __name__",
        ),
    ],
)
def test_files_that_cant_be_used(file: File, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(file(text))
    assert not program.being_loaded()


@pytest.mark.filterwarnings("ignore:coroutine 'main' was never awaited")
async def test_asyncio_run_while_a_loop_runs_as_that_of_the_command_does(file: File) -> None:
    with pytest.raises(
        UsageError, match=r"line 4 calls asyncio.run\(\) while it is loaded: put that under `if __name__"
    ):
        load(file("import asyncio\nasync def main():\n    pass\nasyncio.run(main())\n"))


def test_a_missing_name_shows_what_there_is(file: File) -> None:
    with pytest.raises(UsageError, match="defines no 'mine'; it defines the lists operators"):
        load(file(FUNCTIONS + "operators = [source, sink]\n") + ":mine")


def test_errors_of_nomad_keep_their_kind(file: File) -> None:
    with pytest.raises(PipelineError, match="memory"):
        load(file("import nomad\n@nomad.operator(memory='much')\ndef f(x): pass\n"))


@pytest.mark.parametrize("target", ["nowhere.py", "nowhere.py:name", "no/where.py", "a:b:c", ":x", ""])
def test_no_such_file(target: str) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load(target)


@pytest.mark.parametrize("name", ["", "1st", "a.b"])
def test_no_name_after_the_colon(file: File, name: str) -> None:
    path = file(FUNCTIONS + "operators = [source, sink]\n")
    said = f"after the colon of {path}:{name} must stand the name of a list of operators in {path}"
    with pytest.raises(UsageError, match=f"^{said}$"):
        load(f"{path}:{name}")


def test_a_folder_with_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "p.py").write_text(FUNCTIONS + "operators = [source, sink]\nmine = [source, sink]\n")
    assert load(str(folder / "p.py"))
    assert load(f"{folder / 'p.py'}:mine")


def test_something_that_isnt_python(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match="isn't a Python file"):
        load(str(tmp_path / "notes.txt"))
