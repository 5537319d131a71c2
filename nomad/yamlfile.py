"""YAML files that people write by hand, checked by a pydantic model: every problem with its line, place and way out.

Used by topology files and benchmark scenarios. Nothing is guessed and nothing unknown is ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nomad.errors import UsageError

M = TypeVar("M", bound=BaseModel)
Place = Sequence[int | str]
"""Where something stands: keys and numbers of list items, from the top."""


@dataclass(frozen=True, slots=True)
class Document:
    """A file's content, or that of a part of it, with where its parts stand."""

    data: Any
    node: yaml.Node | None
    source: str
    """What it is called in messages."""

    def line(self, place: Place) -> int:
        """The line of the deepest part of `place` that the file has, from 1."""
        node, line = self.node, 1 if self.node is None else self.node.start_mark.line + 1
        for part in place:
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
                if found is None:
                    return line
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                return line
        return line

    def where(self, place: Place) -> str:
        """`file.yaml, line 3, links.0`, for the beginning of a message."""
        dotted = f", {'.'.join(str(part) for part in place)}" if place else ""
        return f"{self.source}, line {self.line(place)}{dotted}"

    def part(self, key: str) -> Document:
        """What stands under `key` of this map."""
        assert isinstance(self.node, yaml.MappingNode)
        node = next(value for name, value in self.node.value if name.value == key)
        return Document(self.data[key], node, self.source)


def read(path: str | Path, what: str, error: type[UsageError]) -> str:
    """The text of a file, which is a `what` file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise error(f"can't read the {what} file {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise error(f"the {what} file {path} isn't UTF-8 text: {exc}") from exc


def parse(text: str, source: str, error: type[UsageError]) -> Document:
    """YAML text as data. Raises `error`, also for a key that stands there twice."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated_keys(root, source, error)
        return Document(yaml.safe_load(text), root, source)
    except yaml.YAMLError as exc:
        raise error(f"{source} isn't valid YAML: {exc}") from exc
    except RecursionError:
        raise error(f"{source} nests lists or maps too deeply to be read") from None


def validate(
    document: Document,
    model: type[M],
    error: type[UsageError],
    *,
    known: Callable[[Place], Iterable[str]],
    words: Callable[[ErrorDetails, Place], str | None],
    place: Callable[[Place], Place] = lambda place: place,
) -> M:
    """The document as `model`, or `error` with all problems, one a line.

    `known` are the keys that may stand in the map at a place; `words` may say a problem better; `place` takes out of a
    place what only pydantic knows of.
    """
    try:
        return model.model_validate(document.data)
    except ValidationError as exc:
        lines = []
        for item in exc.errors(include_url=False):
            at = place([part for part in item["loc"] if part != "[key]"])
            lines.append(f"{document.where(at)}: {words(item, at) or _problem(item, at, known)}")
        raise error("\n".join(lines)) from None


def suggestion(wrong: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean 'cloud'?`, or what is known."""
    names = list(known)
    near = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise}: {', '.join(names)}"


def keys(model: type[BaseModel]) -> list[str]:
    """The keys that a map may have, as they are written."""
    return [info.alias or name for name, info in model.model_fields.items()]


def _problem(item: ErrorDetails, place: Place, known: Callable[[Place], Iterable[str]]) -> str:
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key {place[-1]!r}; {suggestion(str(place[-1]), known(place[:-1]), 'known')}"
        case "value_error":
            return str(item["ctx"]["error"])
        case "missing":
            return f"{place[-1]!r} is missing"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"must be a map, not {item['input']!r}"
        case "tuple_type" | "list_type" | "frozen_set_type":
            return f"must be a list, not {item['input']!r}"
        case "string_type":
            return f"must be text, not {item['input']!r}; put it in quotes"
        case _:
            return f"{item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"


def _refuse_repeated_keys(root: yaml.Node | None, source: str, error: type[UsageError]) -> None:
    """YAML loaders silently keep the last of two equal keys; a node that is declared twice is a mistake."""
    todo: list[yaml.Node] = [root] if root is not None else []
    visited: set[int] = set()  # an alias may lead back to where it stands
    while todo:
        node = todo.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise error(f"{source}, line {line}: a key must be text")
                if key.value in seen:
                    raise error(
                        f"{source}, line {line}: {key.value!r} stands there twice (first in line {seen[key.value]}); "
                        "give the second a name of its own or take it out"
                    )
                seen[key.value] = line
                todo.append(value)
