"""What a compiled program sends between devices, read from its text."""

import collections
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPERATION = re.compile(r"= (\(.*?\)|\S+) ([a-z-]+)\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def arrays(shape: str) -> list[int]:
    """Bytes of every array in a shape or tuple of shapes."""
    found = _ARRAY.findall(shape)
    return [BYTES.get(kind, 4) * math.prod(int(side) for side in sides.split(",") if side) for kind, sides in found]


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of the results of collectives by kind in one run on one device, loops counted as often as they turn."""
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

    def turns(line: str) -> int:
        """How often a loop turns: as it is annotated, else the constant that its counter, from 0, is compared with."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if known:
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.-]+)", line)
        within = "\n".join(lines[condition.group(1)]) if condition else ""
        compared = {int(found) for found in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", within)} - {0}
        return compared.pop() if len(compared) == 1 else 1

    def sent(computation: str) -> dict[tuple[str, str], int]:
        """Bytes by kind and channel. One that overlaps with computations stands in each of them: counted once."""
        found: dict[tuple[str, str], int] = {}
        for line in lines.get(computation, []):
            operation = _OPERATION.search(line)
            if not operation:
                continue
            shape, what = operation.groups()
            kind = what.removesuffix("-start")
            if kind in KINDS:
                # What starts asynchronously returns its operands beside its results, and semaphores.
                sizes = arrays(re.sub(r"u32\[\]", "", shape))
                channel = re.search(r"channel_id=(\d+)", line)
                key = (kind, channel.group(1) if channel else f"{computation}:{len(found)}")
                found[key] = sum(sizes[len(sizes) // 2 :] if what.endswith("-start") and shape[0] == "(" else sizes)
            if what in ("while", "call", "fusion", "conditional", "async-start"):
                for called in re.findall(r"(?:body|calls|to_apply|branch_computations=\{)=?%?([\w.-]+)", line):
                    for key, size in sent(called).items():
                        found[key] = max(found.get(key, 0), size * (turns(line) if what == "while" else 1))
        return found

    totals: dict[str, int] = collections.Counter()
    for (kind, _), size in sent(entry).items():
        totals[kind] += size
    return dict(totals)
