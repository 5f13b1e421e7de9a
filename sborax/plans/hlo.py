"""FLOPs, memory traffic and collectives of a compiled program, read from its HLO text."""

import collections
import math
import re
from collections.abc import Callable

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPERATION = re.compile(r"= (\(.*?\)|\S+) ([a-z-]+)\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z-]+)\((.*)$")
_NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota")
_SLICES = ("dynamic-slice", "slice", "gather")
_INSIDE = ("fusion", "async-start", "custom-call-start")
"""Operations that run a computation as a part of themselves: its collectives count in the scope of the operation."""
_GOES_ON = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
"""Matches a piece of a collective that a TPU runs in pieces beside products, except the first, whose flag is -1."""


def collective_bytes(text: str) -> dict[str, int]:
    """The bytes of the results of collectives on one device, by kind. Loops count once for every iteration.

    An operation with several results counts with all of them. A loop whose end depends on data counts once.
    """
    return _collectives(text, lambda _, size: size)


def scattered_bytes(text: str, devices: int) -> int:
    """The bytes that reach a device in reduce-scatters: of each result a part from every other device of its group.

    - devices: of a group that the text does not describe.
    """
    return _collectives(text, lambda line, size: size * (_group(line, devices) - 1)).get("reduce-scatter", 0)


def overlapped_bytes(text: str) -> dict[str, int]:
    """The part of `collective_bytes` that is sent while the device multiplies, by kind.

    A collective counts if the schedule has a product or a kernel between its start and its end, or in one fusion with a
    piece of it. The schedule does not say whether that work takes as long as the collective.
    """
    lines, _ = _computations(text)
    working = {name for name in lines if _multiplies(name, lines)}
    hidden: set[str] = set()
    of_line: dict[str, str] = {}
    for body in lines.values():
        spans: dict[str, list[int]] = {}
        begun: dict[str, str] = {}
        for number, line in enumerate(body):
            for name, sent in _ends(line, lines):
                operation = begun.get(name, name)
                spans.setdefault(operation, []).append(number)
                of_line |= dict.fromkeys(sent, operation)
            if update := re.match(r"\s*%?([\w.-]+) = .* [a-z-]+-update\(%([\w.-]+)", line):
                # A core for collectives has started before, and gets its operand here.
                begun[update.group(1)] = update.group(2)
                spans[update.group(2)] = [number]
        products = [number for number, line in enumerate(body) if _is_product(line) or working & set(_called(line))]
        hidden |= {name for name, span in spans.items() if any(span[0] <= number <= span[-1] for number in products)}
    return _collectives(text, lambda line, size: size if of_line.get(line) in hidden else 0)


def _is_product(line: str) -> bool:
    """Whether an operation is a matrix product or a kernel that the compiler does not see into."""
    return bool(re.search(r" (dot|convolution)\(|custom_call_target=\"tpu_custom_call\"", line))


def _multiplies(computation: str, lines: dict[str, list[str]]) -> bool:
    """Whether a computation or one that it runs has a product."""
    body = lines.get(computation, [])
    return any(_is_product(line) or any(_multiplies(name, lines) for name in _called(line)) for line in body)


