"""Check of the pickle in a checkpoint, without building its objects.

`torch.load(weights_only=True)` runs no code of a file. It can still be made to allocate gigabytes by a file of some hundred bytes, to
overflow the stack of the process, or to compute for hours. The scan follows the instructions of the pickle, as
`pickletools.genops` reads them, with descriptions instead of values. It accepts dictionaries, lists and tuples of tensors, numpy
numbers and plain values, within the limits below, and refuses everything else.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

#: A checkpoint of a ResNet-101 with its momenta has 33,000 instructions.
MOST_INSTRUCTIONS = 2_000_000

#: Depth of nested structures, and number of their items; an item of several structures is counted several times.
DEEPEST, MOST_ITEMS = 50, 10_000_000

#: Bytes of tensors and text per byte of the file, counted in the same way: shared weights are counted several times.
SHARING = 4

#: Repeated content is accepted below this size.
HARMLESS_BYTES = 1 << 20

#: Keys of dictionaries: text of so many printable characters, or numbers. Optimisers of torch < 1.5 take addresses as keys.
LONGEST_KEY, LARGEST_KEY = 1000, 1 << 48

#: Integers, such as the state of a random generator, have at most 128 bits; dimensions of a tensor.
LARGEST_INTEGER, MOST_DIMENSIONS = 1 << 128, 16

#: Bytes of an element by the name of its storage, of the types that a training computes and counts in.
ELEMENT_BYTES = {
    f"torch {kind}Storage": size
    for size, kinds in {1: "Byte Char Bool", 2: "Half BFloat16 Short", 4: "Float Int", 8: "Double Long"}.items()
    for kind in kinds.split()
}

#: Numpy types of numbers that official programs store as scores.
NUMPY_KIND = re.compile(r"[fiu][1248]|b1")

#: The state that numpy writes for each of them; the second entry is the byte order.
NUMPY_STATE = [3, "<|", None, None, None, -1, -1, 0]

#: Instructions that push a constant, and those that push their argument.
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
ARGUMENTS = frozenset(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"))


class Refused(ValueError):
    """A pickle that no training wrote; the text goes on after "it holds"."""


@dataclass(eq=False)
class Thing:
    """Description of a value. Plain numbers, text and None are used themselves.

    Attributes:
        kind: "tuple", "list", "dict", "ordered", "tensor", "number" (numpy's), "size", or, as arguments only, "function", "storage",
            "type" (numpy's), "bytes".
        items: of a tuple or list.
        detail: name of a function, (elements, bytes of an element) of a storage, length of bytes, keys of a dictionary.
        depth, count, size: levels, items and bytes of it, with what it contains.
        finished: it is part of another value, or was referenced again, so that nothing may be added to it any more.
        plain: it may be part of a checkpoint.
    """

    kind: str
    items: list[Any] = field(default_factory=list)
    detail: Any = None
    depth: int = 0
    count: int = 1
    size: int = 0
    finished: bool = False
    plain: bool = True


@dataclass
class PickleScan:
    """Follows pickles of one file.

    Args:
        file_size: bytes of the file.
        records: size of each storage by its key, where the file has a directory of them.
    """

    file_size: int
    records: Mapping[str, int] | None = None
    storages: dict[str, tuple[int, int]] = field(default_factory=dict)
    allocated: int = 0

    def follow(self, stream: BinaryIO) -> None:
        """Read a pickle to its end.

        Args:
            stream: stands at its first instruction, afterwards behind its last.

        Raises:
            Refused: its content is not that of a checkpoint.
            ValueError, LookupError, AttributeError, TypeError: it is damaged.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > MOST_INSTRUCTIONS:
                raise Refused(f"more than {MOST_INSTRUCTIONS} instructions")
            if opcode.name in ARGUMENTS:
                self.stack.append(self._constant(argument))
            elif opcode.name in CONSTANTS:
                self.stack.append(CONSTANTS[opcode.name])
            elif opcode.name in INSTRUCTIONS:
                INSTRUCTIONS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "STOP"):
                raise Refused(f"the instruction {opcode.name}")
        self._require_plain(self.stack[-1])

    # ------------------------------------------------------------ structures

    def _constant(self, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
            raise Refused("an integer of more than 128 bits")
        return value

    def _include(self, whole: Thing, parts: Iterable[Any]) -> None:
        """Note that the whole contains the parts."""
        for part in parts:
            described = isinstance(part, Thing)
            whole.count += part.count if described else 1
            whole.size += part.size if described else len(part) if isinstance(part, str) else 0
            if described:
                part.finished = True
                whole.plain &= part.plain
                whole.depth = max(whole.depth, part.depth + 1)
        if whole.depth > DEEPEST or whole.count > MOST_ITEMS:
            raise Refused("structures in structures beyond measure")
        if whole.size > SHARING * self.file_size + HARMLESS_BYTES:
            raise Refused("tensors or text larger than the file")

    def _require_plain(self, value: Any) -> None:
        if isinstance(value, Thing) and not value.plain:
            raise Refused("something else than tensors and plain values")

    def _top(self, *kinds: str) -> Thing:
        """The value on top of the stack, to which something is added."""
        thing = self.stack[-1]
        if not isinstance(thing, Thing) or thing.kind not in kinds or thing.finished:
            raise Refused("a structure that contains itself")
        return thing

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _pop(self, number: int) -> list[Any]:
        if len(self.stack) < number:
            raise IndexError("the stack is empty")
        items = self.stack[len(self.stack) - number :]
        del self.stack[len(self.stack) - number :]
        return items

    def _push_tuple(self, items: list[Any]) -> None:
        thing = Thing("tuple", items)
        self._include(thing, items)
        self.stack.append(thing)

    def _append(self, items: list[Any]) -> None:
        thing = self._top("list")
        for item in items:
            self._require_plain(item)
        self._include(thing, items)
        thing.items += items

    def _set(self, items: list[Any]) -> None:
        self._fill(self._top("dict", "ordered"), items[::2], items[1::2])

    def _fill(self, thing: Thing, keys: list[Any], values: list[Any]) -> None:
        """Put values under keys into a dictionary."""
        for key in keys:
            text = type(key) is str and len(key) <= LONGEST_KEY and key.isprintable()
            if not text and not (type(key) is int and 0 <= key < LARGEST_KEY):
                raise Refused("a dictionary whose keys are not plain text")
        for value in values:
            self._require_plain(value)
        self._include(thing, [*keys, *values])
        thing.detail = [*(thing.detail or ()), *keys][:2]

    def _store(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def _fetch(self, number: int) -> None:
        value = self.memo[number]
        if isinstance(value, Thing):
            value.finished = True
        self.stack.append(value)

    # ------------------------------------------------------------- functions

    def _global(self, name: str) -> None:
        if name not in ELEMENT_BYTES and name not in FUNCTIONS:
            raise Refused(f"Python objects beside plain tensors ({name[:100]!r}), which could run code when loaded")
        self.stack.append(Thing("function", detail=name, plain=False))

    def _call(self, _: Any) -> None:
        function, arguments = self._pop(2)
        if function.kind != "function" or function.detail not in FUNCTIONS or arguments.kind != "tuple":
            raise Refused("a call of something that is no function")
        try:
            self.stack.append(FUNCTIONS[function.detail](self, *arguments.items))
        except (AttributeError, TypeError) as error:
            raise Refused(f"a call of {function.detail} with strange arguments") from error

    def _build(self, _: Any) -> None:
        """Set the state of what lies on the stack: the versions of a state dict's modules, or the byte order of a numpy type."""
        (state,) = self._pop(1)
        thing = self.stack[-1]
        if thing.kind == "ordered":
            known = state.kind == "dict" and state.detail == ["_metadata"]
            self._include(self._top("ordered"), [state])
        else:
            known = thing.kind == "type" and state.kind == "tuple" and _fits(state.items, NUMPY_STATE)
        if not known:
            raise Refused("an object with attributes")

    def _persistent(self, _: Any) -> None:
        """A storage: ("storage", type, key, device, elements), in older files with None after them."""
        (identity,) = self._pop(1)
        label, kind, key, _device, elements, *view = identity.items
        size = ELEMENT_BYTES.get(kind.detail)
        if label != "storage" or size is None or not isinstance(key, str) or view not in ([], [None]):
            raise Refused("a storage of a strange type")
        (elements,) = self._integers([elements])
        storage = (elements, size)
        if key not in self.storages:
            self.storages[key] = storage
            self.allocated += elements * size
        if self.storages[key] != storage:
            raise Refused("two storages of one name")
        if self.records is not None and self.records.get(key) != elements * size:
            raise Refused("a storage of another size than its record")
        if self.allocated > self.file_size:
            raise Refused("tensors or text larger than the file")
        self.stack.append(Thing("storage", detail=storage, plain=False))

    def _integers(self, values: Sequence[Any]) -> Sequence[int]:
        """Sizes and places of elements."""
        if len(values) > MOST_DIMENSIONS or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
            raise Refused("a tensor of strange dimensions")
        return values

    def _tensor(self, storage: Thing, offset: Any, shape: Thing, strides: Thing, gradient: Any = False,
                hooks: Thing | None = None) -> Thing:  # fmt: skip
        elements, size = storage.detail
        (first,), lengths, steps = map(self._integers, ([offset], shape.items, strides.items))
        if storage.kind != "storage" or len(lengths) != len(steps):
            raise Refused("a tensor of strange dimensions")
        numbers = math.prod(lengths)
        last = first + sum((length - 1) * step for length, step in zip(lengths, steps))
        if numbers and last >= elements:
            raise Refused("a tensor that is larger than its storage")
        self._without_hooks(gradient, hooks)
        return Thing("tensor", size=numbers * size)

    def _parameter(self, tensor: Thing, gradient: Any, hooks: Thing) -> Thing:
        if tensor.kind != "tensor":
            raise Refused("a parameter that is no tensor")
        self._without_hooks(gradient, hooks)
        return tensor

    def _without_hooks(self, gradient: Any, hooks: Thing | None) -> None:
        empty = hooks is None or (hooks.kind == "ordered" and hooks.count == 1)
        if not isinstance(gradient, bool) or not empty:
            raise Refused("a tensor with hooks")

    def _ordered(self, pairs: Thing | None = None) -> Thing:
        """An OrderedDict; Python 2 gave it its content as a list of pairs."""
        thing = Thing("ordered")
        if pairs is not None:
            split = [(key, value) for key, value in (pair.items for pair in pairs.items)]
            self._fill(thing, [key for key, _ in split], [value for _, value in split])
        return thing

    def _shape(self, lengths: Thing) -> Thing:
        self._integers(lengths.items)
        return Thing("size", count=1 + len(lengths.items))

    def _encoded(self, text: Any, encoding: Any) -> Thing:
        """Bytes as protocol 2 writes them."""
        if not isinstance(text, str) or encoding != "latin1":
            raise Refused("text of a strange encoding")
        return Thing("bytes", detail=len(text), plain=False)

    def _numpy_type(self, kind: Any, align: Any, copy: Any) -> Thing:
        if not isinstance(kind, str) or not NUMPY_KIND.fullmatch(kind) or not {align, copy} <= {0, 1}:
            raise Refused("numbers of a strange type")
        return Thing("type", plain=False)

    def _numpy_number(self, kind: Thing, raw: Thing) -> Thing:
        if (kind.kind, raw.kind) != ("type", "bytes") or raw.detail > 8:
            raise Refused("numbers of a strange type")
        return Thing("number")


def _fits(items: Sequence[Any], pattern: Sequence[Any]) -> bool:
    """Whether the items are those of a pattern, in which a text stands for each of its characters."""
    return len(items) == len(pattern) and all(
        isinstance(item, str) and len(item) == 1 and item in known if isinstance(known, str) else item == known
        for item, known in zip(items, pattern)
    )


#: What a pickle may call, by module and name. Numpy 1 and 2 name the module of their numbers differently.
FUNCTIONS: dict[str, Callable[..., Thing]] = {
    "collections OrderedDict": PickleScan._ordered,
    "torch Size": PickleScan._shape,
    "torch._utils _rebuild_tensor": PickleScan._tensor,
    "torch._utils _rebuild_tensor_v2": PickleScan._tensor,
    "torch._utils _rebuild_parameter": PickleScan._parameter,
    "numpy dtype": PickleScan._numpy_type,
    "numpy.core.multiarray scalar": PickleScan._numpy_number,
    "numpy._core.multiarray scalar": PickleScan._numpy_number,
    "_codecs encode": PickleScan._encoded,
}

#: The other instructions of pickles that torch writes.
INSTRUCTIONS: dict[str, Callable[[PickleScan, Any], None]] = {
    "MARK": PickleScan._mark,
    "EMPTY_TUPLE": lambda scan, _: scan._push_tuple([]),
    "EMPTY_LIST": lambda scan, _: scan.stack.append(Thing("list")),
    "EMPTY_DICT": lambda scan, _: scan.stack.append(Thing("dict")),
    "TUPLE": lambda scan, _: scan._push_tuple(scan._pop_mark()),
    "TUPLE1": lambda scan, _: scan._push_tuple(scan._pop(1)),
    "TUPLE2": lambda scan, _: scan._push_tuple(scan._pop(2)),
    "TUPLE3": lambda scan, _: scan._push_tuple(scan._pop(3)),
    "APPEND": lambda scan, _: scan._append(scan._pop(1)),
    "APPENDS": lambda scan, _: scan._append(scan._pop_mark()),
    "SETITEM": lambda scan, _: scan._set(scan._pop(2)),
    "SETITEMS": lambda scan, _: scan._set(scan._pop_mark()),
    "BINPUT": PickleScan._store,
    "LONG_BINPUT": PickleScan._store,
    "BINGET": PickleScan._fetch,
    "LONG_BINGET": PickleScan._fetch,
    "GLOBAL": PickleScan._global,
    "REDUCE": PickleScan._call,
    "BUILD": PickleScan._build,
    "BINPERSID": PickleScan._persistent,
}
