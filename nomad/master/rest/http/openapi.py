"""The OpenAPI document: pydantic derives the schemas from the handlers' types, openapi-pydantic checks the whole.

This file only says what stands where. It takes about a quarter of a second, nearly all of it
imports: callers build the document when somebody asks for it, and once.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from http import HTTPStatus
from typing import Any

from openapi_pydantic import OpenAPI
from pydantic import TypeAdapter

from nomad.master.rest.http import problems, sse
from nomad.master.rest.http.routing import JSON, Operation, Parameter, Typed

_REFS = "#/components/schemas/{model}"
_PROBLEM = {"$ref": _REFS.format(model=problems.Problem.__name__)}


def document(
    operations: Sequence[Operation], *, title: str, version: str, description: str, open_paths: Collection[str]
) -> bytes:
    """The document as JSON. All paths but `open_paths` are said to need the token."""
    schemas = _Schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _operation(operation, schemas)
        if operation.path in open_paths:
            described["security"] = []
        else:
            described["responses"]["401"] = _problem(401)
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    model = OpenAPI.model_validate(
        {
            "openapi": "3.1.1",
            "info": {"title": title, "version": version, "description": description},
            "paths": paths,
            "components": {
                "schemas": schemas.definitions,
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{"token": []}],
        }
    )
    return model.model_dump_json(by_alias=True, exclude_unset=True).encode()


class _Schemas:
    """Every type's schema, derived in one go so that shared types become shared components."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        wanted: list[tuple[Typed, str]] = [(Typed(problems.Problem), "serialization")]
        for operation in operations:
            inputs = [parameter.type for parameter in operation.parameters]
            if operation.body is not None and operation.body.type is not None:
                inputs.append(operation.body.type)
            wanted += [(typed, "validation") for typed in inputs]
            wanted += [(typed, "serialization") for typed in (operation.result, operation.item) if typed is not None]
        adapters: list[Any] = [(id(typed), mode, TypeAdapter(typed.kind)) for typed, mode in wanted]
        found, shared = TypeAdapter.json_schemas(adapters, ref_template=_REFS)
        self._by_type = {key: schema for (key, _), schema in found.items()}
        self.definitions = shared.get("$defs", {})

    def of(self, typed: Typed) -> Any:
        return self._by_type[id(typed)]


def _operation(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    summary, _, rest = inspect.cleandoc(operation.handler.__doc__ or "").partition("\n")
    described: dict[str, Any] = {
        "operationId": operation.handler.__name__,
        "tags": [operation.tag],
        "summary": summary.rstrip("."),
        "parameters": [_parameter(parameter, schemas) for parameter in operation.parameters],
        "responses": {str(operation.status): _answer(operation, schemas)},
    }
    if rest.strip():
        described["description"] = " ".join(rest.split())
    statuses = {*operation.raises, 422, 500}
    if operation.body is not None:
        statuses |= {413, 415}
        schema = {} if operation.body.type is None else schemas.of(operation.body.type)
        described["requestBody"] = {
            "required": True,
            "content": {media_type: {"schema": schema} for media_type in operation.body.media_types},
        }
    described["responses"] |= {str(status): _problem(status) for status in sorted(statuses)}
    return described


def _parameter(parameter: Parameter, schemas: _Schemas) -> dict[str, Any]:
    schema = dict(schemas.of(parameter.type))
    described = {"name": parameter.name, "in": parameter.place, "required": parameter.required, "schema": schema}
    if description := schema.pop("description", None):
        described["description"] = description
    return described


def _answer(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.media_type is not None:
        media_type = operation.media_type.partition(";")[0]
        content[media_type] = {"schema": schemas.of(operation.result) if operation.result else {"type": "string"}}
    described: dict[str, Any] = {"description": HTTPStatus(operation.status).phrase}
    if operation.item is not None:
        content[sse.MEDIA_TYPE] = {"schema": _event(schemas.of(operation.item))}
        described["description"] += (
            f". As {sse.MEDIA_TYPE} the schema is that of each event: an item, the mark that the stream is "
            "complete, or the problem that ended it."
        )
    if content:
        described["content"] = content
    if operation.location:
        described["headers"] = {"Location": {"schema": {"type": "string", "format": "uri-reference"}, "required": True}}
    return described


def _event(item: Any) -> dict[str, Any]:
    """One event of a stream. (OpenAPI 3.2 has `itemSchema` for it; before, tools take the stream's schema so.)"""

    def kind(data: Any, name: str | None = None) -> dict[str, Any]:
        properties: dict[str, Any] = {"data": {"type": "string", "contentMediaType": JSON, "contentSchema": data}}
        if name is None:
            return {"type": "object", "required": ["data"], "properties": properties, "not": {"required": ["event"]}}
        return {"type": "object", "required": ["event", "data"], "properties": properties | {"event": {"const": name}}}

    return {"oneOf": [kind(item), kind({"type": "object"}, "end"), kind(_PROBLEM, "problem")]}


def _problem(status: int) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": HTTPStatus(status).phrase,
        "content": {problems.MEDIA_TYPE: {"schema": _PROBLEM}},
    }
    if status == 401:
        described["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}}
    return described
