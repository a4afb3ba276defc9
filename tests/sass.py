"""Machine code as nvdisasm prints it: instructions, the source functions they are of, and loops."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cuda_build import CUDA, disassembled

_LABEL = re.compile(r"^(\.L_x_\d+):")
_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_CODE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)(.*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_FUNCTION = re.compile(r"GRACE_FAST_(?:KERNEL\(\w+\)|DEVICE|COLD)\s[^;{}()]*?(\w+)\(")


@dataclass
class Instruction:
    """One instruction; `functions` is that of its source line and those it was inlined into."""

    name: str  # with its modifiers
    functions: frozenset[str]
    always: bool  # not under a predicate
    target: str = ""
    labels: list[str] = field(default_factory=list)


Places = frozenset[int]  # of instructions, in the order in which they lie


class Kernel:
    """The instructions of a kernel, in the order in which they lie, with what it calls."""

    def __init__(self, name: str, code: list[Instruction]) -> None:
        self.name, self.code = name, code

    def count(self, pattern: str, places: Iterable[int]) -> int:
        """Return how many of some instructions match."""
        return sum(bool(re.match(pattern, self.code[place].name)) for place in places)

    def places(self, pattern: str, function: str = "") -> list[int]:
        """Return where instructions match, of all or of those of a function of the source."""
        return [
            place
            for place, each in enumerate(self.code)
            if re.match(pattern, each.name) and (not function or function in each.functions)
        ]

    @property
    def widths(self) -> Counter[str]:
        """Return how many loads there are of each width in bits, of global and shared memory."""
        counted: Counter[str] = Counter()
        for each in self.code:
            if found := re.match(r"(LDG|LDS|LD|LDGSTS)\b", each.name):
                bits = re.search(r"\.(128|64|U16|S16|U8|S8)(?:\.|$)", each.name)
                counted[f"{found[1]} {bits[1].strip('US') if bits else 32}"] += 1
            elif found := re.match(r"(UBLKCP|UBLKPF|UTMALDG)", each.name):
                counted[found[1]] += 1
        return counted

    def loops(self, without: Iterable[int] = ()) -> list[Places]:
        """Return the natural loops: of every branch back to what dominates it.

        without: instructions that are not executed, nor what stands in one block with them.
        """
        return _Blocks(self.code, set(without)).loops()

    def innermost(self) -> list[Places]:
        """Return the loops that hold no other."""
        found = self.loops()
        return [loop for loop in found if not any(other < loop for other in found)]


def stretch(loop: Places) -> Places:
    """Return what of a loop lies in one piece from its head: rare paths lie elsewhere."""
    place = min(loop)
    while place in loop:
        place += 1
    return frozenset(range(min(loop), place))


class _Blocks:
    """The control flow of a kernel; what is called returns to the next instruction."""

    def __init__(self, code: list[Instruction], without: set[int]) -> None:
        at = {label: place for place, each in enumerate(code) for label in each.labels}
        starts = {0, *at.values()}
        starts |= {place + 1 for place, each in enumerate(code) if _ends(each)}
        self.begin = sorted(place for place in starts if place < len(code))
        ends = [*self.begin[1:], len(code)]
        self.spans = list(zip(self.begin, ends, strict=True))
        number = {begin: i for i, begin in enumerate(self.begin)}
        self.after: list[list[int]] = []
        for i, (_, end) in enumerate(self.spans):
            last, after = code[end - 1], []
            if last.name.startswith(("BRA", "BRX", "JMP")) and last.target in at:
                after.append(number[at[last.target]])
            if not (_ends(last) and last.always) and i + 1 < len(self.spans):
                after.append(i + 1)
            self.after.append(after)
        gone = {i for i, span in enumerate(self.spans) if not without.isdisjoint(range(*span))}
        self.after = [
            [] if i in gone else [to for to in after if to not in gone]
            for i, after in enumerate(self.after)
        ]

    def loops(self) -> list[Places]:
        dominators = self._dominators()
        before = defaultdict(list)
        for i, after in enumerate(self.after):
            for to in after:
                before[to].append(i)
        bodies: dict[int, set[int]] = {}
        for i, after in enumerate(self.after):
            for head in after:
                if head not in dominators[i]:
                    continue
                body = bodies.setdefault(head, {head})
                left = [i]
                while left:
                    block = left.pop()
                    if block not in body:
                        body.add(block)
                        left += before[block]
        return [
            frozenset(place for block in body for place in range(*self.spans[block]))
            for body in bodies.values()
        ]

    def _dominators(self) -> list[set[int]]:
        """Return the blocks on every way to each; blocks that nothing leads to are entries."""
        before = defaultdict(list)
        for i, after in enumerate(self.after):
            for to in after:
                before[to].append(i)
        everything = set(range(len(self.spans)))
        found = [{i} if i == 0 or not before[i] else everything for i in range(len(self.spans))]
        changed = True
        while changed:
            changed = False
            for i in range(1, len(found)):
                if not before[i]:
                    continue
                new = {i} | set.intersection(*(found[b] for b in before[i]))
                if new != found[i]:
                    found[i], changed = new, True
        return found


def _ends(each: Instruction) -> bool:
    return each.name.startswith(("BRA", "BRX", "JMP", "EXIT", "RET", "BREAK"))


@cache
def kernels(cubin: Path) -> dict[str, Kernel]:
    """Return the kernels of a cubin that was compiled with lines of the source."""
    code: dict[str, list[Instruction]] = {}
    name, labels, chain, fresh = "", [], frozenset[str](), True
    for line in disassembled(cubin).splitlines():
        if found := re.match(r"\.text\.(\w+):", line):
            name, labels = found[1], []
            code[name] = []
        elif found := _LABEL.match(line):
            labels.append(found[1])
        elif "//##" in line:
            here = frozenset(
                function_at(Path(at[0]).name, int(at[1])) for at in _LINE.findall(line)
            )
            chain = here if fresh else chain | here
            fresh = False
        elif name and (found := _CODE.match(line)):
            fresh = True
            target = _TARGET.search(found[4])
            under_another = found[3].startswith("BRA") and not found[4].lstrip().startswith("`(")
            always = found[2] is None and not under_another
            made = Instruction(found[3], chain, always, target[1] if target else "", labels)
            code[name].append(made)
            labels = []
    return {name: Kernel(name, each) for name, each in code.items()}


@cache
def function_at(file: str, line: int) -> str:
    """Return the function that a line of the source is in, or nothing."""
    path = CUDA / file
    if not path.exists():
        return ""
    source = path.read_text()
    end = len("".join(source.splitlines(keepends=True)[:line]))
    names = [found[1] for found in _FUNCTION.finditer(source, 0, end)]
    return names[-1] if names else ""
