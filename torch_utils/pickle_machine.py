# SPDX-License-Identifier: MIT
"""A pickle interpreter that builds plain data only and cannot be made to run or to fetch anything.

Python's own unpicklers import what a file names, trust the lengths that it declares and let it build any amount
of objects from a few bytes. This one hands every name, call and state to `Hooks`, checks lengths against the
bytes that are there, and spends a `Budget`. Byte strings are views of the file, so that reading copies nothing.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, Protocol

MAX_TEXT_BYTES = 1 << 20  # of one string; the longest in official files is a module's source of about 30 kB
MAX_LINE_BYTES = 4096  # of one argument of protocol 0, and of one whole number
MAX_INTEGER_KEY = 1 << 60  # larger ones can be chosen to collide in a dict, which then takes forever


class DamagedPickleError(Exception):
    """A byte stream that is not a whole pickle, or one that goes beyond what official files contain."""


class Hooks(Protocol):
    """What the interpreter asks for instead of doing it."""

    def find_global(self, module: str, name: str) -> Any:
        """The stand-in for a function or class that the pickle names."""

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """The result of a call, or a new object of a class. `function` may be any value on the stack."""

    def build(self, target: Any, state: Any) -> None:
        """Give an object its state."""

    def persistent(self, key: Any) -> Any:
        """The object that a persistent id stands for."""


class Budget:
    """How much a file may still ask for; shared by a pickle and those nested in it.

    An instruction makes at most one object of less than 300 bytes, and text takes up to four bytes in memory for
    each of its bytes. So reading takes less than 300 * num_operations + 4 * num_text_bytes bytes.
    """

    def __init__(self, num_operations: int, num_text_bytes: int) -> None:
        self.num_operations = num_operations
        self.num_text_bytes = num_text_bytes

    def spend_operation(self) -> None:
        self.num_operations -= 1
        if self.num_operations < 0:
            raise DamagedPickleError("it consists of more objects than a network does")

    def spend_text(self, num_bytes: int) -> None:
        self.num_text_bytes -= num_bytes
        if num_bytes > MAX_TEXT_BYTES or self.num_text_bytes < 0:
            raise DamagedPickleError("it contains more text than a network does")


class PickleMachine:
    """Reads one pickle of any protocol from `data`; `position` is then the index of the byte after it.

    Lists, tuples, dicts, text and numbers come back as they are, sets as lists, bytes as views of `data`.
    Items under keys that are neither text nor integers are dropped, and so are items put into stand-ins.
    """

    def __init__(self, data: memoryview, hooks: Hooks, budget: Budget, position: int = 0) -> None:
        self.position = position
        self._data = data
        self._hooks = hooks
        self._budget = budget
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The pickled value. Raises DamagedPickleError, or whatever the hooks raise."""
        while True:
            self._budget.spend_operation()
            code = self._unpack("<B")
            if code == pickle.STOP[0]:
                return self._pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise DamagedPickleError(
                    f"byte {code:#04x} at {self.position - 1} is no instruction of a network's"
                )
            instruction(self)

    # Bytes of the file.

    def _take(self, num_bytes: int) -> memoryview:
        end = self.position + num_bytes
        if num_bytes < 0 or end > len(self._data):
            raise DamagedPickleError(f"it ends early: byte {end} is wanted of {len(self._data)}")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _unpack(self, layout: str) -> Any:
        start = self.position
        self.position += struct.calcsize(layout)
        if self.position > len(self._data):
            raise DamagedPickleError(f"it ends early: byte {self.position} is wanted of {len(self._data)}")
        return struct.unpack_from(layout, self._data, start)[0]

    def _line(self) -> str:
        text = bytes(self._data[self.position : self.position + MAX_LINE_BYTES])
        length = text.find(b"\n")
        if length < 0:
            raise DamagedPickleError(f"a line at byte {self.position} does not end")
        self.position += length + 1
        self._budget.spend_text(length)
        return text[:length].decode("latin-1")

    def _text(self, layout: str, encoding: str) -> str:
        num_bytes = self._unpack(layout)
        self._budget.spend_text(num_bytes)
        return bytes(self._take(num_bytes)).decode(
            encoding, "surrogatepass" if encoding == "utf-8" else "strict"
        )

    def _integer(self, layout: str) -> int:
        num_bytes = self._unpack(layout)
        if num_bytes > MAX_LINE_BYTES:
            raise DamagedPickleError(f"a number of {num_bytes} bytes")
        return int.from_bytes(self._take(num_bytes), "little", signed=True)

    # Stack and memo.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            raise DamagedPickleError("an instruction lacks its argument")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise DamagedPickleError("an instruction lacks its argument")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise DamagedPickleError("an instruction lacks its mark")
        height = self._marks.pop()
        items = self._stack[height:]
        del self._stack[height:]
        return items

    def _pop_discarding(self) -> None:
        """POP: the topmost value, or the mark above it."""
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _remember(self, index: int) -> None:
        self._memo[index] = self._top()

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise DamagedPickleError(f"object {index} is used before it is made")
        self._push(self._memo[index])

    # Values.

    def _push_pair_of_names(self) -> None:
        """STACK_GLOBAL: module and name are on the stack."""
        name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise DamagedPickleError("the name of a global is no text")
        self._push(self._hooks.find_global(module, name))

    def _push_tuple(self, length: int) -> None:
        if len(self._stack) < length:
            raise DamagedPickleError("an instruction lacks its argument")
        height = len(self._stack) - length
        self._stack[height:] = [tuple(self._stack[height:])]

    def _push_dict(self) -> None:
        items = self._pop_to_mark()
        self._push({})
        self._set_items(items)

    def _push_text_integer(self) -> None:
        line = self._line()
        constants = {"00": False, "01": True}
        self._push(constants[line] if line in constants else int(line.rstrip("L")))

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if len(items) % 2:
            raise DamagedPickleError("a key lacks its value")
        if not isinstance(target, dict):
            self._check_stand_in(target, list)
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) or (isinstance(key, int) and abs(key) < MAX_INTEGER_KEY):
                target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(items)
        else:
            self._check_stand_in(target, dict)

    @staticmethod
    def _check_stand_in(target: Any, wrong: type) -> None:
        if isinstance(target, (wrong, str, int, float, tuple, memoryview)):
            raise DamagedPickleError(f"items are put into a {type(target).__name__}")

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise DamagedPickleError("the arguments of a call are no tuple")
        self._push(self._hooks.call(function, arguments))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments)

    def _new_object_with_keywords(self) -> None:
        self._pop()  # the keywords: no stand-in uses them
        self._reduce()

    def _inst(self) -> None:
        arguments = self._pop_to_mark()
        module, name = self._line(), self._line()
        self._call(self._hooks.find_global(module, name), tuple(arguments))

    def _obj(self) -> None:
        function, *arguments = self._pop_to_mark() or [None]
        self._call(function, tuple(arguments))

    def _build(self) -> None:
        state = self._pop()
        self._hooks.build(self._top(), state)


