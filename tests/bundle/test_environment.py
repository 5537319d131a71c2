"""Whether what a bundle needs is here, said in sentences; and where modules come from."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import version

import pytest

from nomad import bundle
from nomad.bundle.environment import Modules, Origin
from nomad.errors import EnvironmentMismatch
from nomad.pipeline import build
from tests.bundle.conftest import KEY, PUBLIC

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
MADE = bundle.read(bundle.make(build([dict, print]), KEY), PUBLIC)


def needing(**changes) -> bundle.Bundle:
    return dataclasses.replace(MADE, **changes)


def test_all_is_here():
    assert bundle.check_environment(needing(packages={"numpy": version("numpy")})) == []


def test_another_python():
    with pytest.raises(EnvironmentMismatch) as caught:
        bundle.check_environment(needing(python="3.99"))
    assert str(caught.value).startswith(f"the bundle was made with Python 3.99, but the operators run on Python {HERE}")
    assert f"submit with Python {HERE}" in str(caught.value)


def test_missing_packages_are_named_together():
    with pytest.raises(EnvironmentMismatch) as caught:
        bundle.check_environment(needing(packages={"a-lib": "1.0", "b-lib": "2.0", "numpy": "0.1"}))
    assert "needs a-lib (1.0), b-lib (2.0), which are not installed where the operators run" in str(caught.value)
    assert "pip install 'a-lib==1.0' 'b-lib==2.0'" in str(caught.value)


def test_another_version_is_a_warning():
    (warning,) = bundle.check_environment(needing(packages={"numpy": "0.1"}))
    assert warning == f"the bundle was made with numpy 0.1, but the operators run with {version('numpy')}"


def test_the_same_modules_from_another_distribution_are_a_warning():
    made = needing(packages={"opencv-python": "4.9"}, imports={"opencv-python": ("cv2",)})
    (warning,) = bundle.check_environment(made)
    assert "opencv-python (4.9) is not installed" in warning
    assert "opencv-python-headless" in warning
    with pytest.raises(EnvironmentMismatch):
        bundle.check_environment(needing(packages={"a-lib": "1"}, imports={"a-lib": ("no_such_module",)}))


def requiring(*texts: str, **changes) -> bundle.Bundle:
    first, second = MADE.operators
    return needing(operators=(first, dataclasses.replace(second, requirements=texts)), **changes)


def test_what_operators_have_installed_is_not_asked_for():
    assert bundle.check_environment(requiring("a-lib==1.0", packages={"A_lib": "1.0"})) == []
    (warning,) = bundle.check_environment(requiring("a-lib==1.0", packages={"a-lib": "1.0", "b-lib": "2.0"}))
    assert warning.startswith("the bundle needs b-lib (2.0), which isn't installed here")


def test_requirements_that_leave_the_version_open_are_a_warning():
    for text in ("a-lib", "a-lib==1.*", "a-lib>=1"):
        (warning,) = bundle.check_environment(requiring(text))
        assert text in warning
    assert bundle.check_environment(requiring("a-lib===1", "b==2")) == []


def test_where_images_are_for_other_versions_of_python():
    assert bundle.check_environment(needing(python="3.99"), ["3.9", "3.99"]) == []
    with pytest.raises(EnvironmentMismatch, match=r"has images for Python 3\.9, 3\.11: submit with one of these"):
        bundle.check_environment(needing(python="3.99"), ["3.11", "3.9"])
    images = tuple(dataclasses.replace(op, image="my/own") for op in MADE.operators)
    assert bundle.check_environment(needing(python="3.99", operators=images), ["3.11"]) == []
    assert bundle.check_environment(needing(python="3.99", operators=images), []) == []
    with pytest.raises(EnvironmentMismatch, match=r"has images for Python \(none\)"):
        bundle.check_environment(needing(), [])


def test_what_images_have_is_not_compared_with_what_is_here():
    made = requiring("c-lib>=1", packages={"numpy": "0.1", "a-lib": "1", "c-lib": "1"})
    (warning,) = bundle.check_environment(made, [HERE])
    assert warning == "the requirement c-lib>=1 names no single version: nodes may install different ones"


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("builtins", Origin.EVERYWHERE),
        ("sys", Origin.EVERYWHERE),
        ("json.decoder", Origin.EVERYWHERE),
        ("nomad.pipeline", Origin.EVERYWHERE),
        ("__main__", Origin.EVERYWHERE),
        ("numpy.linalg", Origin.INSTALLED),
        ("yaml", Origin.INSTALLED),
        ("no_such_module", Origin.UNKNOWN),
        ("json.no_such_module", Origin.EVERYWHERE),
        (__name__, Origin.LOCAL),
        ("tests", Origin.LOCAL),
    ],
)
def test_where_modules_come_from(name, origin):
    assert Modules().find(name).origin is origin


def test_a_file_beside_the_script_that_is_named_like_the_standard_library(project):
    sys.modules.pop("this", None)
    project(this="x = 1")
    assert Modules().find("this").origin is Origin.LOCAL


def installed(folder, name, **files):
    """A distribution's metadata in `folder`."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    for file, text in {"METADATA": f"Name: {name}\nVersion: 1.2\n", **files}.items():
        (info / file.replace("_txt", ".txt").replace("_json", ".json")).write_text(text)


def test_a_distribution_is_found_by_the_files_that_it_lists(project, tmp_path):
    project(space__one="", space__two="", script="")
    installed(tmp_path, "first", RECORD="space/one.py,sha256=x,1\n")
    installed(tmp_path, "second", RECORD="space/__init__.py,,\nspace/two.py,sha256=x,1\n")
    modules = Modules()
    assert modules.find("space.one").distributions == (("first", "1.2"),)
    assert modules.find("space.two").distributions == (("second", "1.2"),)
    assert modules.find("script").origin is Origin.LOCAL


def test_a_distribution_that_is_installed_in_place(project, tmp_path):
    project(library__one="", beside="")
    url = f'{{"url": "file://{tmp_path}", "dir_info": {{"editable": true}}}}'
    installed(tmp_path / "elsewhere", "in-place", RECORD="x.pth,,\n", direct_url_json=url, top_level_txt="library\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path / "elsewhere")
        modules = Modules()
        assert modules.find("library.one").distributions == (("in-place", "1.2"),)
        assert modules.find("beside").origin is Origin.LOCAL


def test_a_distribution_without_a_record(project, tmp_path):
    project(library__one="", beside="")
    installed(tmp_path, "from-the-system", top_level_txt="library\n")
    assert Modules().find("library.one").distributions == (("from-the-system", "1.2"),)
    assert Modules().find("beside").origin is Origin.LOCAL
