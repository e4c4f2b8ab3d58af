"""Numbers, texts and arrays out of a pickle, without unpickling: nothing in it is imported, called or run.

Python's own unpickler calls what a file names. Here a file is a list of instructions, which
:func:`pickletools.genops` reads and checks against the length of the file; the few of them that dictionaries
of arrays need are carried out on plain values. What NumPy's pickles call is known by name and done by hand.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, brief

__all__ = ["MOST_BYTES", "read_pickle"]

MOST_BYTES = 2**28
"""Of a file: EDM2's have 42 MB."""

MOST_OPCODES = 1_000
"""EDM2's have about 80. So few cannot nest or repeat values so often that it takes time."""

_MARK = object()
_SIMPLE = re.compile(r"[fiu][1248]")
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Refused(Exception):
    """It is more than numbers, texts and arrays; the text says what."""


@dataclass
class _Named:
    """What the file wants to be imported."""

    name: str


@dataclass
class _Dtype:
    """``numpy.dtype(code)``, and then its byte order."""

    code: str
    order: str = "="


@dataclass
class _Array:
    """An array of NumPy, whose parts come later."""

    shape: Any = ()
    dtype: Any = None
    fortran: Any = False
    data: Any = None

    def take(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self) -> NDArray[Any]:
        """The array, once it is certain that the bytes are as many as its shape says."""
        dtype, shape = self.dtype, self.shape
        if not isinstance(dtype, _Dtype) or not _SIMPLE.fullmatch(dtype.code) or dtype.order not in "<>=|":
            raise _Refused("an array of something else than plain numbers")
        found = np.dtype(dtype.code).newbyteorder(dtype.order)  # type: ignore[arg-type]
        if (
            not isinstance(shape, tuple)
            or len(shape) > 4
            or not all(type(n) is int and n >= 0 for n in shape)
        ):
            raise ValueError("an array whose shape is none")
        if (
            not isinstance(self.data, bytes | bytearray)
            or len(self.data) != math.prod(shape) * found.itemsize
        ):
            raise ValueError(f"an array of shape {shape} whose bytes are missing, or too many")
        flat = np.frombuffer(self.data, found)
        return flat.reshape(shape, order="F" if self.fortran is True else "C")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(shape, dtype, order == "F", data)


def _scalar(dtype: Any, data: Any) -> Any:
    return _Array((), dtype, False, data).array()[()].item()


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1":
        raise ValueError("bytes in another encoding than latin1")
    return bytes(text.encode("latin1"))


# What NumPy's pickles call, without NumPy: a function of ours that stands for it.
_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": lambda code, *_: _Dtype(code),
    "_codecs.encode": _encode,  # protocol 2 has no bytes
    "__builtin__.bytes": lambda: b"",  # and calls this for none
}
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    _CALLS[f"{_core}.multiarray._reconstruct"] = lambda *_: _Array()
    _CALLS[f"{_core}.multiarray.scalar"] = _scalar
    _CALLS[f"{_core}.numeric._frombuffer"] = _frombuffer
_NAMES = {*_CALLS, "numpy.ndarray"}


def read_pickle(name: str, data: bytes) -> Any:
    """What a pickle of protocol 2 or higher holds: numbers, texts, bytes, tuples, dictionaries and arrays.

    Args:
        name: The file, for messages.
        data: All of it, at most :data:`MOST_BYTES`.

    Raises:
        InputError: It is damaged, or holds anything else, which could run code.
    """
    try:
        return _arrays_of(_Machine().run(data))
    except _Refused as error:
        raise InputError(
            f"{name}: is a Python pickle with {error}. Unpickling can run code, so evalkit reads only "
            "dictionaries of numbers, texts and NumPy arrays out of a pickle. Save the arrays with np.savez"
        ) from error
    except Exception as error:  # the instructions of a damaged file go wrong in any way
        raise InputError(
            f"{name}: is a damaged or incomplete Python pickle "
            f"({type(error).__name__}: {brief(error, 200)}); copy it again"
        ) from error


class _Machine:
    """A stack of values, on which the instructions of a pickle work."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count == MOST_OPCODES:
                raise _Refused(f"more than {MOST_OPCODES:,} parts")
            if opcode.name == "STOP":
                (found,) = self.stack
                return found
            self.do(opcode.name, argument)
        raise EOFError("no end")

    def do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            size = _TUPLES[name]
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif (work := getattr(self, f"do_{name.lower()}", None)) is not None:
            work(argument)
        else:
            raise _Refused(f"the instruction {name}")

    def above_mark(self) -> list[Any]:
        """The values since the last mark, which are taken from the stack."""
        place = next(place for place in reversed(range(len(self.stack))) if self.stack[place] is _MARK)
        found = self.stack[place + 1 :]
        del self.stack[place:]
        return found

    def do_proto(self, protocol: Any) -> None:
        pass

    def do_frame(self, size: Any) -> None:
        pass

    def do_mark(self, _: None) -> None:
        self.stack.append(_MARK)

    def do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_empty_dict(self, _: None) -> None:
        self.stack.append({})

    def do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.above_mark()))

    def do_setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put(key, value)

    def do_setitems(self, _: None) -> None:
        items = self.above_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.put(key, value)

    def put(self, key: Any, value: Any) -> None:
        if not isinstance(key, str) or not isinstance(self.stack[-1], dict):
            raise ValueError("a key that is no text, or no dictionary for it")
        self.stack[-1][key] = value

    def do_global(self, argument: Any) -> None:
        self.name(str(argument).replace(" ", "."))

    def do_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self.name(f"{module}.{name}")

    def name(self, name: str) -> None:
        if name not in _NAMES:
            raise _Refused(f"{brief(name, 100)} in it")
        self.stack.append(_Named(name))

    def do_reduce(self, _: None) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        if not isinstance(named, _Named) or named.name not in _CALLS:
            raise _Refused("a call of something else than NumPy's arrays")
        self.stack.append(_CALLS[named.name](*arguments))

    def do_build(self, _: None) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, _Array):
            built.take(state)
        elif isinstance(built, _Dtype):
            built.order = state[1]
        else:
            raise _Refused("an object that is no array")


def _arrays_of(value: Any, depth: int = 0) -> Any:
    """The value with its arrays finished."""
    if isinstance(value, dict):
        if depth == 2:
            raise _Refused("dictionaries three deep")
        return {key: _arrays_of(item, depth + 1) for key, item in value.items()}
    return value.array() if isinstance(value, _Array) else value
