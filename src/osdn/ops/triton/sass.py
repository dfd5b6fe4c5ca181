"""Where products of warp groups read, in Hopper's machine code (SASS, as `nvdisasm -c` prints it).

Such a product (HGMMA) finds an operand in shared memory by a descriptor in two uniform registers: an address field of
14 or 15 bits, plus constants, below constants. ptxas 12.8, which comes with Triton 3.6, at times takes what a register
holds before a loop for the field that the loop computes, so that the first round reads somewhere else: an illegal
access or, worse, wrong numbers, and on a GPU alone. `strays` follows what registers may hold along every path.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

FIELD = "field"
Value = int | str | None
"""A constant of 32 bits, an address field plus a constant, or anything."""
State = dict[str, Value]
"""By register, or by byte of the stack; what is not there may hold anything."""

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"(\.L\w+):")
_WIDTHS = ((r"\.128|\.M88\.4", 4), (r"\.64|\.WIDE|\.M88\.2|^CS2R", 2))


class _Instruction(NamedTuple):
    at: str
    predicated: bool
    name: str
    operands: list[str]


class _Block(NamedTuple):
    instructions: list[_Instruction]
    next: list[str]


def strays(code: str) -> list[str]:
    """Of each product that may read by anything but a descriptor, where it is in the code."""
    if "HGMMA" not in code:
        return []
    blocks = _blocks(code)
    states: dict[str, State] = {"": {}}
    todo = [""]
    while todo:
        name = todo.pop()
        state = dict(states[name])
        for instruction in blocks[name].instructions:
            _execute(instruction, state)
        for later in blocks[name].next:
            met = state if later not in states else _meet(states[later], state)
            if later not in states or met != states[later]:
                states[later] = dict(met)
                todo.append(later)
    found = []
    for name, state in states.items():
        for instruction in blocks[name].instructions:
            if instruction.name.startswith("HGMMA") and not all(map(_descriptor(state), _descriptors(instruction))):
                found.append(instruction.at)
            _execute(instruction, state)
    return found


def _blocks(code: str) -> dict[str, _Block]:
    """By label or, where there is none, by the number of the line; "" is the entry."""
    blocks = {"": _Block([], [])}
    block: _Block | None = blocks[""]

    def begin(name: str) -> _Block:
        if block is not None:
            block.next.append(name)
        return blocks.setdefault(name, _Block([], []))

    for number, line in enumerate(code.splitlines()):
        if label := _LABEL.match(line.strip()):
            block = begin(label[1])
        elif parts := _INSTRUCTION.search(line):
            if block is None:
                block = blocks.setdefault(str(number), _Block([], []))
            operands = [x.strip().removesuffix(".reuse") for x in parts[4].split(",")]
            one = _Instruction(parts[1], bool(parts[2]), parts[3], operands)
            block.instructions.append(one)
            kind = one.name.partition(".")[0]
            if kind in ("BRA", "EXIT"):
                block.next.extend(re.findall(r"\.L\w+", parts[4]) if kind == "BRA" else [])
                always = not one.predicated and not re.search(r"\bU?P\d", parts[4])
                block = None if always else begin(str(number))
    return blocks


def _meet(a: State, b: State) -> State:
    return {register: a[register] for register in a.keys() & b.keys() if a[register] == b[register]}


def _descriptors(product: _Instruction) -> list[int]:
    """The first of a descriptor's registers, of each operand in shared memory; none where a product only waits."""
    at = next(i for i, x in enumerate(product.operands) if x.startswith("gdesc"))
    if product.operands[at].startswith("gdesc[URZ]"):
        return []
    first = int(re.findall(r"\d+", product.operands[at])[0])
    return [first + 2] if at > 1 else [first, first + 2]


def _descriptor(state: State) -> Callable[[int], bool]:
    return lambda n: state.get(f"UR{n}") == FIELD and isinstance(state.get(f"UR{n + 1}"), int)


def _after(register: str, n: int) -> str:
    found = re.fullmatch(r"(-?U?R)(\d+)", register)
    return f"{found[1]}{int(found[2]) + n}" if found else register


def _slots(address: str, width: int) -> list[str]:
    """Names for what a thread has there of its stack, which is where registers are spilled to."""
    found = re.fullmatch(r"\[R1(?:\+0x([0-9a-f]+))?\]", address)
    return [f"stack {int(found[1] or '0', 16) + 4 * n}" for n in range(width)] if found else []


def _sum(values: list[Value]) -> Value:
    if None in values or values.count(FIELD) > 1:
        return None
    return FIELD if FIELD in values else sum(x for x in values if isinstance(x, int)) % 2**32


def _execute(one: _Instruction, state: State) -> None:
    """What the instruction writes, in `state`."""

    def value(operand: str) -> Value:
        if operand in ("URZ", "RZ"):
            return 0
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return int(operand, 16) % 2**32
        if operand.startswith("-"):
            positive = state.get(operand[1:])
            return -positive % 2**32 if isinstance(positive, int) else None
        return state.get(operand)

    def high(operand: str) -> Value:
        return value(_after(operand, 1)) if "R" in operand else 0

    name, operands = one.name, one.operands
    width = next((n for pattern, n in _WIDTHS if re.search(pattern, name)), 1)
    if tile := re.match(r"HGMMA\.64x(\d+)", name):
        width = int(tile[1]) // 2
    if name.startswith("STL"):
        new = {slot: value(_after(operands[1], n)) for n, slot in enumerate(_slots(operands[0], width))}
    else:
        to, *x = [y for y in operands if not re.fullmatch(r"!?U?P(T|\d)", y)] or [""]
        if not re.fullmatch(r"U?R\d+", to):
            return
        kind = name.partition(".")[0]
        new = {_after(to, n): None for n in range(width)}
        if kind in ("MOV", "UMOV", "R2UR"):
            new[to] = value(x[0])
        elif kind in ("SGXT", "USGXT") and x[1] in ("0xe", "0xf"):
            new[to] = FIELD
        elif kind in ("IADD3", "UIADD3", "VIADD"):
            new[to] = _sum([value(y) for y in x[:3]])
            if width == 2:
                new[_after(to, 1)] = _sum([high(y) for y in x[:3]])
        elif kind == "IMAD" and width == 1 and x[0] == "RZ":
            new[to] = value(x[2])
        elif kind == "IMAD" and width == 1 and x[1] == "0x1":
            new[to] = _sum([value(x[0]), value(x[2])])
        elif kind in ("LOP3", "ULOP3") and x[1] in ("0x3fff", "0x7fff") and "0xc0" in x:
            new[to] = FIELD
        elif kind in ("LOP3", "ULOP3") and "0xfc" in x:
            new[to] = _sum([value(y) for y in x[:2]])
        elif kind == "CS2R" and x[0] == "SRZ":
            new = dict.fromkeys(new, 0)
        elif kind == "LDL":
            new |= {_after(to, n): state.get(slot) for n, slot in enumerate(_slots(x[0], width))}
    for register, result in new.items():
        state[register] = result if not one.predicated or state.get(register) == result else None
