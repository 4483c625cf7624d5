"""What a compiled program moves, read from its HLO text: nothing is run.

Every top-level operation of the schedule is charged its operands and its results, as on a device
without a cache.  Calls, loops (times their trip count) and conditionals are expanded; a custom call
(Pallas, cuDNN) is one operation.  There are three refinements.  An operand that is only sliced is
charged the slices.  An update in place is charged what it updates.  What a TPU program keeps in its
on-chip memory (memory space 1 of a tiled layout) is charged nothing.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ITEM_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)
}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r":T\(.*S\(1\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.S | re.M)
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLEE = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PRODUCT_CALL = re.compile(r'custom_call_target="[^"]*(?:conv|cublas|gemm|matmul|dot)', re.I)
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "add-dependency",
    "iota",
)
_FREE += ("partition-id", "replica-id", "opt-barrier")
_SLICES = ("slice", "dynamic-slice", "gather")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    opcode: str
    type: str  # of the result, with layouts
    arguments: str  # what stands between the parentheses
    attributes: str  # what follows them
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def callee(self) -> str | None:
        match = _CALLEE.search(self.attributes)
        return match.group(1) if match else None


class Operation(NamedTuple):
    """One thing that the device runs, `times` times; bytes and cycles are of one run."""

    name: str
    opcode: str
    read: int  # bytes
    written: int  # bytes
    result: str  # its type without layouts, such as "f32[64]"
    times: int = 1
    cycles: int = (
        0  # the TPU compiler's estimate; 0 where it gives none (other platforms, custom calls)
    )
    is_product: bool = False  # a convolution or matrix product, or fused with one

    @property
    def moved(self) -> int:
        """Bytes over all its runs."""
        return (self.read + self.written) * self.times


Module = dict[str, list[Instruction]]
Choice = Callable[[Sequence[list[Operation]]], list[Operation]]


def costliest(branches: Sequence[list[Operation]]) -> list[Operation]:
    """The branch of a conditional that costs most."""
    return max(branches, key=_cost, default=[])


def cheapest(branches: Sequence[list[Operation]]) -> list[Operation]:
    """The branch of a conditional that costs least."""
    return min(branches, key=_cost, default=[])


def every(branches: Sequence[list[Operation]]) -> list[Operation]:
    """All branches of a conditional."""
    return [operation for branch in branches for operation in branch]


def operations(text: str, *, branch: Choice = costliest) -> list[Operation]:
    """Everything a compiled program runs, in the order of its schedule.

    Args:
        text: `compiled.as_text()`.
        branch: what a conditional counts as.

    Raises:
        ValueError: the text has no entry computation, or a loop whose trip count cannot be read.
    """
    module = parse(text)
    if "ENTRY" not in module:
        raise ValueError(
            "the text has no ENTRY computation, expected compiled.as_text() of a jitted function"
        )
    return _expand(module, "ENTRY", branch)


def moved(operations: Sequence[Operation]) -> int:
    """Bytes read and written."""
    return sum(operation.moved for operation in operations)


def estimated_cycles(operations: Sequence[Operation]) -> int:
    """The TPU compiler's own estimate; operations that overlap are added up."""
    return sum(operation.cycles * operation.times for operation in operations)


def collectives(text: str) -> Counter[tuple[str, str]]:
    """How often each (collective, result type) runs, conditionals with all their branches."""
    found: Counter[tuple[str, str]] = Counter()
    for operation in operations(text, branch=every):
        opcode = operation.opcode.removesuffix("-start")
        if opcode in _COLLECTIVES:
            found[opcode, operation.result] += operation.times
    return found


def nbytes(type_text: str) -> int:
    """Bytes in main memory of an HLO type, tuples added up."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(type_text):
        if layout and _ON_CHIP.search(layout):
            continue
        bits = _ITEM_BITS.get(dtype) or (
            8 if dtype.startswith("f8") else 4 if dtype.startswith("f4") else 0
        )
        for dim in filter(None, dims.split(",")):
            bits *= int(dim)
        total += -(-bits // 8)
    return total


def parse(text: str) -> Module:
    """The instructions of every computation by its name; the entry is "ENTRY"."""
    found = {}
    for entry, name, body in _COMPUTATION.findall(text):
        matches = filter(None, map(_INSTRUCTION.match, body.splitlines()))
        found["ENTRY" if entry else name] = [_instruction(*match.groups()) for match in matches]
    return found


def _cost(branch):
    """Cycles where the compiler estimates them: a pass over on-chip memory moves no bytes."""
    return estimated_cycles(branch), moved(branch)


def _instruction(root, name, rest):
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest[: rest.index("(")], rest[rest.index("(") :]
    end = _closing(rest)
    return Instruction(name, opcode, type_text, rest[1 : end - 1], rest[end:], bool(root))


def _closing(text):
    """The length of the parenthesized prefix."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _expand(module, name, branch):
    instructions = module[name]
    types = {instruction.name: instruction.type for instruction in instructions}
    done = {i.operands[0]: i.type for i in instructions if i.opcode.endswith("-done")}
    run = []
    for instruction in instructions:
        opcode, attributes = instruction.opcode, instruction.attributes
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        if opcode == "conditional":
            run += branch([_expand(module, callee, branch) for callee in _branches(attributes)])
        elif opcode == "while":
            times = _trip_count(module, instruction)
            body = _named("body", attributes)
            run += [op._replace(times=op.times * times) for op in _expand(module, body, branch)]
        elif opcode in ("call", "async-start") and instruction.callee in module:
            run += _expand(module, instruction.callee, branch)
        else:
            run.append(_operation(module, instruction, types, done.get(instruction.name)))
    return run


