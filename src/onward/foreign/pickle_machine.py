"""Pickles read as data: a small machine that builds plain values, and inert stubs for everything else.

Python's own unpickler calls what a file names. This one calls nothing and imports nothing: a class or function is a
`Global`, its use is a `Stub` that remembers the name, the arguments and the state, and only a closed list of
constructors (dictionaries, sets, sizes, numpy's scalars and arrays, torch's tensors) gives a value.
The opcodes are parsed by the standard library's pickletools, which only reads them.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NoReturn, Protocol

from onward.errors import DamageError, InputError
from onward.foreign.pickle_values import MAX_KEY, Array, Global, Stub, numpy_type, scalar, sizes

MAX_OPCODES = 4_000_000  # some hundred bytes each: what a file can make this machine hold is bounded by these two
MAX_BYTES = 1 << 28  # of strings and numbers in one pickle, copies included


class Stream(Protocol):
    """What pickletools reads from."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


CONTAINERS: dict[str, Any] = {
    "OrderedDict": dict,
    "defaultdict": dict,
    "dict": dict,
    "set": set,
    "frozenset": frozenset,
}
BUILTINS = ("builtins", "__builtin__", "collections")
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_MARK = object()


def unpickle(
    stream: Stream,
    where: str,
    persistent: Callable[[Any], Any] | None = None,
    constructors: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """The value of the pickle that begins at the stream's position, which afterwards is behind it.

    `persistent` turns what the pickle calls a persistent id into a value; `constructors` are further functions of the
    closed list, by dotted name. DamageError names the file when the bytes are no whole pickle or make no sense,
    InputError when they ask for more than any checkpoint needs.
    """
    machine = _Machine(where, persistent, constructors or {})
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count > MAX_OPCODES:
                raise InputError(f"asks for more than {MAX_OPCODES:,} objects: no checkpoint", where=where)
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error, MemoryError, AttributeError) as e:
        raise DamageError(f"is no pickle that can be read, or a damaged one ({_reason(e)})", where=where) from None


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return "something is missing on its stack" if isinstance(error, IndexError) else text[:120]


