"""Parser of PTX text: the entries of a module, their registers, variables and instructions.

Only syntax is checked here; `instructions` has the semantics. Names declared in inner scopes
(`{ .reg .b16 t; ... }`, from inline assembly) are made unique.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from mmi_deploy.errors import EngineError

# Bytes of one value of every supported type.
WIDTHS = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "f32x2": 8, "pred": 1},
}

_NAME = re.compile(r"[%$A-Za-z_][\w$]*(?:\.[xyzw]\b)?")
_GUARDED = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)
_VARIABLE = re.compile(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[\s*(\d*)\s*\])?\s*$")


class PtxError(EngineError):
    """Error for PTX text that cannot be parsed, or an unsupported instruction."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard operation.with.suffixes operands`."""

    operation: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str

    @property
    def name(self) -> str:
        return self.operation[0]

    @property
    def type(self) -> str:
        """The last suffix: the type that the instruction works in."""
        return self.operation[-1]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One `.entry`. Offsets and sizes in bytes."""

    name: str
    target: str
    parameters: dict[str, int]
    parameter_bytes: int
    registers: dict[str, str]
    shared: dict[str, int]
    shared_bytes: int
    local: dict[str, int]
    local_bytes: int
    labels: dict[str, int]
    instructions: tuple[Instruction, ...]
    threads: tuple[int, int, int] | None = None  # .maxntid or .reqntid

    def with_instruction(self, index: int, text: str) -> Kernel:
        """The kernel with instruction `index` replaced by `text`."""
        changed = list(self.instructions)
        changed[index] = parse_instruction(text)
        return replace(self, instructions=tuple(changed))


@dataclass
class _Body:
    """Declarations and instructions of one entry, collected while its body is parsed."""

    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    scopes: list[dict[str, str]] = field(default_factory=lambda: [{}])
    opened: int = 0

    def unique(self, name: str) -> str:
        """Unique name for `name` as declared in the current scope."""
        if len(self.scopes) == 1:
            return name
        self.scopes[-1][name] = f"{name}__{self.opened}"
        return self.scopes[-1][name]

    def resolved(self, text: str) -> str:
        """`text` with every scoped name replaced by its unique one."""
        if len(self.scopes) == 1:
            return text

        def rename(match: re.Match[str]) -> str:
            for scope in reversed(self.scopes):
                if match[0] in scope:
                    return scope[match[0]]
            return match[0]

        return _NAME.sub(rename, text)


def parse(text: str) -> dict[str, Kernel]:
    """The entries of a PTX module by name. Raises `PtxError` for text that is not understood."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"(?m)^\s*\.(loc|file)\b[^\n]*$", "", text)
    text = re.sub(r"(?m)^\s*\.section[^{]*\{[^}]*\}", "", text)
    target = re.search(r"\.target\s+(sm_\w+)", text)
    if not target:
        raise PtxError("This is not PTX: it has no .target", expected=".target sm_NN")
    outside = _shared_outside(text)
    kernels = {}
    for match in _ENTRY.finditer(text):
        end = _closing(text, match.end())
        name = match[1]
        parameters, parameter_bytes = _parameters(match[2] or "", name)
        body = _Body()
        for variable, (align, size) in outside.items():
            _place_shared(body, variable, align, size)
        _read_body(text[match.end() : end], body, name)
        threads = re.search(
            r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", match[3]
        )
        kernels[name] = Kernel(
            name,
            target[1],
            parameters,
            parameter_bytes,
            body.registers,
            body.shared,
            body.shared_bytes,
            body.local,
            body.local_bytes,
            body.labels,
            tuple(body.instructions),
            tuple(int(side or 1) for side in threads.groups()) if threads else None,  # type: ignore[arg-type]
        )
    if not kernels:
        raise PtxError("The PTX has no .entry")
    return kernels


def parse_instruction(text: str) -> Instruction:
    """Parse one instruction, without its semicolon."""
    match = _GUARDED.fullmatch(text.strip())
    if not match:
        raise PtxError("A PTX statement is not understood", got=text)
    operands = tuple(operand.strip() for operand in _OPERAND.findall(match[4]))
    operation = tuple(match[3].split("."))
    return Instruction(operation, operands, match[2], match[1] == "!", text.strip())