def _operation(module, instruction, types, done_type):
    body = module.get(instruction.callee, []) if instruction.opcode == "fusion" else []
    result = done_type or instruction.type
    cycles = _CYCLES.search(instruction.attributes)
    return Operation(
        name=instruction.name,
        opcode=instruction.opcode,
        read=_read(instruction, body, types, result),
        written=_written(instruction, body, types, result),
        result=re.sub(r"/\*[^*]*\*/|(?<=\])\{[^}]*\}", "", result).replace(" ", ""),
        cycles=int(cycles.group(1)) if cycles else 0,
        is_product=_is_product(module, instruction),
    )


def _read(instruction, body, types, result):
    opcode, operands = instruction.opcode.removesuffix("-start"), instruction.operands
    sizes = {operand: nbytes(types.get(operand, "")) for operand in operands}
    if opcode in _SLICES:
        sizes[operands[0]] = nbytes(result)
    elif opcode == "dynamic-update-slice":
        sizes[operands[0]] = 0
    charges = Counter()  # of a fusion; two of its parameters may be the same operand
    for parameter in (i for i in body if i.opcode == "parameter"):
        operand = operands[int(parameter.arguments)]
        charges[operand] += _read_through(parameter, body, sizes[operand])
    return sum(min(size, charges.get(operand, size)) for operand, size in sizes.items())


def _read_through(parameter, body, size):
    """Bytes of a fusion's parameter that the fusion reads."""
    users = [user for user in body if parameter.name in user.operands]
    if not users or any(parameter.name in user.operands[1:] for user in users):
        return size
    if all(user.opcode == "dynamic-update-slice" for user in users):
        return 0
    return (
        sum(nbytes(user.type) for user in users)
        if all(user.opcode in _SLICES for user in users)
        else size
    )


def _written(instruction, body, types, result):
    if instruction.opcode == "dynamic-update-slice":
        return nbytes(types.get(instruction.operands[1], ""))
    inside = {i.name: i for i in body}
    root = next((i for i in body if i.is_root), None)
    if root is None:
        return nbytes(result)
    outputs = (
        [inside[name] for name in root.operands if name in inside]
        if root.opcode == "tuple"
        else [root]
    )
    total = nbytes(result)
    for output in outputs:
        if output.opcode == "dynamic-update-slice":
            total -= nbytes(output.type) - nbytes(inside[output.operands[1]].type)
    return total


def _is_product(module, instruction):
    if instruction.opcode in ("convolution", "dot") or _PRODUCT_CALL.search(instruction.attributes):
        return True
    if "__triton_gemm" in instruction.attributes:
        return True
    body = module.get(instruction.callee, []) if instruction.opcode == "fusion" else []
    return any(_is_product(module, inner) for inner in body)


def _branches(attributes):
    listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed.group(1))
    return [_named("true_computation", attributes), _named("false_computation", attributes)]


def _named(attribute, attributes):
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", attributes)
    assert match, (attribute, attributes)
    return match.group(1)


def _trip_count(module, loop):
    """How often a loop runs: as the compiler notes it, or the one bound of its condition.

    JAX counts from 0 in steps of 1.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = list(module[_named("condition", loop.attributes)])
    condition += [inner for i in condition for inner in module.get(i.callee, [])]
    compares = [i for i in condition if i.opcode == "compare" and "direction=LT" in i.attributes]
    bounds = [i.arguments for i in condition if i.opcode == "constant" and i.arguments.isdigit()]
    if len(compares) != 1 or len(bounds) != 1:
        raise ValueError(
            f"loop {loop.name!r} has no trip count that could be read: "
            "use a counted loop (fori_loop, scan)"
        )
    return int(bounds[0])