class _Machine:
    """The stack, the memo, and one step for each opcode."""

    def __init__(
        self, where: str, persistent: Callable[[Any], Any] | None, constructors: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.where = where
        self.persistent = persistent
        self.constructors = constructors
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.bytes = 0

    def step(self, name: str, argument: Any) -> None:
        stack, target = self.stack, dict[Any, Any]()
        if isinstance(argument, str | bytes):
            self._charge(len(argument))
        if name in PUSHED:
            if isinstance(argument, int):
                self._charge(argument.bit_length() // 8)
            stack.append(argument)
            return
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._marked()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(name[-1]))))
            case "EMPTY_LIST" | "LIST":
                stack.append(self._marked() if name == "LIST" else [])
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                pairs = self._marked()
                self._set_items(target, pairs)
                stack.append(target)
            case "EMPTY_SET":
                stack.append(set())
            case "FROZENSET":
                stack.append(frozenset(map(self._key, self._marked())))
            case "APPEND" | "APPENDS":
                self._extend(self._marked() if name == "APPENDS" else self._take(1))
            case "SETITEM" | "SETITEMS":
                pairs = self._marked() if name == "SETITEMS" else self._take(2)
                self._set_items(stack[-1], pairs)
            case "ADDITEMS":
                added = self._marked()
                stack[-1].update(map(self._key, added))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(Global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, attribute = self._take(2)
                if not (isinstance(module, str) and isinstance(attribute, str)):
                    raise ValueError("a class whose name is no text")
                stack.append(Global(module, attribute))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._take(2)
                stack.append(self._call(function, arguments))
            case "NEWOBJ_EX":
                function, arguments, named = self._take(3)
                stack.append(Stub(_name(function), (*_tuple(arguments), named)))
            case "INST":
                stack.append(self._call(Global(*argument.split(" ", 1)), tuple(self._marked())))
            case "OBJ":
                function, *rest = self._marked()
                stack.append(self._call(function, tuple(rest)))
            case "BUILD":
                state = self._take(1)[0]
                stack[-1] = self._build(stack[-1], state)
            case "BINPERSID" if self.persistent:
                stack.append(self.persistent(self._take(1)[0]))
            case _:
                self._refuse(name)

    def _charge(self, size: int) -> None:
        self.bytes += size
        if self.bytes > MAX_BYTES:
            raise InputError(
                f"asks for more than {MAX_BYTES:,} bytes beside its tensors: no checkpoint", where=self.where
            )

    def _refuse(self, name: str) -> NoReturn:
        raise InputError(f"uses {name}, which no checkpoint needs", where=self.where)

    def _top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark where a value must be")
        return self.stack[-1]

    def _take(self, count: int) -> list[Any]:
        """The last `count` values, off the stack."""
        taken = self.stack[len(self.stack) - count :] if len(self.stack) >= count else []
        if len(taken) < count or any(value is _MARK for value in taken):
            raise IndexError
        del self.stack[len(self.stack) - count :]
        return taken

    def _marked(self) -> list[Any]:
        """The values above the last mark, off the stack with it."""
        taken = []
        while (value := self.stack.pop()) is not _MARK:
            taken.append(value)
        taken.reverse()
        return taken

    def _key(self, value: Any) -> Hashable:
        """A key of a dictionary or set. Nested tuples are not: hashing them can take for ever."""
        flat = value if isinstance(value, tuple) else (value,)
        for part in flat:
            if isinstance(part, int) and abs(part) > MAX_KEY:
                raise ValueError("a key that is too large")
            if not isinstance(part, str | bytes | int | float | Global | Stub | None):
                raise ValueError("a key that is no plain value")
        return value  # type: ignore[no-any-return]

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Stub):
            target.elements.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise ValueError("appends to what is no list")

    def _set_items(self, target: Any, pairs: list[Any]) -> None:
        into = target.items if isinstance(target, Stub) else target
        if not isinstance(into, dict) or len(pairs) % 2:
            raise ValueError("sets keys of what is no dictionary")
        for index in range(0, len(pairs), 2):
            into[self._key(pairs[index])] = pairs[index + 1]

    def _call(self, function: Any, arguments: Any) -> Any:
        """What a call gives: a value for the closed list, a stub otherwise."""
        arguments = _tuple(arguments)
        if isinstance(function, Global):
            if make := self.constructors.get(str(function)):
                return make(*arguments)
            if function.module in BUILTINS and function.name in CONTAINERS:
                return self._container(function.name, arguments)
            match function.module, function.name:
                case "torch", "Size":
                    return sizes(*arguments)
                case "_codecs", "encode" if arguments[1:] == ("latin1",):
                    self._charge(len(arguments[0]))
                    return arguments[0].encode("latin1")
                case (("builtins" | "__builtin__"), "bytearray") if not arguments:
                    return bytearray()
                case module, "scalar" if module in MULTIARRAY:
                    return scalar(*arguments)
                case module, "_reconstruct" if module in MULTIARRAY:
                    return Array()
                case (("copyreg" | "copy_reg"), "_reconstructor"):
                    return Stub(_name(arguments[0]))
        return Stub(_name(function), arguments)

    def _container(self, name: str, arguments: tuple[Any, ...]) -> Any:
        content = arguments[0] if arguments and name != "defaultdict" else ()
        if not isinstance(content, list | tuple):
            raise ValueError("a container of what is no list")
        self._charge(100 * len(content))  # the list may be one that the memo remembers
        if CONTAINERS[name] is not dict:
            return CONTAINERS[name](map(self._key, content))
        target: dict[Any, Any] = {}
        for key, value in content:
            target[self._key(key)] = value
        return target

    def _build(self, target: Any, state: Any) -> Any:
        if isinstance(target, Stub):
            if target.state is not None:
                raise ValueError("sets a state twice")
            target.state = state
        elif isinstance(target, Array):
            _, shape, dtype, fortran, data = state
            kind, big = numpy_type(dtype)
            target.kind, target.shape, target.big_endian, target.fortran = kind, sizes(shape), big, bool(fortran)
            target.data = data if isinstance(data, bytes) else b""
        return target  # what a dictionary or a tensor carries besides, like a state_dict's _metadata, is not needed


def _name(value: Any) -> str:
    if isinstance(value, Global):
        return str(value)
    return f"{value.of}()" if isinstance(value, Stub) and len(value.of) < 200 else "something nested"


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ValueError("arguments that are no tuple")
    return value


PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
