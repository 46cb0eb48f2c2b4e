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

#: Greatest depth of nested structures, and number of items; an item of several structures is counted several times.
DEEPEST, MOST_ITEMS = 50, 10_000_000

#: Bytes of tensors and text per byte of the file, counted in the same way: shared weights are counted several times.
SHARING = 4

#: The factor above is not applied to content below this size, in bytes.
HARMLESS_BYTES = 1 << 20

#: Keys of dictionaries are numbers, or text of at most this many printable characters. Optimisers of torch < 1.5 take addresses as keys.
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
    """The pickle is not that of a checkpoint; the message completes a sentence that begins with "it holds"."""


@dataclass(eq=False)
class Description:
    """Description of a value. Plain numbers, text and None are used themselves.

    Attributes:
        kind: "tuple", "list", "dict", "ordered", "tensor", "number" (numpy's), "size", or, as arguments only, "function", "storage",
            "type" (numpy's), "bytes".
        items: of a tuple or list.
        detail: name of a function, (elements, bytes of an element) of a storage, length of bytes, keys of a dictionary.
        depth, count, size: levels, items and bytes of it, with what it contains.
        finished: it is part of another value, or was referenced again; nothing may be added to it.
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
    """Checks the pickles of one file.

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
            stream: positioned at the first instruction; afterwards, after the last one.

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

    def _include(self, whole: Description, parts: Iterable[Any]) -> None:
        """Add depth, items and bytes of the parts to those of the whole."""
        for part in parts:
            described = isinstance(part, Description)
            whole.count += part.count if described else 1
            whole.size += part.size if described else len(part) if isinstance(part, str) else 0
            if described:
                part.finished = True
                whole.plain &= part.plain
                whole.depth = max(whole.depth, part.depth + 1)
        if whole.depth > DEEPEST or whole.count > MOST_ITEMS:
            raise Refused("structures that are nested too deeply or have too many items")
        if whole.size > SHARING * self.file_size + HARMLESS_BYTES:
            raise Refused("tensors or text larger than the file")

    def _require_plain(self, value: Any) -> None:
        if isinstance(value, Description) and not value.plain:
            raise Refused("something else than tensors and plain values")

    def _top(self, *kinds: str) -> Description:
        """The value on top of the stack, to which an instruction adds something."""
        description = self.stack[-1]
        if not isinstance(description, Description) or description.kind not in kinds or description.finished:
            raise Refused("a structure that contains itself")
        return description

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
        description = Description("tuple", items)
        self._include(description, items)
        self.stack.append(description)

    def _append(self, items: list[Any]) -> None:
        description = self._top("list")
        for item in items:
            self._require_plain(item)
        self._include(description, items)
        description.items += items

    def _set(self, items: list[Any]) -> None:
        self._fill(self._top("dict", "ordered"), items[::2], items[1::2])

    def _fill(self, description: Description, keys: list[Any], values: list[Any]) -> None:
        """Add keys and values to a dictionary."""
        for key in keys:
            text = type(key) is str and len(key) <= LONGEST_KEY and key.isprintable()
            if not text and not (type(key) is int and 0 <= key < LARGEST_KEY):
                raise Refused("a dictionary whose keys are not plain text")
        for value in values:
            self._require_plain(value)
        self._include(description, [*keys, *values])
        description.detail = [*(description.detail or ()), *keys][:2]

    def _store(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def _fetch(self, number: int) -> None:
        value = self.memo[number]
        if isinstance(value, Description):
            value.finished = True
        self.stack.append(value)

    # ------------------------------------------------------------- functions

    def _global(self, name: str) -> None:
        if name not in ELEMENT_BYTES and name not in FUNCTIONS:
            raise Refused(f"Python objects beside plain tensors ({name[:100]!r}), which could run code when loaded")
        self.stack.append(Description("function", detail=name, plain=False))

    def _call(self, _: Any) -> None:
        function, arguments = self._pop(2)
        if function.kind != "function" or function.detail not in FUNCTIONS or arguments.kind != "tuple":
            raise Refused("a call of a value that is not a function")
        try:
            self.stack.append(FUNCTIONS[function.detail](self, *arguments.items))
        except (AttributeError, TypeError) as error:
            raise Refused(f"a call of {function.detail} with unexpected arguments") from error

    def _build(self, _: Any) -> None:
        """Set the state of the value on the stack: the versions of a state dict's modules, or the byte order of a numpy type."""
        (state,) = self._pop(1)
        description = self.stack[-1]
        if description.kind == "ordered":
            known = state.kind == "dict" and state.detail == ["_metadata"]
            self._include(self._top("ordered"), [state])
        else:
            known = description.kind == "type" and state.kind == "tuple" and _fits(state.items, NUMPY_STATE)
        if not known:
            raise Refused("an object with attributes")

    def _persistent(self, _: Any) -> None:
        """A storage: ("storage", type, key, device, elements), in older files with None after them."""
        (identity,) = self._pop(1)
        label, kind, key, _device, elements, *view = identity.items
        size = ELEMENT_BYTES.get(kind.detail)
        if label != "storage" or size is None or not isinstance(key, str) or view not in ([], [None]):
            raise Refused("a storage of an unknown type")
        (elements,) = self._integers([elements])
        storage = (elements, size)
        if key not in self.storages:
            self.storages[key] = storage
            self.allocated += elements * size
        if self.storages[key] != storage:
            raise Refused("two storages with the same name")
        if self.records is not None and self.records.get(key) != elements * size:
            raise Refused("a storage of another size than its record")
        if self.allocated > self.file_size:
            raise Refused("tensors or text larger than the file")
        self.stack.append(Description("storage", detail=storage, plain=False))

    def _integers(self, values: Sequence[Any]) -> Sequence[int]:
        """Check sizes, strides or offsets of elements, and return them."""
        if len(values) > MOST_DIMENSIONS or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
            raise Refused("a tensor of invalid dimensions")
        return values

    def _tensor(self, storage: Description, offset: Any, shape: Description, strides: Description, gradient: Any = False,
                hooks: Description | None = None) -> Description:  # fmt: skip
        elements, size = storage.detail
        (first,), lengths, steps = map(self._integers, ([offset], shape.items, strides.items))
        if storage.kind != "storage" or len(lengths) != len(steps):
            raise Refused("a tensor of invalid dimensions")
        numbers = math.prod(lengths)
        last = first + sum((length - 1) * step for length, step in zip(lengths, steps))
        if numbers and last >= elements:
            raise Refused("a tensor that is larger than its storage")
        self._without_hooks(gradient, hooks)
        return Description("tensor", size=numbers * size)

    def _parameter(self, tensor: Description, gradient: Any, hooks: Description) -> Description:
        if tensor.kind != "tensor":
            raise Refused("a parameter that is no tensor")
        self._without_hooks(gradient, hooks)
        return tensor

    def _without_hooks(self, gradient: Any, hooks: Description | None) -> None:
        empty = hooks is None or (hooks.kind == "ordered" and hooks.count == 1)
        if not isinstance(gradient, bool) or not empty:
            raise Refused("a tensor with hooks")

    def _ordered(self, pairs: Description | None = None) -> Description:
        """An OrderedDict; Python 2 passed its content as a list of pairs."""
        description = Description("ordered")
        if pairs is not None:
            split = [(key, value) for key, value in (pair.items for pair in pairs.items)]
            self._fill(description, [key for key, _ in split], [value for _, value in split])
        return description

    def _shape(self, lengths: Description) -> Description:
        self._integers(lengths.items)
        return Description("size", count=1 + len(lengths.items))

    def _encoded(self, text: Any, encoding: Any) -> Description:
        """Bytes as protocol 2 of pickle writes them."""
        if not isinstance(text, str) or encoding != "latin1":
            raise Refused("text of an unknown encoding")
        return Description("bytes", detail=len(text), plain=False)

    def _numpy_type(self, kind: Any, align: Any, copy: Any) -> Description:
        if not isinstance(kind, str) or not NUMPY_KIND.fullmatch(kind) or not {align, copy} <= {0, 1}:
            raise Refused("numbers of an unknown type")
        return Description("type", plain=False)

    def _numpy_number(self, kind: Description, raw: Description) -> Description:
        if (kind.kind, raw.kind) != ("type", "bytes") or raw.detail > 8:
            raise Refused("numbers of an unknown type")
        return Description("number")


def _fits(items: Sequence[Any], pattern: Sequence[Any]) -> bool:
    """Whether the items are those of a pattern, in which a text stands for each of its characters."""
    return len(items) == len(pattern) and all(
        isinstance(item, str) and len(item) == 1 and item in known if isinstance(known, str) else item == known
        for item, known in zip(items, pattern)
    )


#: What a pickle may call, by module and name. Numpy 1 and 2 name the module of their numbers differently.
FUNCTIONS: dict[str, Callable[..., Description]] = {
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
    "EMPTY_LIST": lambda scan, _: scan.stack.append(Description("list")),
    "EMPTY_DICT": lambda scan, _: scan.stack.append(Description("dict")),
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
