"""The kernels of the Triton look-ups, compiled ahead of time: what their machine code holds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.metadata import version

import pytest
from triton_compile import TARGETS, compiled, dumped, instructions, resources, target_of

pytest.importorskip("triton")

# Of sm_90, by lane; 65 536 to a multiprocessor.
KEYS = {"live": "*i1", "count": "*i64"}
BOOK = {**KEYS, "queries": "*fp32", "keys": "*bf16", "radius": "*fp32", "widest": "*fp32"}
VERDICT = {"hit": "*i1", "row": "*i64", "squared": "*fp64"}
RING = {"ring": "*i32", "entries": "*i32", "doubtful": "*i32"}
PAIRS = {"best": "*i64", "second": "*i64", "programs": "i32", "width": "i32 aligned"}
ENCODED = {"code": "*i32", "point": "*i16", "notes": "*fp64", "numbers": "*fp64"}
PLACES = {
    "counts": "*i64",
    **dict.fromkeys(("near", "far"), "*i32"),
    **dict.fromkeys(("reach", "super_reach"), "*fp32"),
    **dict.fromkeys(("leaf_boxes", "super_boxes"), "*i16"),
}


@dataclass
class Kernel:
    """How a kernel is launched: types and constants, warps, and what sm_90 may and must hold."""

    module: str
    name: str
    types: dict[str, str]
    constants: dict[str, object]
    registers: int
    warps: int = 4
    fuses: bool = False  # the canonical sum must not
    options: dict[str, int] = field(default_factory=dict)
    holds: tuple[str, ...] = ()


def kernels() -> dict[str, Kernel]:
    from grace_fast.kernels import code_tiles, codes, dense, tiles
    from grace_fast.kernels.ring import CHUNK, LANES

    rows, chunk = dense.TILES[-1][1:]
    read = {"key_slot": None, "doubtful": None, "ROWS": rows, "CHUNK": chunk}
    scan = {**KEYS, **PAIRS, "queries": "*fp32", "keys": "*bf16", "batch": "i32"}
    settle = {"key_slot": None, "LANES": LANES, "CHUNK": CHUNK, "COLUMNS": 32, "SUMS": True}
    found = {"NORM_SLOT": True, "HAS_FAR": True, "NATIVE": True, "RING": codes.RING}
    found |= {"SUPERS": codes.SUPERS, "LINEAR": codes.LINEAR}
    wide = r"LDG(?:STS)?\.E(?:\.\w+)*\.128"
    bytes_apart = ("VABSDIFF4", "IDP.4A", wide)
    return {
        "scan_keys, 1 query": Kernel(
            "dense",
            "scan_keys",
            scan,
            {**read, "TOGETHER": 1, "STAGES": dense.STAGES},
            registers=80,
            fuses=True,
            holds=(wide, "FFMA"),
        ),
        "scan_keys, 4 queries": Kernel(
            "dense",
            "scan_keys",
            scan,
            {**read, "TOGETHER": 4, "STAGES": dense.STAGES},
            registers=224,
            fuses=True,
            holds=(wide, "FFMA"),
        ),
        "decide among all keys": Kernel(
            "dense",
            "decide",
            {**BOOK, **PAIRS, **VERDICT},
            {**read, "COLUMNS": 32, "PROGRAMS": 1024, "SUMS": True},
            registers=176,
            holds=("DADD", "DMUL", wide),
        ),
        "round_queries": Kernel(
            "tiles",
            "round_queries",
            {
                "queries": "*fp32",
                "rounded": "*i16",
                **dict.fromkeys(("widest", "norm", "error"), "*fp32"),
                **dict.fromkeys(("limit", "entries"), "*i32"),
                "width": "i32 aligned",
            },
            {"centre": None, "CHUNK": 1024},
            registers=64,
            fuses=True,
            holds=(wide,),
        ),
        "filter_tiles": Kernel(
            "tiles",
            "filter_tiles",
            {
                **KEYS,
                **dict.fromkeys(("rounded", "slots"), "*bf16"),
                **dict.fromkeys(("norm", "error", "key_norm", "key_error"), "*fp32"),
                **dict.fromkeys(("limit", "ring", "entries"), "*i32"),
                **dict.fromkeys(("batch", "programs"), "i32"),
                "width": "i32 aligned",
            },
            {"key_slot": None, "RING": tiles.RING, "UPCAST": False, **tiles.TILE},
            registers=184,
            warps=tiles.TILE_WARPS,
            fuses=True,
            holds=("HGMMA", wide),
        ),
        "decide among candidates": Kernel(
            "tiles",
            "decide",
            {**BOOK, **RING, **VERDICT, "sums": "*fp32", "width": "i32 aligned"},
            {**settle, "RING": tiles.RING},
            registers=96,
            holds=("DADD", "DMUL", wide),
        ),
        "encode": Kernel(
            "codes",
            "encode",
            {
                **ENCODED,
                "code": "*u8",
                "queries": "*bf16",
                "centre": "*fp32",
                "rows": "*bf16",
                "turn": "*fp64",
                **dict.fromkeys(("doubtful", "entries"), "*i32"),
                "width": "i32",
                "padded": "i32 aligned",
            },
            {"NORM_SLOT": True, "CHUNK": codes.ENCODE_CHUNK},
            registers=64,
            warps=codes.ENCODE_WARPS,
            holds=(wide,),
        ),
        "collect": Kernel(
            "codes",
            "collect",
            {
                **ENCODED,
                **PLACES,
                **RING,
                "count": "*i64",
                **dict.fromkeys(("batch", "programs"), "i32"),
            },
            found,
            registers=128,
            warps=1,
            holds=bytes_apart,
        ),
        "filter_codes": Kernel(
            "code_tiles",
            "filter_codes",
            {
                **ENCODED,
                **PLACES,
                **RING,
                "code": "*u8",
                "words": "*i32",
                "folded": "*i8",
                "half_norm": "*i32",
                "count": "*i64",
                **dict.fromkeys(("batch", "shares", "steps"), "i32"),
            },
            {
                **{name: found[name] for name in ("NORM_SLOT", "HAS_FAR", "NATIVE", "RING")},
                "SLOTS": code_tiles.FOLDED,
                **code_tiles.TILE,
            },
            registers=168,
            warps=code_tiles.WARPS,
            holds=("IGMMA", *bytes_apart),
        ),
        "decide among codes": Kernel(
            "codes",
            "decide",
            {
                **BOOK,
                **ENCODED,
                **PLACES,
                **RING,
                **VERDICT,
                "row_at": "*i32",
                "isolated": "*u8",
                "sums": "*fp32",
                "width": "i32 aligned",
            },
            {**settle, **found},
            registers=codes.REGISTERS,
            options={"maxnreg": codes.REGISTERS},
            holds=("DADD", "DMUL", *bytes_apart),
        ),
        "write_values": Kernel(
            "replace",
            "write_values",
            {
                "output": "*bf16",
                "hit": "*i1",
                "row": "*i64",
                "values": "*bf16",
                "positions": "*i64",
                "length": "i32",
                **dict.fromkeys(("batch_stride", "token_stride", "width"), "i32 aligned"),
            },
            {"value_slot": None, "MODE": 2, "TOKENS": 8, "COLUMNS": 512},
            registers=40,
            fuses=True,
            holds=(r"LDG\.E(?:\.\w+)*\.64", r"STG\.E(?:\.\w+)*\.128"),
        ),
    }


NAMES = (
    "scan_keys, 1 query",
    "scan_keys, 4 queries",
    "decide among all keys",
    "round_queries",
    "filter_tiles",
    "decide among candidates",
    "encode",
    "collect",
    "filter_codes",
    "decide among codes",
    "write_values",
)


def built_for(kernel: Kernel, name: str):
    import importlib

    module = importlib.import_module(f"grace_fast.kernels.{kernel.module}")
    constants, options = dict(kernel.constants), dict(kernel.options)
    if name == "gfx942":  # neither the byte instructions nor a limit of registers
        constants |= {"NATIVE": False} if "NATIVE" in constants else {}
        options = {}
    return compiled(
        getattr(module, kernel.name),
        target_of(name),
        kernel.types,
        constants,
        num_warps=kernel.warps,
        enable_fp_fusion=kernel.fuses,
        **options,
    )


@pytest.mark.parametrize("name", NAMES)
def test_sm_90_holds_what_is_meant_within_its_registers(name, tmp_path):
    kernel = kernels()[name]
    built = built_for(kernel, "sm_90")
    used = resources(built.asm["cubin"], tmp_path)
    if tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 9):
        assert used["REG"] <= kernel.registers
        assert (used["STACK"], used["LOCAL"]) == (0, 0)
    else:  # 3.6 takes 216 registers for `filter_tiles`, and 8 bytes of stack for `dense.decide`
        assert used["REG"] <= 232
        assert used["STACK"] <= 16
    code = dumped(built.asm["cubin"], "-sass", tmp_path)
    for pattern in kernel.holds:
        assert re.search(pattern, code), pattern
    if "DMUL" in kernel.holds:  # a canonical sum: PTX and machine code keep product and sum apart
        assert not instructions(built.asm["ptx"], r"\b(?:fma|mad)\.\w+\.f64")
        assert not instructions(code, r"\bDFMA\b")


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "sm_90"])
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_compiles(name, target, tmp_path):
    built = built_for(kernels()[name], target)
    if target == "gfx942":
        assert instructions(built.asm["amdgcn"], r"\.vgpr_spill_count:\s+(\d+)") == {"0"}
        if name == "filter_codes":
            assert instructions(built.asm["amdgcn"], r"v_mfma_i32_\w+_i8")
        return
    code = dumped(built.asm["cubin"], "-sass", tmp_path)
    if name == "filter_tiles":
        assert re.search("HMMA" if target == "sm_80" else "UTCHMMA", code)
    if name == "filter_codes":
        assert re.search(r"\b(?:UTC)?IMMA", code)  # triton 3.6 has the one of sm_80 for sm_100
    if name in ("collect", "filter_codes"):
        assert "VABSDIFF4" in code
        assert "IDP.4A" in code
