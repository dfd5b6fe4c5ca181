"""Where products of warp groups read, in Hopper's machine code (SASS, as `nvdisasm -c` prints it).

Such a product (HGMMA) finds an operand in shared memory by a descriptor in two uniform registers: an address field of
14 or 15 bits, plus constants, below constants. ptxas 12.8, which comes with Triton 3.6, at times takes what a register
holds before a loop for the field that the loop computes, so that the first round reads somewhere else: an illegal
access or, worse, wrong numbers, and on a GPU alone. `strays` follows what registers may hold along every path. That a
register holds a descriptor is all that it sees, not whose: the wrong tile's passes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

FIELD = "field"
Value = int | str | None
"""A constant of 32 bits (of high words, but for a carry), an address field plus a constant, or anything."""
State = dict[str, Value]
"""By register, or by place on the stack; what is not there may hold anything."""

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"(\.L\w+):")
_ENDS = ("BRA", "EXIT", "RET", "JMP", "BRX")
_WIDTHS = (
    (r"\.128|\.MT?88\.4|^[HI]MMA", 4),
    (r"\.64|\.WIDE|\.MT?88\.2|^CS2R$|^D(ADD|MUL|FMA)|^[FI]2[FI].*[FSU]64|^LEPC", 2),
)


class _Instruction(NamedTuple):
    line: str
    predicated: bool
    name: str
    operands: list[str]


class _Block(NamedTuple):
    instructions: list[_Instruction]
    next: list[str]


def strays(code: str) -> list[str]:
    """The lines of products that are not known to read by descriptors alone, those that nothing leads to included."""
    products = [line for line in code.splitlines() if "HGMMA" in line]
    if not products:
        return []
    blocks = _blocks(code)
    states: dict[str, State] = {"": {}}
    todo = [""]
    while todo:
        name = todo.pop()
        state = dict(states[name])
        for one in blocks[name].instructions:
            _execute(one, state)
        for later in blocks[name].next:
            met = dict(state) if later not in states else _meet(states[later], state)
            if later not in states or met != states[later]:
                states[later] = met
                todo.append(later)
    right = set()
    for name, state in states.items():
        for one in blocks[name].instructions:
            if one.name.startswith("HGMMA") and _reads_by_descriptors(one, state):
                right.add(one.line)
            _execute(one, state)
    return [line.split(";")[0].strip() for line in products if line not in right]


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
            operands = [x.strip().removesuffix(".reuse") for x in parts[3].split(",")]
            one = _Instruction(line, bool(parts[1]), parts[2], operands)
            block.instructions.append(one)
            if one.name.partition(".")[0] in _ENDS:
                block.next.extend(re.findall(r"\.L\w+", parts[3]))
                goes_on = one.predicated or re.search(r"\bU?P\d", parts[3]) or one.name in ("BRA.DIV", "BRA.CONV")
                block = begin(str(number)) if goes_on else None
    return {name: block._replace(next=[x for x in block.next if x in blocks]) for name, block in blocks.items()}


def _meet(a: State, b: State) -> State:
    return {register: a[register] for register in a.keys() & b.keys() if a[register] == b[register]}


def _reads_by_descriptors(product: _Instruction, state: State) -> bool:
    """Of operands in shared memory, one or both, the first register is given: gdesc[UR16], with the second's behind."""
    at, found = next(
        ((i, y) for i, x in enumerate(product.operands) if (y := re.match(r"gdesc\[UR(\d+|Z)\]", x))), (0, None)
    )
    if found is None or found[1] == "Z":  # without operands, a product only waits
        return found is not None
    first = int(found[1])
    return all(
        state.get(f"UR{n}") == FIELD and isinstance(state.get(f"UR{n + 1}"), int)
        for n in ([first + 2] if at > 1 else [first, first + 2])
    )


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

    kind, _, form = one.name.partition(".")
    width = next((n for pattern, n in _WIDTHS if re.search(pattern, one.name)), 1)
    if tile := re.match(r"HGMMA\.64x(\d+)", one.name):
        width = int(tile[1]) // 2
    to, *x = [y for y in one.operands if not re.fullmatch(r"!?U?P(T|\d)", y)] or [""]
    new: State = {_after(to, n): None for n in range(width)} if re.fullmatch(r"U?R\d+", to) else {}
    lost: tuple[str, ...] = ()
    if kind == "STL":
        new = {slot: value(_after(x[0], n)) for n, slot in enumerate(_slots(to, width))}
        lost = ("stack",) if not new or re.match(r"[US](8|16)", form) else ()
    elif kind == "CALL":
        lost = ("",)
    elif to == "R1":
        lost = ("stack",)
    elif kind in ("MOV", "UMOV", "R2UR"):
        new[to] = value(x[0])
    elif kind in ("SGXT", "USGXT") and form == "U32" and x[1] in ("0xe", "0xf"):
        new[to] = FIELD
    elif kind in ("IADD3", "UIADD3", "VIADD"):
        new[to] = _sum([value(y) for y in x[:3]])
        if form == "X" and new[to] == FIELD:  # plus a carry
            new[to] = None
        if width == 2:
            new[_after(to, 1)] = _sum([high(y) for y in x[:3]])
    elif kind == "IMAD" and width == 1 and not form.startswith("HI") and x[0] == "RZ":
        new[to] = value(x[2])
    elif kind == "IMAD" and width == 1 and not form.startswith("HI") and x[1] == "0x1":
        new[to] = _sum([value(x[0]), value(x[2])])
    elif kind in ("LOP3", "ULOP3") and x[1] in ("0x3fff", "0x7fff") and x[3] == "0xc0":
        new[to] = FIELD
    elif kind in ("LOP3", "ULOP3") and x[3] == "0xfc":
        new[to] = _sum([value(y) for y in x[:2]])
    elif kind == "CS2R" and x[0] == "SRZ":
        new = dict.fromkeys(new, 0)
    elif kind == "LDL":
        new |= {_after(to, n): state.get(slot) for n, slot in enumerate(_slots(x[0], width))}
    for place in [place for place in state if place.startswith(lost)] if lost else []:
        del state[place]
    for place, result in new.items():
        state[place] = result if not one.predicated or state.get(place) == result else None
