"""Who is in the picture? A camera at the edge, the heavy work further up.

    frames -> normalise -> detect -> identify -> record

- frames     pictures from a camera, a video, a folder, or made here with a known answer (the default)
- normalise  one size, and light as even as it can be made
- detect     where the faces are: a Haar cascade, a statistical model that suits a small machine;
             from here on only the faces travel, not the pictures
- identify   who they are: a deep network (a ResNet) makes 128 numbers of a face, and the nearest known face
             gives the name, if it is near enough
- record     what the outside gets to know

Run it:

    pip install ".[examples]"
    nomad up --node edge --node fog --node cloud &
    nomad submit examples/face_recognition.py
    nomad tail faces record

With pictures of your own (a camera's number, a video file or a folder of pictures), and with the faces to
know in a folder, one picture each, named after the person ("Ada Lovelace.jpg"):

    FACES_FROM=0 FACES_KNOWN=~/people nomad submit examples/face_recognition.py

FACES_RATE=2 takes two pictures a second of a folder, or of those made here, instead of four. From Python:
`await cluster.submit(pipeline("video.mp4", "people"), start="edge", end="cloud")`.

These are plain functions and objects: nothing here needs Nomad to be tried or tested. The models never
travel: each process loads its own, once, in `setup`, so that it is ready when the first frame comes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import cv2
import dlib
import numpy as np
import skimage.data

import nomad

WIDTH, HEIGHT = 640, 480
RATE = float(os.environ.get("FACES_RATE", "4"))
"""Frames per second of a folder and of the pictures made here."""
SAME_PERSON = 0.6
"""Two faces nearer to each other than this are of one person; the network was trained for this distance."""
UNKNOWN, NOBODY = "unknown", "nobody"


# What the operators hand on. Dataclasses and arrays travel as they are.


@dataclass(frozen=True)
class Frame:
    number: int
    """Counts up from 0."""
    taken: float
    """Seconds since the epoch."""
    pixels: np.ndarray
    """Height x width x RGB, uint8."""
    truth: str | None = None
    """Who is in it, where that is known: a name, "unknown" or "nobody"."""


@dataclass(frozen=True)
class Faces:
    number: int
    taken: float
    truth: str | None
    cutouts: list[np.ndarray]
    """One picture for each face, with some room around it."""


@dataclass(frozen=True)
class Names:
    number: int
    taken: float
    truth: str | None
    names: list[str]
    distances: list[float]
    """How far each face is from the nearest one known."""


# frames


def camera(pictures: str = "") -> Callable[[], Iterator[Frame]]:
    """The source operator for `pictures`: a camera's number, a video file, a folder, or "" for pictures made here."""
    if os.path.exists(os.path.expanduser(pictures)):  # the operator's process has another current folder
        pictures = os.path.abspath(os.path.expanduser(pictures))

    @nomad.source(memory="256Mi")
    def frames() -> Iterator[Frame]:
        if not pictures:
            shots = paced(made_up())
        elif os.path.isdir(pictures):
            shots = paced((read(path), None) for path in photos_in(pictures))
        else:
            shots = filmed(int(pictures) if pictures.isdecimal() else pictures)
        for number, (pixels, truth) in enumerate(shots):
            yield Frame(number, time.time(), pixels, truth)

    return frames


Shots = Iterator[tuple[np.ndarray, str | None]]
"""Pictures, and who is in them where that is known."""


def filmed(source: int | str) -> Shots:
    """The pictures of a camera, as it takes them, or of a video file."""
    video = cv2.VideoCapture(source)
    if not video.isOpened():
        raise ValueError(f"no camera or video can be opened at {source!r}")
    try:
        while (shot := video.read())[0]:
            yield cv2.cvtColor(shot[1], cv2.COLOR_BGR2RGB), None
    finally:
        video.release()


def photos_in(folder: str) -> list[Path]:
    """The files of `folder` that are pictures, by name."""
    return [path for path in sorted(Path(folder).expanduser().iterdir()) if cv2.haveImageReader(str(path))]