def _closing(text: str, start: int) -> int:
    """Index of the brace that closes the one before `start`."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise PtxError("The PTX ends inside an entry: a brace is missing")


def _parameters(text: str, kernel: str) -> tuple[dict[str, int], int]:
    """Byte offset of every parameter, and the size of all."""
    offsets, end = {}, 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        plain = re.sub(
            r"\.ptr(\s+\.(global|shared|const|local))?(\s+\.align\s+\d+)?", "", declaration
        )
        match = _VARIABLE.search(re.sub(r"^\.param\s+", "", plain))
        if not match or match[2] not in WIDTHS:
            raise PtxError(f"{kernel}: a parameter is not understood", got=declaration)
        align = int(match[1] or WIDTHS[match[2]])
        end = -(-end // align) * align
        offsets[match[3]] = end
        end += WIDTHS[match[2]] * int(match[4] or 1)
    return offsets, end


def _shared_outside(text: str) -> dict[str, tuple[int, int]]:
    """Shared variables declared outside every entry: alignment and bytes (0: sized at launch).

    Other module variables (NVRTC declares every static constant) are ignored: an instruction that
    names one fails to bind.
    """
    found = {}
    for match in re.finditer(r"(?m)^\s*(?:\.extern\s+|\.visible\s+)?\.shared\s+([^;]*);", text):
        if text.count("{", 0, match.start()) != text.count("}", 0, match.start()):
            continue  # inside an entry
        variable = _VARIABLE.search(match[1])
        if not variable or variable[2] not in WIDTHS:
            raise PtxError("A shared variable is not understood", got=match[0].strip())
        width = WIDTHS[variable[2]]
        count = int(variable[4]) if variable[4] else (0 if variable[4] == "" else 1)
        found[variable[3]] = int(variable[1] or width), width * count
    return found


def _place_shared(body: _Body, name: str, align: int, size: int) -> None:
    body.shared_bytes = -(-body.shared_bytes // align) * align
    body.shared[name] = body.shared_bytes
    body.shared_bytes += size


def _read_body(text: str, body: _Body, kernel: str) -> None:
    """Parse declarations, labels and instructions of one entry."""
    position = 0
    while (position := _after_blank(text, position)) < len(text):
        if text[position] == "{":
            body.scopes.append({})
            body.opened += 1
            position += 1
            continue
        if text[position] == "}":
            body.scopes.pop()
            position += 1
            continue
        label = re.compile(r"([%$\w]+)\s*:(?!:)").match(text, position)
        if label:
            body.labels[body.resolved(label[1])] = len(body.instructions)
            position = label.end()
            continue
        end = text.find(";", position)
        if end < 0:
            raise PtxError(f"{kernel}: a statement has no end", got=text[position:].strip())
        statement = " ".join(text[position:end].split())
        position = end + 1
        if statement.startswith("."):
            _declare(statement, body, kernel)
        elif statement:
            body.instructions.append(parse_instruction(body.resolved(statement)))
    unknown = {
        operand
        for instruction in body.instructions
        if instruction.name == "bra"
        for operand in instruction.operands
        if operand not in body.labels
    }
    if unknown:
        raise PtxError(
            f"{kernel}: jumps to labels that are not there: {', '.join(sorted(unknown))}"
        )


def _after_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n;":
        position += 1
    return position


def _declare(statement: str, body: _Body, kernel: str) -> None:
    """Parse one directive inside an entry."""
    kind, _, rest = statement[1:].partition(" ")
    if kind == "pragma":
        return
    if kind == "reg":
        match = re.fullmatch(r"\.(\w+)\s+(.*)", rest)
        if not match or match[1] not in WIDTHS:
            raise PtxError(f"{kernel}: registers of an unknown type", got=statement)
        for name in match[2].replace(" ", "").split(","):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            names = [f"{many[1]}{index}" for index in range(int(many[2]))] if many else [name]
            body.registers |= {body.unique(each): match[1] for each in names}
        return
    if kind in ("shared", "local"):
        match = _VARIABLE.match(rest)
        if match and match[2] in WIDTHS:
            width = WIDTHS[match[2]]
            align, size = int(match[1] or width), width * int(match[4] or 1)
            name = body.unique(match[3])
            if kind == "shared":
                _place_shared(body, name, align, size)
            else:
                body.local_bytes = -(-body.local_bytes // align) * align
                body.local[name] = body.local_bytes
                body.local_bytes += size
            return
    raise PtxError(f"{kernel}: a directive is not supported", got=statement)