_M = PickleMachine


def _pushing(read: Callable[[PickleMachine], Any]) -> Callable[[PickleMachine], None]:
    return lambda m: m._push(read(m))


_BY_NAME: dict[bytes, Callable[[PickleMachine], None]] = {
    pickle.PROTO: lambda m: m._take(1),
    pickle.FRAME: lambda m: m._take(8),  # a length for the benefit of readers that buffer
    pickle.NONE: _pushing(lambda m: None),
    pickle.NEWTRUE: _pushing(lambda m: True),
    pickle.NEWFALSE: _pushing(lambda m: False),
    pickle.INT: _M._push_text_integer,
    pickle.LONG: _M._push_text_integer,
    pickle.BININT: _pushing(lambda m: m._unpack("<i")),
    pickle.BININT1: _pushing(lambda m: m._unpack("<B")),
    pickle.BININT2: _pushing(lambda m: m._unpack("<H")),
    pickle.LONG1: _pushing(lambda m: m._integer("<B")),
    pickle.LONG4: _pushing(lambda m: m._integer("<i")),
    pickle.FLOAT: _pushing(lambda m: float(m._line())),
    pickle.BINFLOAT: _pushing(lambda m: m._unpack(">d")),
    pickle.STRING: _pushing(lambda m: m._line()[1:-1]),  # between quotes; official files have no escapes
    pickle.BINSTRING: _pushing(lambda m: m._text("<i", "latin-1")),
    pickle.SHORT_BINSTRING: _pushing(lambda m: m._text("<B", "latin-1")),
    pickle.UNICODE: _pushing(lambda m: m._line()),
    pickle.SHORT_BINUNICODE: _pushing(lambda m: m._text("<B", "utf-8")),
    pickle.BINUNICODE: _pushing(lambda m: m._text("<I", "utf-8")),
    pickle.BINUNICODE8: _pushing(lambda m: m._text("<Q", "utf-8")),
    pickle.SHORT_BINBYTES: _pushing(lambda m: m._take(m._unpack("<B"))),
    pickle.BINBYTES: _pushing(lambda m: m._take(m._unpack("<I"))),
    pickle.BINBYTES8: _pushing(lambda m: m._take(m._unpack("<Q"))),
    pickle.BYTEARRAY8: _pushing(lambda m: m._take(m._unpack("<Q"))),
    pickle.EMPTY_TUPLE: _pushing(lambda m: ()),
    pickle.TUPLE1: lambda m: m._push_tuple(1),
    pickle.TUPLE2: lambda m: m._push_tuple(2),
    pickle.TUPLE3: lambda m: m._push_tuple(3),
    pickle.TUPLE: _pushing(lambda m: tuple(m._pop_to_mark())),
    pickle.EMPTY_LIST: _pushing(lambda m: []),
    pickle.EMPTY_SET: _pushing(lambda m: []),
    pickle.LIST: _pushing(_M._pop_to_mark),
    pickle.FROZENSET: _pushing(_M._pop_to_mark),
    pickle.APPEND: lambda m: m._append([m._pop()]),
    pickle.APPENDS: lambda m: m._append(m._pop_to_mark()),
    pickle.ADDITEMS: lambda m: m._append(m._pop_to_mark()),
    pickle.EMPTY_DICT: _pushing(lambda m: {}),
    pickle.DICT: _M._push_dict,
    pickle.SETITEM: lambda m: m._set_items([m._pop(), m._pop()][::-1]),
    pickle.SETITEMS: lambda m: m._set_items(m._pop_to_mark()),
    pickle.MARK: lambda m: m._marks.append(len(m._stack)),
    pickle.POP: _M._pop_discarding,
    pickle.POP_MARK: _M._pop_to_mark,
    pickle.DUP: _pushing(_M._top),
    pickle.PUT: lambda m: m._remember(int(m._line())),
    pickle.BINPUT: lambda m: m._remember(m._unpack("<B")),
    pickle.LONG_BINPUT: lambda m: m._remember(m._unpack("<I")),
    pickle.MEMOIZE: lambda m: m._remember(len(m._memo)),
    pickle.GET: lambda m: m._recall(int(m._line())),
    pickle.BINGET: lambda m: m._recall(m._unpack("<B")),
    pickle.LONG_BINGET: lambda m: m._recall(m._unpack("<I")),
    pickle.GLOBAL: _pushing(lambda m: m._hooks.find_global(m._line(), m._line())),
    pickle.STACK_GLOBAL: _M._push_pair_of_names,
    pickle.INST: _M._inst,
    pickle.OBJ: _M._obj,
    pickle.REDUCE: _M._reduce,
    pickle.NEWOBJ: _M._reduce,
    pickle.NEWOBJ_EX: _M._new_object_with_keywords,
    pickle.BUILD: _M._build,
    pickle.BINPERSID: _pushing(lambda m: m._hooks.persistent(m._pop())),
    pickle.PERSID: _pushing(lambda m: m._hooks.persistent(m._line())),
}
_INSTRUCTIONS = {
    name[0]: instruction for name, instruction in _BY_NAME.items()
}  # by byte; EXT and buffers lack