def read(path: Path) -> np.ndarray:
    """The picture in a file."""
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def paced(shots: Shots) -> Shots:
    """`shots`, at most `RATE` a second."""
    due = time.monotonic()
    for shot in shots:
        time.sleep(max(0.0, due - time.monotonic()))
        due = max(due + 1 / RATE, time.monotonic())
        yield shot


SCENES = ["Eileen Collins", UNKNOWN, "Eileen Collins", "Guest", NOBODY]
"""Who walks past the camera, again and again, for `SCENE_FRAMES` frames each."""
SCENE_FRAMES = 10


def made_up() -> Shots:
    """Photos with a known answer, moved, scaled and lit differently in every frame; without end."""
    photos = {**known_people(), UNKNOWN: small_face(33), NOBODY: skimage.data.coffee()}
    for number in itertools.count():
        truth = SCENES[number // SCENE_FRAMES % len(SCENES)]
        yield varied(photos[truth], number), truth


def known_people() -> dict[str, np.ndarray]:
    """The photos of faces that scikit-image brings along: an astronaut, and one of the nameless small ones."""
    return {"Eileen Collins": skimage.data.astronaut(), "Guest": small_face(49)}


def small_face(index: int) -> np.ndarray:
    """One of scikit-image's faces of 25 x 25 grey pixels, enlarged, with room around it."""
    face = (skimage.data.lfw_subset()[index] * 255).astype(np.uint8)
    face = cv2.resize(face, (200, 200), interpolation=cv2.INTER_CUBIC)
    face = cv2.copyMakeBorder(face, 150, 150, 150, 150, cv2.BORDER_REPLICATE)
    return cv2.cvtColor(face, cv2.COLOR_GRAY2RGB)


def varied(photo: np.ndarray, number: int) -> np.ndarray:
    """The camera's picture of `photo` in frame `number`; the same again for the same number."""
    random = np.random.default_rng(number)
    height, width = photo.shape[:2]
    scale = HEIGHT / height * random.uniform(0.85, 1.25)
    right, down = random.uniform(-60, 60), random.uniform(0, 60)
    move = np.array([[scale, 0, (WIDTH - scale * width) / 2 + right], [0, scale, (HEIGHT - scale * height) / 2 + down]])
    picture = cv2.warpAffine(photo, move, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REPLICATE)
    light, noise = random.uniform(0.4, 1.3), random.integers(-8, 9, picture.shape, np.int8)
    return np.clip(picture * light + noise, 0, 255).astype(np.uint8)


# normalise


@nomad.operator(memory="128Mi")
def normalise(frame: Frame) -> Frame:
    """The frame in one size, with its brightness evened out over small areas."""
    height, width = frame.pixels.shape[:2]
    scale = min(WIDTH / width, HEIGHT / height)
    pixels = frame.pixels
    if scale != 1:
        pixels = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    brightness, red, blue = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb))
    brightness = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(brightness)
    return replace(frame, pixels=cv2.cvtColor(cv2.merge([brightness, red, blue]), cv2.COLOR_YCrCb2RGB))


# detect


class Detector:
    """Finds the faces of a frame."""

    def setup(self) -> None:
        """Nomad calls it in the operator's process, before the first frame comes."""
        _ = self.cascade

    @cached_property
    def cascade(self) -> cv2.CascadeClassifier:
        return cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")

    def __call__(self, frame: Frame) -> Faces:
        grey = cv2.cvtColor(frame.pixels, cv2.COLOR_RGB2GRAY)
        boxes = self.cascade.detectMultiScale(grey, scaleFactor=1.2, minNeighbors=4, minSize=(60, 60))
        cutouts = [cutout(frame.pixels, *box) for box in boxes]
        return Faces(frame.number, frame.taken, frame.truth, cutouts)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # the model stays here; whoever gets this object loads its own


