"""Reads the text of a compiled program: the bytes that it moves, and what it sends between devices and to the host.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. XLA also counts operands
that lie in a chip's fast memory, which its layouts mark as S(1); here only those in main memory (HBM) count.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0, "u1": 1, "s1": 1, "u2": 1, "s2": 1, "u4": 1, "s4": 1}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# These move nothing themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "opt-barrier", "iota"),
}
SLICES = ("dynamic-slice", "slice", "gather")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # of the line, with the attributes

    def called(self, role: str) -> list[str]:
        """The computations that it names in this role, such as a loop's "body"."""
        return [
            name.lstrip("%")
            for key, names in _CALLED.findall(self.rest)
            if key == role
            for name in re.findall(r"%?[\w.\-]+", names)
        ]


class Collective(NamedTuple):
    """One collective operation of a program, as often as it runs."""

    kind: str  # one of COLLECTIVES
    bytes: float  # of its result on one device, each time
    arrays: int
    devices: int  # that take part with each other
    times: float


class Found(NamedTuple):
    """What a program does on one device."""

    bytes: float  # read and written in main memory
    collectives: list[Collective]
    callbacks: int  # places where it calls the host, or sends to it
    in_place: int  # bytes of arguments that results take the place of


Computations = Mapping[str, Sequence[Instruction]]


def read(text: str, devices: int) -> Found:
    """What the program of this text does, which runs on so many devices."""
    computations, entry = parse(text)
    collectives, callbacks = [], 0
    for times, name in _runs(computations, entry, 1.0):
        collectives += [each._replace(times=times) for each in _collectives(computations, name, devices)]
        callbacks += sum(map(_calls_host, _within(computations, name)))
    arguments = {each.rest.partition(")")[0]: each.type for each in computations[entry] if each.opcode == "parameter"}
    header = re.search(r"input_output_alias=\{(.*?)\}, \w+=", text.partition("\n")[0])
    aliased = set(re.findall(r"\((\d+), \{", header[1])) if header else set()
    moved = _moved(computations, entry)
    return Found(moved, collectives, callbacks, sum(_whole(arguments[number])[0] for number in aliased))


def _moved(computations: Computations, entry: str) -> float:
    """The bytes of main memory that a computation reads and writes."""
    total = 0.0
    for times, name in _runs(computations, entry, 1.0):
        types = {each.name: each.type for each in computations[name]}
        total += times * sum(_bytes_of(each, types, computations) for each in computations[name])
    return total


def _collectives(computations: Computations, name: str, devices: int) -> Iterator[Collective]:
    """The collective operations of one run of a computation."""
    seen: set[tuple[str, str]] = set()
    results = {each.operands[0]: each.type for each in computations[name] if each.opcode.endswith("-done")}
    for each in computations[name]:
        kind = each.opcode.removesuffix("-start")
        if (
            kind in COLLECTIVES
        ):  # the type of an asynchronous one has operands and contexts too: that of its end has not
            kind_of = results.get(each.name, each.type) if each.opcode.endswith("-start") else each.type
            yield Collective(kind, *_whole(kind_of), _group(each.rest, devices), 1)
        elif each.opcode == "fusion":
            (called,) = each.called("calls")
            for inner in _within(computations, called):
                channel = re.search(r"channel_id=(\d+)", inner.rest)
                one = inner.opcode, channel[1] if channel else inner.name
                # libtpu writes the beginning, the middle and the end of an operation as three fusions of one channel.
                if inner.opcode in COLLECTIVES and one not in seen:
                    seen.add(one)
                    scatters = called.startswith("all-reduce-scatter")  # the root is what a device keeps of the sum
                    kind = "reduce-scatter" if scatters else inner.opcode
                    yield Collective(
                        kind, *_whole(each.type if scatters else inner.type), _group(inner.rest, devices), 1
                    )


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """{name: instructions} of all computations, and the name of the one that is the program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith((" ", "HloModule")):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
            continue
        found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
        if found:
            name, kind, opcode, rest = found.groups()
            current.append(Instruction(name, kind, opcode, tuple(re.findall(r"%([\w.\-]+)", _arguments(rest))), rest))
    return computations, entry


def _arguments(rest: str) -> str:
    """The part of a line between the parentheses of an operation, which are opened already."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:i]
    return rest


def _runs(computations: Computations, name: str, times: float) -> Iterator[tuple[float, str]]:
    """(how often it runs, name) of the computations that run one after the other, but for the inside of fusions."""
    yield times, name
    for each in computations[name]:
        if each.opcode == "while":
            (body,), (condition,) = each.called("body"), each.called("condition")
            yield from _runs(computations, body, times * _iterations(each, computations[condition]))
        elif each.opcode == "conditional":
            roles = ("branch_computations", "true_computation", "false_computation")
            branches = [branch for role in roles for branch in each.called(role)]
            yield from _runs(computations, max(branches, key=lambda branch: _moved(computations, branch)), times)
        elif each.opcode in ("call", "async-start"):
            for inner in (*each.called("to_apply"), *each.called("calls")):
                yield from _runs(computations, inner, times)