def _ends(line: str, lines: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """The collectives that begin, continue or end in an operation, by name, each with the lines that give its size."""
    match = _INSTRUCTION.match(line)
    if not match:
        return []
    _, name, _, opcode, tail = match.groups()
    inner = [text for called in _called(line) for text in lines.get(called, [])]
    if opcode == "fusion":
        chains = [(re.search(r'chain_id="(\d+)"', text), text) for text in inner]
        return [(f"chain {chain.group(1)}", [text]) for chain, text in chains if chain]
    if opcode.endswith("-start"):
        return [(name, [line, *inner])]
    return [(operand, []) for operand in _operands(tail)] if opcode.endswith("-done") else []


def _group(line: str, devices: int) -> int:
    """How many devices a collective goes between."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return listed.group(1).count(",") + 1
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(tiled.group(1)) if tiled else devices


def _collectives(text: str, measure: Callable[[str, int], int]) -> dict[str, int]:
    """Sums over collectives by kind.

    - measure: a function of an operation's line and the bytes of its results.
    """
    lines, entry = _computations(text)

    def sent(computation: str, scope: str) -> dict[tuple[str, str], int]:
        """Bytes by kind, channel and place.

        A channel that appears in several fusions of one `scope`, an entry or the body of a loop, is one operation. All
        operations that a `shard_map` names itself have the same channel.
        """
        sizes: dict[tuple[str, str], int] = {}
        counts: dict[tuple[str, str], int] = collections.Counter()
        for line in lines.get(computation, []):
            operation = _OPERATION.search(line)
            if not operation:
                continue
            shape, opcode = operation.groups()
            if opcode.removesuffix("-start") in KINDS and not _GOES_ON.search(line):
                kind, channel = opcode.removesuffix("-start"), re.search(r"channel_id=(\d+)", line)
                place = f"{scope}:{channel.group(1)}" if channel else computation
                key = (kind, f"{place}:{counts[kind, place]}")
                counts[kind, place] += 1
                sizes[key] = measure(line, _result(shape, opcode.endswith("-start")))
            if opcode in ("while", "call", "conditional", *_INSIDE):
                times = (_iterations(line, lines) or 1) if opcode == "while" else 1
                for called in _called(line):
                    inside = scope if opcode in _INSIDE else called
                    for key, size in sent(called, inside).items():
                        sizes[key] = max(sizes.get(key, 0), size * times)
        return sizes

    totals: dict[str, int] = collections.Counter()
    for (kind, _), size in sent(entry, entry).items():
        totals[kind] += size
    return dict(totals)


def matmul_flops(text: str, most: int = 1) -> int:
    """The FLOPs of all matrix products of a program on one device, those in loops for every iteration.

    Kernels that the compiler does not see into, such as attention's, are not counted.

    - most: iterations of a loop whose end depends on data.
    """
    lines, entry = _computations(text)
    total = 0
    for computation, times in _turns(lines, entry, most, inside=True).items():
        shapes = {match.group(2): match.group(3) for match in map(_INSTRUCTION.match, lines[computation]) if match}
        for line in lines[computation]:
            match = _INSTRUCTION.match(line)
            if match and match.group(4) in ("dot", "convolution"):
                total += times * _product_flops(match.group(3), match.group(5), shapes)
    return total


def memory_bytes(text: str, most: int = 1) -> int:
    """The bytes that a program reads from and writes to a device's main memory, those in loops for every iteration.

    Each operation outside of fusions counts with its operands and results, once, if they lie in main memory. An array
    of which only a slice is read or written counts with the slice. A collective that runs beside several products
    counts with its operand and result, once.

    - most: iterations of a loop whose end depends on data.
    """
    lines, entry = _computations(text)
    parsed = {
        name: {match.group(2): match for match in map(_INSTRUCTION.match, body) if match}
        for name, body in lines.items()
    }
    return sum(
        times * sum(_traffic(match, parsed[computation], parsed) for match in parsed[computation].values())
        for computation, times in _turns(lines, entry, most, inside=False).items()
    )


def _turns(lines: dict[str, list[str]], entry: str, most: int, inside: bool) -> dict[str, int]:
    """How often each computation runs.

    - most: iterations of a loop whose end depends on data.
    - inside: whether to follow fusions and the computations of asynchronous operations.
    """
    times: dict[str, int] = collections.Counter()
    opcodes = ("while", "call", "conditional", *(_INSIDE if inside else ()))

    def visit(computation: str, count: int) -> None:
        times[computation] += count
        for line in lines.get(computation, []):
            match = _INSTRUCTION.match(line)
            if match and match.group(4) in opcodes:
                turns = (_iterations(line, lines) or most) if match.group(4) == "while" else 1
                for called in _called(line):
                    visit(called, count * turns)

    visit(entry, 1)
    return times


def _called(line: str) -> list[str]:
    """The computations that an operation runs."""
    listed = re.search(r"(?:branch|called)_computations=\{([^}]*)\}", line)
    names = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line)
    return names + ([name.strip().lstrip("%") for name in listed.group(1).split(",")] if listed else [])


def _product_flops(result: str, tail: str, shapes: dict[str, str]) -> int:
    """2 x products that are summed, of a `dot` or of a `convolution` that stands for one."""
    names = _operands(tail)
    left, right = (_sides(shapes.get(name, "")) for name in names[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", tail)
    if labels is None:
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", tail)
        summed = [left[int(axis)] for axis in axes.group(1).split(",") if axis] if axes else []
        return 2 * math.prod(_sides(result)) * math.prod(summed)
    inputs, kernel, outputs = (
        dict(zip(axes, sides, strict=True))
        for axes, sides in zip(labels.groups(), (left, right, _sides(result)), strict=True)
    )
    places = [
        _meetings(inputs[axis], kernel[axis], outputs[axis], int(axis), tail) for axis in kernel if axis.isdigit()
    ]
    return 2 * outputs["b"] * outputs["f"] * kernel["i"] * math.prod(places)


def _meetings(length: int, size: int, outputs: int, axis: int, tail: str) -> int:
    """The pairs of an output and an entry of the window at which a convolution has an input, on one axis.

    Padding and the gaps of a dilated input have none. XLA writes batched products, and several products at once, as
    such convolutions.

    - length, size, outputs: of the input, the window and the result on this axis.
    """

    def option(name: str, default: str) -> list[int]:
        match = re.search(rf"\b{name}=([\d_x-]+)", tail)
        return [int(number) for number in (match.group(1).split("x")[axis] if match else default).split("_")]

    (stride,), (gap,), (step,) = option("stride", "1"), option("lhs_dilate", "1"), option("rhs_dilate", "1")
    padding = option("pad", "0_0")[0]
    places = np.arange(outputs)[:, None] * stride + np.arange(size)[None, :] * step - padding
    return int(np.sum((places % gap == 0) & (places >= 0) & (places <= (length - 1) * gap)))


def _operands(tail: str) -> list[str]:
    """The names of an operation's operands, from the text behind its opening bracket."""
    return re.findall(r"%([\w.-]+)", tail.partition("), ")[0])


def _sides(shape: str) -> list[int]:
    match = _ARRAY.search(shape)
    return [int(side) for side in match.group(2).split(",") if side] if match else []


def _main_memory(shape: str) -> int:
    """The bytes of the arrays of a shape that lie in main memory; others have a memory space S(n) in their layout."""
    arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", shape)
    return sum(
        BYTES.get(kind, 4) * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides, layout in arrays
        if "S(" not in layout
    )


Parsed = dict[str, dict[str, re.Match[str]]]


def _traffic(match: re.Match[str], operations: dict[str, re.Match[str]], parsed: Parsed) -> int:
    """The bytes that one operation reads and writes in main memory."""
    _, name, shape, opcode, tail = match.groups()
    # The two ends of a collective may be fusions.
    if opcode in _NO_TRAFFIC or re.search(r"-done(\.|$)", f"{opcode} {name}"):
        return 0
    if opcode.endswith("-start") or re.search(r"-start(\.|$)", name):
        # Its shape lists operands and results.
        return _main_memory(shape)
    shapes = [operations[name].group(3) for name in _operands(tail) if name in operations]
    if opcode in _SLICES:
        return 2 * _main_memory(shape)
    if opcode == "dynamic-update-slice":
        return 2 * _main_memory(shapes[1])
    called = _called(tail) if opcode == "fusion" else []
    if not called:
        return _main_memory(shape) + sum(map(_main_memory, shapes))
    body = parsed[called[0]]
    read = sum(_read(body, i, parsed, size) for i, size in enumerate(map(_main_memory, shapes)) if size)
    return read + _bytes_written(body, shape)


def _read(body: dict[str, re.Match[str]], number: int, parsed: Parsed, size: int) -> int:
    """The bytes that a fusion reads of its operand `number`, which has `size` bytes."""
    name = next(
        (
            name
            for name, match in body.items()
            if match.group(4) == "parameter" and match.group(5).startswith(f"{number})")
        ),
        None,
    )
    return size if name is None else min(size, _bytes_read(body, name, parsed, size))


def _bytes_read(body: dict[str, re.Match[str]], name: str, parsed: Parsed, size: int) -> int:
    total = 0
    for user, match in body.items():
        operands = _operands(match.group(5))
        if name not in operands:
            continue
        opcode = match.group(4)
        if opcode in _SLICES and operands[0] == name:
            total += _main_memory(re.sub(r"S\(\d+\)", "", match.group(3)))
        elif opcode == "dynamic-update-slice" and operands[0] == name:
            total += 0
        elif opcode == "tuple" or opcode in KINDS:
            # The buffers of a collective that runs beside pass through. Its start counts them.
            total += 0
        elif opcode == "bitcast":
            total += _bytes_read(body, user, parsed, size)
        elif opcode == "fusion":
            total += _read(parsed[_called(match.group(5))[0]], operands.index(name), parsed, size)
        else:
            return size
    return total


def _bytes_written(body: dict[str, re.Match[str]], shape: str) -> int:
    """The bytes that a fusion writes: its results, or the slices of them that it updates."""
    root = next(match for match in body.values() if match.group(1))
    names = _operands(root.group(5)) if root.group(4) == "tuple" else [root.group(2)]
    total = 0
    for name, part in zip(names, _parts(shape), strict=False):
        source = body.get(name)
        while source is not None and source.group(4) == "bitcast":
            source = body.get(_operands(source.group(5))[0])
        if source is not None and source.group(4) in ("parameter", *KINDS):
            # Nothing is written: an operand is passed on, or a collective runs beside, and its start counts.
            total += 0
        elif source is not None and source.group(4) == "dynamic-update-slice" and _main_memory(part):
            update = body.get(_operands(source.group(5))[1])
            total += _main_memory(part) if update is None else _main_memory(re.sub(r"S\(\d+\)", "", update.group(3)))
        else:
            total += _main_memory(part)
    return total


def _parts(shape: str) -> list[str]:
    """The arrays of a shape, with their layouts."""
    return [match.group(0) for match in re.finditer(r"[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", shape)]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by name, and the name of the entry computation."""
    lines: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head.group(1)
            lines[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def _result(shape: str, starts: bool) -> int:
    """Bytes of an operation's results.

    - shape: as the text has it. That of an asynchronous start lists operands, results and semaphores (u32[]).
    - starts: whether it is an asynchronous start.
    """
    arrays = _ARRAY.findall(re.sub(r"u32\[\]", "", shape) if starts else shape)
    sizes = [BYTES.get(kind, 4) * math.prod(int(side) for side in sides.split(",") if side) for kind, sides in arrays]
    return sum(sizes[len(sizes) // 2 :] if starts and shape[0] == "(" else sizes)


def _iterations(line: str, lines: dict[str, list[str]]) -> int | None:
    """A loop's number of iterations: its annotation, else (limit - 0) / step of its counter; None if unknown."""
    annotated = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if annotated:
        return int(annotated.group(1))
    condition, body = (re.search(rf"{part}=%?([\w.-]+)", line) for part in ("condition", "body"))
    if condition is None or body is None:
        return None
    within = lines[condition.group(1)]
    limits = _constants(within)
    compared = [limits[name] for name in limits if any("compare(" in text and f"%{name}" in text for text in within)]
    if len(compared) != 1:
        return None
    return -(-compared[0] // _step(within, lines[body.group(1)]))


def _constants(computation: list[str]) -> dict[str, int]:
    """The integer constants of a computation, by name."""
    matches = (re.search(r"%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)", line) for line in computation)
    return {match.group(1): int(match.group(2)) for match in matches if match}


def _step(condition: list[str], body: list[str]) -> int:
    """What an iteration adds to the counter that the condition reads; more than 1 in an unrolled loop."""
    read = [match for line in condition if (match := re.search(r"get-tuple-element\(.*index=(\d+)", line))]
    root = next((line for line in body if "ROOT" in line and " tuple(" in line), None)
    if len(read) != 1 or root is None:
        return 1
    names = re.findall(r"%([\w.-]+)", root.rsplit(" tuple(", 1)[1].split(")")[0])
    counter = names[int(read[0].group(1))] if int(read[0].group(1)) < len(names) else ""
    added = next((line for line in body if re.search(rf"%{re.escape(counter)} = .* add\(", line)), "")
    constants = _constants(body)
    steps = [constants[name] for name in re.findall(r"%([\w.-]+)", added.partition(" add(")[2]) if name in constants]
    return steps[0] if len(steps) == 1 else 1