def cutout(pixels: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """The box with half its size added on each side, so that the face is in the middle; black beyond the picture."""
    room = width // 2
    framed = cv2.copyMakeBorder(pixels, room, room, room, room, cv2.BORDER_CONSTANT)
    return framed[y : y + height + 2 * room, x : x + width + 2 * room]


# identify


class Identifier:
    """Names the faces: `known` has a photo with one face for each name."""

    def __init__(self, known: dict[str, np.ndarray] | None = None):
        self.known = known

    def setup(self) -> None:
        """Load the models and describe the known faces; this takes a second or two, in which nobody waits."""
        _ = self.gallery

    def __call__(self, faces: Faces) -> Names:
        names, distances = [], []
        for face in faces.cutouts:
            name, distance = self.nearest(self.describe(face))
            names.append(name if distance < SAME_PERSON else UNKNOWN)
            distances.append(round(distance, 3))
        return Names(faces.number, faces.taken, faces.truth, names, distances)

    def describe(self, face: np.ndarray) -> np.ndarray:
        """The 128 numbers that the network makes of a cutout of `detect`."""
        height, width = face.shape[:2]
        box = dlib.rectangle(width // 4, height // 4, width - width // 4, height - height // 4)
        face = np.ascontiguousarray(face)
        return np.array(self.network.compute_face_descriptor(face, self.landmarks(face, box)))

    def nearest(self, description: np.ndarray) -> tuple[str, float]:
        names, descriptions = self.gallery
        distances = np.linalg.norm(descriptions - description, axis=1)
        return names[distances.argmin()], float(distances.min())

    @cached_property
    def landmarks(self) -> dlib.shape_predictor:
        return dlib.shape_predictor(model("shape_predictor_5_face_landmarks.dat"))

    @cached_property
    def network(self) -> dlib.face_recognition_model_v1:
        return dlib.face_recognition_model_v1(model("dlib_face_recognition_resnet_model_v1.dat"))

    @cached_property
    def gallery(self) -> tuple[list[str], np.ndarray]:
        """The names, and the description of each one's face, made the way frames are treated."""
        detect, names, descriptions = Detector(), [], []
        for name, photo in (self.known or known_people()).items():
            found = detect(normalise(Frame(0, 0.0, photo))).cutouts
            if len(found) != 1:
                raise ValueError(f"the photo of {name} shows {len(found)} faces; it should show one")
            names.append(name)
            descriptions.append(self.describe(found[0]))
        return names, np.array(descriptions)

    def __getstate__(self) -> dict[str, Any]:
        return {"known": self.known}  # the models stay here; whoever gets this object loads its own


def model(name: str) -> str:
    """Where the trained models were installed."""
    return str(distribution("face_recognition_models").locate_file(f"face_recognition_models/models/{name}"))


# record


def record(result: Names) -> dict[str, Any]:
    """What is kept of a frame; it goes into the log, and `nomad tail` shows it."""
    entry = {
        "frame": result.number,
        "names": result.names,
        "distances": result.distances,
        "truth": result.truth,
        "seconds": round(time.time() - result.taken, 3),
    }
    print(f"frame {result.number}: {', '.join(result.names) or NOBODY}", flush=True)
    return entry


def pipeline(pictures: str = "", people: str = "") -> list[Callable[..., Any]]:
    """The operators, for `pictures` as in `camera`, and the known faces in the folder `people` ("": `known_people`)."""
    known = {path.stem: read(path) for path in photos_in(people)} if people else None
    return [
        camera(pictures),
        normalise,
        nomad.operator(Detector(), name="detect", memory="256Mi"),
        nomad.operator(Identifier(known), name="identify", memory="512Mi"),
        record,
    ]


operators = pipeline(os.environ.get("FACES_FROM", ""), os.environ.get("FACES_KNOWN", ""))
start_node = "edge"
end_node = "cloud"
pipeline_id = "faces"
profile = [  # what to expect of each operator, for its first place; afterwards it is measured
    {"cloud_execution_time": 0.030, "output_msg_size": WIDTH * HEIGHT * 3},
    {"cloud_execution_time": 0.003, "output_msg_size": WIDTH * HEIGHT * 3},
    {"cloud_execution_time": 0.040, "output_msg_size": 100_000},
    {"cloud_execution_time": 0.100, "output_msg_size": 100},
    {"cloud_execution_time": 0.001, "output_msg_size": 100},
]