def _iterations(loop: Instruction, condition: Sequence[Instruction]) -> int:
    """How often a loop runs. That of `jax.lax.scan` counts from 0 to a constant; another, where it is not known, 1."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    constants = {each.name: int(m[1]) for each in condition if (m := re.match(r"(\d+)\)", each.rest))}
    root = condition[-1]
    counts = root.opcode == "compare" and "direction=LT" in root.rest
    return constants.get(root.operands[1], 1) if counts else 1


def _within(computations: Computations, name: str) -> Iterator[Instruction]:
    """The instructions of a computation, and those of its fusions."""
    for each in computations[name]:
        yield each
        for inner in each.called("calls") if each.opcode == "fusion" else ():
            yield from _within(computations, inner)


def _bytes_of(each: Instruction, types: Mapping[str, str], computations: Computations) -> float:
    if each.opcode.removesuffix("-done") in COLLECTIVES and each.opcode.endswith("-done"):
        return main_memory(each.type)
    if each.opcode in FREE or each.opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [main_memory(types.get(name, "")) for name in each.operands]
    if each.opcode.removesuffix("-start") in COLLECTIVES and each.opcode.endswith("-start"):
        return sum(operands)  # its end counts the result
    if each.opcode in SLICES:
        return main_memory(each.type) + (min(operands[0], _whole(each.type)[0]) if operands else 0)
    if each.opcode == "dynamic-update-slice":
        return 2 * min(main_memory(each.type), _whole(types.get(each.operands[1], ""))[0])
    if each.opcode in ("copy-start", "slice-start"):  # its type holds the operand again
        result = main_memory(each.type) - operands[0]
        return result + min(operands[0], _whole(each.type)[0] - _whole(types.get(each.operands[0], ""))[0])
    result = main_memory(each.type)
    if each.opcode == "fusion":
        inner = computations[each.called("calls")[0]]
        operands = [min(size, read) for size, read in zip(operands, _read(inner, len(operands)), strict=True)]
        result = min(result, _written(inner))
    return result + sum(operands)


def _read(inner: Sequence[Instruction], n: int) -> list[float]:
    """The most bytes that a fusion reads of each of its operands; infinite but for those of which it takes slices."""
    most = [math.inf] * n
    for each in inner:
        if each.opcode == "parameter":
            users = [user for user in inner if each.name in user.operands]
            types = {user.name: user.type for user in inner}
            if users and all(user.opcode in SLICES and user.operands[0] == each.name for user in users):
                most[int(each.rest.split(")")[0])] = sum(_whole(user.type)[0] for user in users)
            elif users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == each.name for u in users):
                most[int(each.rest.split(")")[0])] = sum(_whole(types.get(u.operands[1], ""))[0] for u in users)
    return most


def _written(inner: Sequence[Instruction]) -> float:
    """The bytes that a fusion writes into a result that it updates in part; infinite for one that it writes whole."""
    types, root = {each.name: each.type for each in inner}, inner[-1]
    if root.opcode == "bitcast" and root.operands:
        root = next((each for each in inner if each.name == root.operands[0]), root)
    return _whole(types.get(root.operands[1], ""))[0] if root.opcode == "dynamic-update-slice" else math.inf


def main_memory(kind: str) -> int:
    """The bytes of a type, such as (f32[8,128]{1,0:T(8,128)}, bf16[]), but for arrays in another memory: S(1)."""
    return sum(_size(each) for each in _ARRAY.findall(kind) if "S(" not in each[2])


def _whole(kind: str) -> tuple[int, int]:
    """The bytes of a type in any memory, and the number of its arrays."""
    arrays = _ARRAY.findall(kind)
    return sum(map(_size, arrays)), len(arrays)


def _size(array: tuple[str, str, str]) -> int:
    name, extents, _ = array
    bits = re.search(r"\d+", name)
    each = BYTES[name] if name in BYTES else max(1, int(bits[0]) // 8) if bits else 0
    return each * math.prod(int(n) for n in extents.split(",") if n)


def _group(rest: str, devices: int) -> int:
    """How many devices take part with each other: all where the text does not say."""
    if "source_target_pairs=" in rest:
        return 2
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
    if counted:
        return int(counted[2])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", rest)
    if mesh:  # axes of a mesh by name, or parts of them: 'a'=4 {'a'}, 'a'=8 {'a':(2)4}
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]))
    return devices


def _calls_host(each: Instruction) -> bool:
    if each.opcode in ("outfeed", "infeed", "send", "recv"):
        return True
    target = re.search(r'custom_call_target="([^"]*)"', each.rest)
    return bool(each.opcode == "custom-call" and target and re.search("callback|host", target[1], re.IGNORECASE))
