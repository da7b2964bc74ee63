"""Assembly text as Triton's AMD backend prints it, parsed into instructions, operands and kernel
metadata.

Syntax: LLVM "AMDGPU Operand Syntax" and "AMDGPU Modifier Syntax"
(llvm.org/docs/AMDGPUOperandSyntax.html)."""

import re
from dataclasses import dataclass

VCC, M0, EXEC, NULL = 106, 124, 126, 125  # their numbers as scalar operands (MI300 ISA)
SPECIAL = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "m0": (M0, 1),
    "null": (NULL, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
}
SGPR_BIT = 512  # register masks: bits 0..511 VGPR and AGPR, then SGPRs


@dataclass(frozen=True)
class Operand:
    """kind: "v" vector register, "s" scalar register, "int" / "float" constant, "hex" 32-bit
    literal, "name" label."""

    kind: str
    index: int = 0
    count: int = 1
    value: object = None
    neg: bool = False
    abs: bool = False
    sext: bool = False

    @property
    def mask(self):
        if self.kind not in "vs":
            return 0
        return ((1 << self.count) - 1) << (self.index + (SGPR_BIT if self.kind == "s" else 0))


@dataclass
class Instruction:
    """One line. `op` is the mnemonic without its encoding suffix; `where` is the Python line it
    came from."""

    op: str
    operands: list
    mods: dict
    text: str
    where: str
    encoding: str = ""
    inline: bool = False  # of inline assembly, whose hazards the compiler does not all see
    regs: int = 0  # registers named, as a mask
    pc: int = 0
    labels: dict = None  # of its program
    run: object = None  # what it does to a group of waves (machine.build)
    klass: str = ""  # counters.classify
    cycles: int = 0


@dataclass
class Program:
    name: str
    code: list  # Instruction
    labels: dict  # label -> index into code
    args: list  # (offset, size, value_kind) of every kernel argument
    directives: dict  # .amdhsa_* and metadata integers by name
    accum_offset: int  # AGPR n is vector register accum_offset + n
    lds_unit: int = 4


def split_commas(text):
    """Splits at commas outside (), [] and ||."""
    return [p.strip() for p in re.split(r",(?![^\[(]*[\])])", text)]


def parse_operand(text, accum_offset):
    neg = abs_ = sext = False
    if m := re.fullmatch(r"neg\((.*)\)", text):
        text, neg = m[1], True
    elif text.startswith("-") and not re.match(r"-[\d.]", text):
        text, neg = text[1:], True
    if m := re.fullmatch(r"\|(.*)\||abs\((.*)\)", text):
        text, abs_ = m[1] or m[2], True
    if m := re.fullmatch(r"sext\((.*)\)", text):
        text, sext = m[1], True
    if m := re.fullmatch(r"([vsa])(\d+)", text):
        kind, first, count = m[1], int(m[2]), 1
    elif m := re.fullmatch(r"([vsa])\[(\d+):(\d+)\]", text):
        kind, first, count = m[1], int(m[2]), int(m[3]) - int(m[2]) + 1
    elif text in SPECIAL:
        kind, (first, count) = "s", SPECIAL[text]
    elif re.fullmatch(r"0x[0-9a-f]+", text):
        return Operand("hex", value=int(text, 16), neg=neg, abs=abs_)
    elif re.fullmatch(r"-?\d+", text):
        return Operand("int", value=int(text), neg=neg, abs=abs_)
    elif re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", text):
        return Operand("float", value=float(text), neg=neg, abs=abs_)
    else:
        return Operand("name", value=text)
    if kind == "a":
        kind, first = "v", first + accum_offset
    return Operand(kind, first, count, None, neg, abs_, sext)


def parse_mod(text):
    """`offset:16`, `op_sel:[0,1]`, `src0_sel:WORD_1`, `vmcnt(3)`, or a bare flag such as `lds` ->
    (name, value)."""
    if m := re.fullmatch(r"(\w+)\((\d+)\)", text):
        return m[1], int(m[2])
    name, colon, value = text.partition(":")
    if not colon:
        return name, True
    if value.startswith("["):
        return name, [int(x) for x in value[1:-1].split(",")]
    return name, int(value, 0) if re.fullmatch(r"-?(0x)?[0-9a-f]+", value) and not value[
        0
    ].isupper() else value


SUFFIX = re.compile(r"_(e32|e64|dpp|sdwa|e64_dpp)$")


def parse_instruction(text, where, accum_offset):
    op, _, rest = text.partition(" ")
    encoding = ""
    if m := SUFFIX.search(op):
        op, encoding = op[: m.start()], m[1]
    operands, mods = [], {}
    if op == "s_waitcnt":
        mods = dict(parse_mod(t) for t in rest.split())
    elif rest.strip():
        *head, last = split_commas(rest.strip())
        last, *tail = re.split(r"\s+(?![^(]*\))", last)
        operands = [parse_operand(t, accum_offset) for t in [*head, last]]
        mods = dict(parse_mod(t) for t in tail)
    ins = Instruction(op, operands, mods, text, where, encoding)
    for opd in operands:
        ins.regs |= opd.mask
    return ins


def parse(text):
    """Parses a whole `.amdgcn` text into a Program. Raises ValueError where it does not hold
    exactly one kernel."""
    names = re.findall(r"^\s*\.amdhsa_kernel (\S+)", text, re.M)
    if len(names) != 1:
        raise ValueError(f"expected one kernel in the assembly, found {names}")
    directives = {
        k: int(v, 0)
        for k, v in re.findall(r"^\s*\.amdhsa_(\w+) (\S+)", text, re.M)
        if k != "kernel"
    }
    meta = text[text.rfind(".amdgpu_metadata") :]
    directives |= {
        k: int(v)
        for k, v in re.findall(r"^\s+-? ?\.(\w+_count|\w+_fixed_size):\s+(\d+)", meta, re.M)
    }
    for key in ("codeLenInByte", "Occupancy", "ScratchSize"):
        m = re.search(rf"^; {key}\s*[=:] (\d+)", text, re.M)
        directives[key] = int(m[1]) if m else 0
    entries = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", meta)
    args = [(int(o), int(s), kind) for o, s, kind in entries]
    accum = directives.get("accum_offset", 256)

    code, labels, files, where, inline = [], {}, {}, "?", False
    start = text.index(f"\n{names[0]}:")
    for raw in text[start:].splitlines():
        line, _, comment = raw.partition(";")
        line = line.strip()
        if "#ASM" in comment:
            inline = "#ASMSTART" in comment
        if m := re.match(r"\.file\s+(\d+)\s+(?:\"(.*)\"\s+)?\"(.*)\"", line):
            files[m[1]] = f"{m[2]}/{m[3]}" if m[2] else m[3]
        elif m := re.match(r"\.loc\s+(\d+) (\d+)", line):
            inlined = comment.partition("@[")[2].rstrip(" ]").replace("@[", "<-")
            if m[2] != "0":  # line 0: the compiler merged several; keep the last real one
                where = f"{files[m[1]]}:{m[2]}" + (f" <- {inlined.strip()}" if inlined else "")
        elif m := re.match(r"([.\w$]+):$", line):
            labels[m[1]] = len(code)
        elif line.startswith(".section"):
            break
        elif line and not line.startswith("."):
            code.append(parse_instruction(re.sub(r"\s+", " ", line), where, accum))
            code[-1].inline = inline
    return Program(names[0], code, labels, args, directives, accum)
