"""Read records and tables from JSON or TOML, strictly, into dataclasses, with cattrs."""

from __future__ import annotations

import json
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
from cattrs.errors import AttributeValidationNote
from cattrs.gen import make_dict_structure_fn

from evalkit.errors import InputError, brief

__all__ = ["InNotebooks", "read_json", "read_record", "record_text", "structure"]

T = TypeVar("T")

MOST_PROBLEMS = 3


class InNotebooks:
    """A record that notebooks display as tables and figures."""

    def _repr_html_(self) -> str | None:
        """HTML; None if the packages it needs are not installed."""
        # Imported by name, because reports import records.
        fragment: Callable[[Any], str | None] = pkgutil.resolve_name("evalkit.report.html:fragment")
        return fragment(self)


def read_json(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object whose numbers are all finite.

    Raises:
        ValueError: The text is not a JSON object, or contains NaN or infinity.
        RecursionError: The text is nested too deeply.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"it holds {constant}")

    found = json.loads(text, parse_constant=refuse)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def read_record(text: str | bytes, kind: type[T], *, formats: Sequence[str], what: str) -> T:
    """Read a record of dataclass ``kind`` from JSON text whose ``"format"`` is one of ``formats``.

    Args:
        text: JSON.
        kind: A dataclass.
        formats: Names and versions of the supported formats, newest first.
        what: Name of the record for the message, such as ``"comparison"``.

    Raises:
        InputError: The text is not JSON, has a different format, or invalid values; see :func:`structure`.
    """
    try:
        values = read_json(text)
        found = values.pop("format", None)
        if found not in formats:
            raise ValueError(f"its format is {found!r}")
        return structure(values, kind, what)
    except (InputError, ValueError, RecursionError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise InputError(f"Not a {what} written by evalkit ({formats[0]!r}): {reason}.") from error


def record_text(record: Any, form: str) -> str:
    """The JSON text from which :func:`read_record` rebuilds the object.

    Args:
        record: An instance of a dataclass.
        form: Name and version of the format.
    """
    return json.dumps({"format": form, **asdict(record)}, indent=2, allow_nan=False) + "\n"


def structure(values: Any, kind: type[T], name: str) -> T:
    """Create an instance of a dataclass from a table of JSON or TOML.

    Types are checked, not converted: a number in quotes is an error, and so is a boolean for a number. But an
    integer becomes a float if a float is expected, and a list becomes a tuple.

    Args:
        values: The values of its fields; fields with defaults may be missing. For a field that is a
            dataclass, give a table or an instance of that class.
        kind: A dataclass.
        name: Name of the table in error messages.

    Raises:
        InputError: The values are not a table, a field is missing or unknown, a value has the wrong type or
            is not finite, or the dataclass rejects the values. The message names the first problems.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{name} is {brief(repr(values), 120)}; expected a table.")
    try:
        return _CONVERTER.structure(values, kind)
    except cattrs.BaseValidationError as error:
        problems = [problem.rstrip(".") for problem in _problems(error, values, name)]
        raise InputError(". ".join(problems[:MOST_PROBLEMS]) + ".") from error


def _problems(error: BaseException, values: Any, name: str) -> Iterator[str]:
    """The problems of ``values``, one sentence each."""
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = ", ".join(field.name for field in fields(error.cl))
        expected = f"expected some of {known}" if known else "it has no fields"
        for extra in sorted(map(str, error.extra_fields)):
            yield f"{name}.{brief(extra)} is unknown; {expected}"
        return
    if not isinstance(error, cattrs.ClassValidationError | cattrs.IterableValidationError):
        yield str(error) or type(error).__name__  # raised by the dataclass
        return
    noted, others = error.group_exceptions()
    key: Any  # key of a field, an item or an entry
    for cause, note in noted:
        if isinstance(note, AttributeValidationNote):
            key, where = note.name, f"{name}.{note.name}"
            if key not in values:
                yield f"{where} is missing; expected {_in_words(note.type)}"
                continue
        else:
            key, where = note.index, f"{name}[{note.index!r}]"
        if isinstance(cause, cattrs.BaseValidationError):
            yield from _problems(cause, values[key], where)
        else:
            yield f"{where} is {brief(repr(values[key]), 120)}; expected {_in_words(note.type)}"
    for cause in others:
        yield from _problems(cause, values, name)


def _in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return f"a list, each item {_in_words(arguments[0])}"
    if origin is UnionType:
        return " or ".join(map(_in_words, arguments))
    return _KINDS.get(kind, "a table")


def _scalar(value: Any, kind: type) -> Any:
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is float or type(value) is not kind:
        raise TypeError  # _problems reports the given value and the expected type
    return value


def _tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    items: Any = list[get_args(kind)[0]]  # type: ignore[misc]
    return tuple(_CONVERTER.structure(value, items))


def _one_of(value: Any, kind: Any) -> Any:
    if type(value) not in get_args(kind):
        raise TypeError
    return value


def _dataclass(cls: Any) -> Callable[[Any, Any], Any]:
    of_table: Callable[[Any, Any], Any] = make_dict_structure_fn(cls, _CONVERTER)
    return lambda value, _: value if isinstance(value, cls) else of_table(value, cls)


def _is_choice(kind: Any) -> bool:
    """Unions of scalars, such as ``int | str``; cattrs handles optional values itself."""
    return get_origin(kind) is UnionType and set(get_args(kind)) <= {bool, int, str}


def _is_list(kind: Any) -> bool:
    """Tuples of any length and a single type, the only kind in records."""
    return get_origin(kind) is tuple and get_args(kind)[1:] == (...,)


_KINDS = {
    bool: "true or false",
    float: "a finite number",
    int: "a whole number",
    str: "a text",
    NoneType: "null",
}
_CONVERTER = cattrs.Converter(forbid_extra_keys=True)
for _kind in (bool, float, int, str):
    _CONVERTER.register_structure_hook(_kind, _scalar)
_CONVERTER.register_structure_hook_func(_is_list, _tuple)
_CONVERTER.register_structure_hook_func(_is_choice, _one_of)
_CONVERTER.register_structure_hook_factory(is_dataclass, _dataclass)
