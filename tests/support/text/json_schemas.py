# ruff: noqa: E501
"""200 JSON schemas: what people send, what is hard, and each keyword alone, as test suites have them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any] | bool


def obj(required: list[str] | None = None, extra: Any = False, **properties: Any) -> dict[str, Any]:
    """An object schema; all properties are required unless said otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": extra,
    }


def arr(items: Any, low: int = 0, high: int = 3) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


INT = {"type": "integer"}
STR = {"type": "string"}
BOOL = {"type": "boolean"}
NULL = {"type": "null"}
SHORT = {"type": "string", "maxLength": 8}

INTEGERS: list[Schema] = [
    {"type": "integer", "minimum": low, "maximum": high}
    for low, high in [(0, 0), (0, 9), (1, 12), (-5, 5), (-120, -7), (7, 1234), (99, 101), (1000, 1000000), (-1, 0),
                      (0, 2**31 - 1), (-(2**31), 2**31 - 1), (2**53, 2**53 + 9)]
] + [
    {"type": "integer", "exclusiveMinimum": 0, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    {"type": "integer", "minimum": 10},
    {"type": "integer", "maximum": -10},
    {"type": "integer", "multipleOf": 5},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
]  # fmt: skip
NUMBERS: list[Schema] = [
    {"type": "number", "minimum": low, "maximum": high}
    for low, high in [(0, 1), (0.5, 0.75), (-1.5, 1.5), (-0.1, -0.01), (1e-3, 2e-3), (3.14, 3.15), (0, 100), (99.5, 1000.25),
                      (-273.15, 0), (12, 12)]
] + [
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "exclusiveMinimum": 2.5, "exclusiveMaximum": 2.6},
    {"type": "number", "minimum": 5},
    {"type": "number", "maximum": -0.5},
    {"type": "number"},
    {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 10},
]  # fmt: skip
STRINGS: list[Schema] = [
    {"type": "string", "minLength": low, "maxLength": high}
    for low, high in [(0, 0), (1, 1), (0, 5), (3, 3), (2, 9), (10, 20), (0, 40), (25, 30)]
] + [
    {"type": "string", "pattern": pattern}
    for pattern in [
        "^[a-z]{3,8}$", r"^\d{4}-\d{2}-\d{2}$", "^(red|green|blue)$", "^#[0-9a-fA-F]{6}$", r"^\+?[1-9]\d{1,14}$",
        "^[A-Z]{2}[0-9]{2}[A-Z0-9]{1,10}$", r"^[\w.+-]{1,10}@[a-z]{2,9}\.(com|org)$", r"^(\d{1,3}\.){3}\d{1,3}$", "^a?b*c{0,3}$",
        "^$", r"^\S{1,5}$", r"^[^\"\\]{1,6}$", '^"[a-z]"$', r"^\\[a-z]$", "^[äöüß]{1,4}$", "^[日本語]{2}$", "^😀{1,2}$",
        r"^v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)$", "^((a|b)c){1,4}$", "^[а-я]{2,5}$", r"^-?(0|[1-9][0-9]{0,4})(\.[0-9]{1,2})?$",
    ]
] + [
    {"type": "string", "format": name}
    for name in ["date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "duration", "uri"]
]  # fmt: skip
FIXED: list[Schema] = [
    {"const": value}
    for value in [1, -1.5, "x", "", 'q"uo\\te\n', "Ünïcödé 日本 😀", None, True, [], [1, "a", None], {}, {"a": {"b": [1]}}]
] + [
    {"enum": values}
    for values in [
        ["a"], ["red", "green", "blue"], [1, 2, 3], [1, "1", None, True], ["a", "ab", "abc"], [[1], [1, 2]],
        [{"a": 1}, {"a": 2}], ["日本", "中国", "한국"], ['"', "\\", "\n", "\t"], [0.1, 1e3, -2], ["", " "],
    ]
] + [
    {"type": "string", "enum": ["on", "off"]},
    {"type": "integer", "enum": [200, 404, 500]},
    {"type": ["string", "null"], "enum": ["x", None]},
]  # fmt: skip
ARRAYS: list[Schema] = [
    arr(INT, 1, 4), arr({"type": "integer", "minimum": 0, "maximum": 9}, 2, 2), arr(BOOL, 0, 0), arr(arr(BOOL, 1, 2), 1, 2),
    arr({"enum": ["a", "b"]}, 3, 5), arr(SHORT, 0, 2), arr({"anyOf": [INT, NULL]}, 1, 3), arr(obj(x={"const": 1}), 1, 2),
    {"type": "array", "prefixItems": [INT, BOOL], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"const": "p"}, NULL], "items": BOOL, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": NULL, "maxItems": 1}, "maxItems": 2}, "maxItems": 2},
    {"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": ["boolean", "null"]}},
]  # fmt: skip
OBJECTS: list[Schema] = [
    obj(), obj(a=INT), obj(a=BOOL, b=NULL), obj(["a"], a=BOOL, b=BOOL, c=BOOL), obj([], a=BOOL, b=NULL),
    obj(**{"weird key \" \\ 日本": BOOL}), obj(**{"": NULL}), obj(**{"a.b": BOOL, "a/b": BOOL, "a~b": BOOL, "$ref2": NULL}),
    obj(outer=obj(middle=obj(inner=obj(leaf=BOOL)))), obj(a=obj([], x=BOOL), b=arr(obj(y=NULL), 1, 2)),
    obj([], extra={"type": "boolean"}, a=NULL), obj(["a"], extra=BOOL, a=NULL),
    {"type": "object", "patternProperties": {"^x_[a-z]{1,3}$": BOOL}, "additionalProperties": False, "maxProperties": 2},
    {"type": "object", "additionalProperties": INT, "maxProperties": 2},
    {"type": "object", "properties": {"a": BOOL}, "required": ["a", "b"], "additionalProperties": BOOL},
    obj(tags=arr({"type": "string", "pattern": "^[a-z]{2,5}$"}, 1, 3), score={"type": "number", "minimum": 0, "maximum": 1}),
    obj(id={"type": "string", "format": "uuid"}, created={"type": "string", "format": "date-time"}),
    obj(**{f"field_{i}": BOOL for i in range(20)}), obj([], **{f"optional_{i}": BOOL for i in range(12)}),
    obj(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}, email={"anyOf": [{"type": "string", "format": "email"}, NULL]}),
]  # fmt: skip
UNIONS: list[Schema] = [
    {"anyOf": [INT, BOOL]}, {"anyOf": [{"const": 1}, {"const": "one"}]}, {"type": ["integer", "boolean", "null"]},
    {"anyOf": [obj(kind={"const": "a"}, x=BOOL), obj(kind={"const": "b"}, y=NULL)]},
    {"oneOf": [obj(kind={"const": "circle"}, r={"type": "number", "minimum": 0, "maximum": 9}),
               obj(kind={"const": "square"}, side={"type": "integer", "minimum": 1, "maximum": 9})]},
    {"oneOf": [BOOL, NULL]}, {"anyOf": [arr(BOOL, 1, 2), BOOL]}, {"anyOf": [{"type": "string", "maxLength": 3}, arr(INT, 1, 1)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"allOf": [obj(["a"], extra=True, a=BOOL), {"properties": {"a": {"const": True}}, "additionalProperties": BOOL}]},
    {"type": "object", "properties": {"v": {"anyOf": [BOOL, obj(w=NULL)]}}, "required": ["v"], "additionalProperties": False},
    {"anyOf": [{"enum": ["x", "y"]}, {"type": "integer", "minimum": 0, "maximum": 3}]},
    {"anyOf": [{"type": "null"}, {"anyOf": [{"type": "boolean"}, {"const": "deep"}]}]},
    {"type": ["object", "null"], "properties": {"a": BOOL}, "required": ["a"], "additionalProperties": False},
]  # fmt: skip


def refs(root: Any, **defs: Any) -> Schema:
    return {**root, "$defs": defs}


_REF = {"$ref": "#/$defs/node"}
REFS: list[Schema] = [
    refs({"$ref": "#/$defs/a"}, a=BOOL), refs(obj(x={"$ref": "#/$defs/a"}, y={"$ref": "#/$defs/a"}), a={"enum": [1, 2]}),
    refs({"$ref": "#/$defs/a"}, a={"$ref": "#/$defs/b"}, b={"$ref": "#/$defs/c"}, c=NULL),
    refs(_REF, node=obj(["value"], value=BOOL, next={"anyOf": [_REF, NULL]})),
    refs(_REF, node=obj(value=BOOL, children={"type": "array", "items": _REF, "maxItems": 2})),
    refs(_REF, node={"anyOf": [BOOL, {"type": "array", "items": _REF, "maxItems": 2}]}),
    {"definitions": {"old": {"type": "integer", "minimum": 1, "maximum": 3}}, **obj(v={"$ref": "#/definitions/old"})},
    {"type": "object", "properties": {"self": {"anyOf": [{"$ref": "#"}, NULL]}}, "required": ["self"], "additionalProperties": False},
    {**obj(a=BOOL, b={"$ref": "#/properties/a"})},
    refs(obj(x={"$ref": "#/$defs/a%20b"}, y={"$ref": "#/$defs/c~1d"}), **{"a b": BOOL, "c/d": NULL}),
    refs(obj(left=_REF, right=_REF), node={"anyOf": [NULL, obj(v={"type": "integer", "minimum": 0, "maximum": 99})]}),
    refs(arr({"$ref": "#/$defs/point"}, 1, 2), point=obj(x={"type": "number", "minimum": -1, "maximum": 1}, y=INT)),
]  # fmt: skip
REAL: list[Schema] = [
    obj(city={"type": "string", "enum": ["Oslo", "Zürich", "São Paulo", "東京"]}, unit={"type": "string", "enum": ["°C", "°F"]}),
    obj(steps=arr(obj(explanation=SHORT, output=SHORT), 1, 2), final_answer=SHORT),
    obj(sentiment={"enum": ["positive", "neutral", "negative"]}, confidence={"type": "number", "minimum": 0, "maximum": 1}),
    obj(sql={"type": "string", "pattern": "^SELECT [a-z, ]{1,12} FROM [a-z]{1,8};$"}),
    obj(model={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{3}$"}, price={"type": "number", "minimum": 0, "maximum": 9999.99},
        currency={"enum": ["EUR", "USD", "¥"]}, in_stock=BOOL),
    obj(title=SHORT, authors=arr(obj(first=SHORT, last=SHORT, orcid={"type": ["string", "null"], "maxLength": 4}), 1, 2),
        year={"type": "integer", "minimum": 1450, "maximum": 2100}),
    {"title": "Event", "description": "with annotations that constrain nothing", "examples": [{}], "default": {}, "$comment": "x",
     **obj(when={"type": "string", "format": "date", "title": "When", "description": "a day", "examples": ["2020-01-01"]})},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/a.json", **obj(ok=BOOL)},
    obj(matrix=arr(arr({"type": "integer", "minimum": -9, "maximum": 9}, 2, 2), 2, 2)),
    obj(lat={"type": "number", "minimum": -90, "maximum": 90}, lon={"type": "number", "minimum": -180, "maximum": 180}),
    obj(actions=arr({"anyOf": [obj(type={"const": "click"}, x=INT, y=INT), obj(type={"const": "type"}, text=SHORT),
                               obj(type={"const": "wait"}, ms={"type": "integer", "minimum": 1, "maximum": 5000})]}, 1, 3)),
    obj(["id"], id={"type": "integer", "minimum": 1, "maximum": 99999}, parent={"type": ["integer", "null"]}, labels=arr(SHORT, 0, 2),
        meta={"type": "object", "additionalProperties": SHORT, "maxProperties": 2}),
]  # fmt: skip

WRAPPED: list[Schema] = [
    obj(value=schema) for schema in (*INTEGERS[:6], *NUMBERS[:5], *STRINGS[8:20], *FIXED[:4])
] + [arr(schema, 1, 2) for schema in (*INTEGERS[6:10], *STRINGS[8:12], *UNIONS[:4])]
SCHEMAS: list[Schema] = [
    *INTEGERS, *NUMBERS, *STRINGS, *FIXED, *ARRAYS, *OBJECTS, *UNIONS, *REFS, *REAL, *WRAPPED,
]  # fmt: skip
