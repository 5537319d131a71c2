"""The example's functions by themselves, without Nomad running: are the right people named?"""

from __future__ import annotations

import itertools
import pickle
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nomad.pipeline import Kind, build

WAY_OUT = "needs what `pip install .[examples]` installs"
np = pytest.importorskip("numpy", reason=WAY_OUT)
for module in ("cv2", "dlib", "skimage"):
    pytest.importorskip(module, reason=WAY_OUT)
try:
    distribution("face_recognition_models")
except PackageNotFoundError:
    pytest.skip(WAY_OUT, allow_module_level=True)


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    try:
        import face_recognition

        yield face_recognition
    finally:
        sys.path.pop(0)
        sys.modules.pop("face_recognition", None)


@pytest.fixture(scope="module")
def identify(example: ModuleType) -> Any:
    return example.Identifier()


def run(example: ModuleType, identify: Any, frame: Any) -> dict[str, Any]:
    """`frame` through all operators; arrays are read-only, as they are when they arrive from a link."""
    frame.pixels.flags.writeable = False
    normal = example.normalise(frame)
    normal.pixels.flags.writeable = False
    faces = example.Detector()(normal)
    for cutout in faces.cutouts:
        cutout.flags.writeable = False
    record: dict[str, Any] = example.record(identify(faces))
    return record


def test_models_are_loaded_before_the_first_frame_and_never_travel(example: Any) -> None:
    detect, identify = example.Detector(), example.Identifier()
    for operator, models in ((detect, ["cascade"]), (identify, ["gallery", "landmarks", "network"])):
        operator.setup()
        assert set(models) <= set(vars(operator))
        assert not set(models) & set(vars(pickle.loads(pickle.dumps(operator))))


@pytest.mark.slow
def test_the_right_people_are_named_in_moved_scaled_and_relit_frames(
    example: Any, identify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "SCENE_FRAMES", 5)
    shots = itertools.islice(example.made_up(), len(example.SCENES) * example.SCENE_FRAMES)
    right: Counter[str] = Counter()
    for number, (pixels, truth) in enumerate(shots):
        names = run(example, identify, example.Frame(number, 0.0, pixels, truth))["names"]
        right[truth] += truth in (names or [example.NOBODY])
    shown = Counter(itertools.chain.from_iterable([scene] * example.SCENE_FRAMES for scene in example.SCENES))
    assert right.total() >= 0.95 * shown.total()
    assert right["Eileen Collins"] == shown["Eileen Collins"]


def test_a_picture_without_a_face_gives_no_names(example: Any, identify: Any) -> None:
    import skimage.data

    for photo in (skimage.data.coffee(), skimage.data.chelsea(), np.zeros((480, 640, 3), np.uint8)):
        assert run(example, identify, example.Frame(0, 0.0, photo))["names"] == []


def test_a_face_that_is_not_known_is_recorded_as_unknown(example: Any) -> None:
    identify = example.Identifier({"Eileen Collins": example.known_people()["Eileen Collins"]})
    record = run(example, identify, example.Frame(0, 0.0, example.small_face(33)))
    assert record["names"] == ["unknown"]
    assert record["distances"][0] > example.SAME_PERSON


def test_a_folder_of_pictures_and_known_faces_of_ones_own(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2

    pictures, people = tmp_path / "pictures", tmp_path / "people"
    for folder in (pictures, people):
        folder.mkdir()
        (folder / "notes.txt").write_text("not a picture")
    astronaut = cv2.cvtColor(example.known_people()["Eileen Collins"], cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(people / "Somebody.png"), astronaut)
    for name in ("a.png", "b.jpg"):
        cv2.imwrite(str(pictures / name), astronaut)
    monkeypatch.setattr(example, "RATE", 1000.0)
    monkeypatch.chdir(tmp_path)
    frames, *_, identify, _ = [
        operator.function for operator in build(example.pipeline("pictures", "people")).operators
    ]
    monkeypatch.chdir("/")
    records = [run(example, identify, frame) for frame in frames()]
    assert [(record["frame"], record["names"], record["truth"]) for record in records] == [
        (0, ["Somebody"], None),
        (1, ["Somebody"], None),
    ]


def test_a_video_that_is_not_there_is_refused(example: Any) -> None:
    with pytest.raises(ValueError, match="no camera or video can be opened at 'nowhere.mp4'"):
        next(example.camera("nowhere.mp4")())


def test_a_photo_of_two_people_can_not_be_a_known_face(example: Any) -> None:
    photo = example.known_people()["Eileen Collins"]
    identify = example.Identifier({"Twins": np.hstack([photo, photo])})
    with pytest.raises(ValueError, match="the photo of Twins shows 2 faces"):
        run(example, identify, example.Frame(0, 0.0, photo))


def test_models_do_not_travel(example: Any, identify: Any) -> None:
    detect = example.Detector()
    assert detect.cascade is not None
    assert identify.network is not None
    for operator in (detect, identify):
        again = pickle.loads(pickle.dumps(operator))
        assert len(pickle.dumps(operator)) < 1000
        assert not {"cascade", "network", "landmarks", "gallery"} & set(vars(again))


def test_the_program_is_a_valid_pipeline(example: Any) -> None:
    pipeline = build(example.operators)
    assert [operator.spec.name for operator in pipeline.operators] == [
        "frames",
        "normalise",
        "detect",
        "identify",
        "record",
    ]
    assert pipeline.operators[0].spec.kind is Kind.SOURCE_GENERATOR
    assert (example.start_node, example.end_node) == ("edge", "cloud")
