"""The bytes that a compiled program sends between devices, read from its HLO text."""

import collections
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPERATION = re.compile(r"= (\(.*?\)|\S+) ([a-z-]+)\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collective_bytes(text: str) -> dict[str, int]:
    """The bytes of the results of collectives on one device, by kind. Loops count once for every iteration.

    An operation with several results counts with all of them. A loop whose end depends on data counts once.
    """
    lines, entry = _computations(text)

    def sent(computation: str) -> dict[tuple[str, str], int]:
        """Bytes by kind and channel. A channel that appears in several computations is one operation."""
        sizes: dict[tuple[str, str], int] = {}
        for line in lines.get(computation, []):
            operation = _OPERATION.search(line)
            if not operation:
                continue
            shape, opcode = operation.groups()
            if opcode.removesuffix("-start") in KINDS:
                channel = re.search(r"channel_id=(\d+)", line)
                key = (opcode.removesuffix("-start"), channel.group(1) if channel else f"{computation}:{len(sizes)}")
                sizes[key] = _result(shape, opcode.endswith("-start"))
            if opcode in ("while", "call", "fusion", "conditional", "async-start"):
                times = _iterations(line, lines) if opcode == "while" else 1
                for called in re.findall(r"(?:body|calls|to_apply|branch_computations=\{)=?%?([\w.-]+)", line):
                    for key, size in sent(called).items():
                        sizes[key] = max(sizes.get(key, 0), size * times)
        return sizes

    totals: dict[str, int] = collections.Counter()
    for (kind, _), size in sent(entry).items():
        totals[kind] += size
    return dict(totals)


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


def _iterations(line: str, lines: dict[str, list[str]]) -> int:
    """A loop's number of iterations: its annotation, else (limit - 0) / step of its counter; 1 if unknown."""
    annotated = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if annotated:
        return int(annotated.group(1))
    condition, body = (re.search(rf"{part}=%?([\w.-]+)", line) for part in ("condition", "body"))
    if condition is None or body is None:
        return 1
    within = lines[condition.group(1)]
    limits = _constants(within)
    compared = [limits[name] for name in limits if any("compare(" in text and f"%{name}" in text for text in within)]
    if len(compared) != 1:
        return 1
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
