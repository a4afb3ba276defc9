"""The kernels of the Triton look-ups, compiled ahead of time: what their machine code holds."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import triton_cases
from triton_compile import TARGETS, compiled, dumped, instructions, resources, target_of

pytest.importorskip("triton")

# Of sm_90, by lane; 65 536 to a multiprocessor.


@dataclass
class Kernel:
    """How a kernel is launched: arguments and warps, and what sm_90 may and must hold."""

    module: str
    name: str
    arguments: dict[str, object]
    registers: int
    warps: int = 4
    fuses: bool = False  # the canonical sum must not
    options: dict[str, int] = field(default_factory=dict)
    holds: tuple[str, ...] = ()


def kernels(native: bool = True) -> dict[str, Kernel]:
    from grace_fast.kernels import code_layout, code_tiles, codes, dense, encode, tiles
    from grace_fast.kernels.code_thresholds import Query
    from grace_fast.kernels.exact import Found, Keys
    from grace_fast.kernels.ring import Ring

    keys = Keys("*bf16", "i32 aligned", "*i1", "*fp32", "*i64", "*fp32", key_slot=None)
    found = Found(hit="*i1", row="*i64", squared="*fp64")
    book = {"queries": "*fp32", "keys": keys, "found": found, "SUMS": True}
    pairs = {"pairs": dense.Pairs("*i64", "*i64"), "programs": "i32", "batch": "i32"}
    pairs |= {"keys": keys, "queries": "*fp32", "PROGRAMS": dense.PROGRAMS}
    alone, together = dense.tile_of(4096, 1), dense.tile_of(4096, dense.MOST_TOGETHER)
    filtered = tiles.FilterKeys("*bf16", "*fp32", "*fp32", centre=None)
    rounded = tiles.FilterQueries("*bf16", "*i16", "*fp32", "*fp32", limit="*i32")
    ring = Ring("*i32", "*i32", "*i32", "*fp32", size=codes.RING)
    small = ring._replace(size=tiles.RING)
    coded = code_layout.Codes(
        **dict.fromkeys(("centre", "leaf_max_radius", "node_max_radius"), "*fp32"),
        **dict.fromkeys(("turn", "numbers"), "*fp64"),
        **dict.fromkeys(("near", "far", "row", "half_norm"), "*i32"),
        **dict.fromkeys(("leaf_boxes", "node_boxes"), "*i16"),
        rows="*bf16",
        counts="*i64",
        folded="*i8",
        isolated="*u8",
        norm_slot=True,
        has_far=True,
        native=native,
    )
    asked = Query(code="*u8", words="*i32", point="*i16", notes="*fp64")
    scanned = {"asked": asked, "codes": coded, "keys": keys, "ring": ring, "batch": "i32"}
    wide = r"LDG(?:STS)?\.E(?:\.\w+)*\.128"
    bytes_apart = ("VABSDIFF4", "IDP.4A", wide)
    return {
        "scan_keys, 1 query": Kernel(
            "dense",
            "scan_keys",
            {**pairs, **alone},
            registers=80,
            fuses=True,
            holds=(wide, "FFMA"),
        ),
        "scan_keys, 4 queries": Kernel(
            "dense",
            "scan_keys",
            {**pairs, **together},
            registers=128,
            fuses=True,
            holds=(wide, "FFMA"),
        ),
        "decide among all keys": Kernel(
            "dense",
            "decide",
            {**book, **pairs, **together},
            registers=168,
            holds=("DADD", "DMUL", wide),
        ),
        "look_up_doubtful": Kernel(
            "doubtful",
            "look_up_doubtful",
            {**book, **pairs, **together, "doubtful": "*i32"},
            registers=168,
            holds=("DADD", "DMUL", wide),
        ),
        "round_queries": Kernel(
            "tiles",
            "round_queries",
            {
                "queries": "*fp32",
                "keys": keys,
                "centre": None,
                "rounded": rounded,
                "entries": "*i32",
                "CHUNK": 1024,
            },
            registers=64,
            fuses=True,
            holds=(wide,),
        ),
        "filter_tiles": Kernel(
            "tile_filter",
            "filter_tiles",
            {
                "rounded": rounded,
                "multiplied": filtered,
                "query_tiles": None,
                "key_tiles": None,
                "keys": keys,
                "ring": small,
                "batch": "i32",
                "programs": "i32",
                "GROUP": 32,
                "UPCAST": False,
                **tiles.TILE,
            },
            registers=184,
            warps=tiles.TILE_WARPS,
            fuses=True,
            holds=("HGMMA", wide),
        ),
        "decide among candidates": Kernel(
            "tiles",
            "decide",
            {**book, "ring": small},
            registers=96,
            holds=("DADD", "DMUL", wide),
        ),
        "encode": Kernel(
            "encode",
            "encode",
            {
                "queries": "*bf16",
                "width": "i32",
                "codes": coded,
                "padded": "i32 aligned",
                "asked": asked,
                "ring": ring,
                "found": found,
                "CHUNK": encode.CHUNK,
            },
            registers=64,
            warps=encode.WARPS,
            holds=(wide,),
        ),
        "collect": Kernel(
            "codes",
            "collect",
            {**scanned, "programs": "i32"},
            registers=128,
            warps=1,
            holds=bytes_apart,
        ),
        "filter_codes": Kernel(
            "code_tiles",
            "filter_codes",
            {**scanned, "shares": "i32", "steps": "i32", **code_tiles.TILE},
            registers=255,  # two programs of 128 threads to a multiprocessor
            warps=code_tiles.WARPS,
            holds=("IGMMA", *bytes_apart),
        ),
        "decide among codes": Kernel(
            "codes",
            "decide",
            {**book, "asked": asked, "codes": coded, "ring": ring},
            registers=codes.REGISTERS,
            options={"maxnreg": codes.REGISTERS} if native else {},
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
                "value_slot": None,
                "positions": "*i64",
                "length": "i32",
                **dict.fromkeys(("batch_stride", "token_stride", "width"), "i32 aligned"),
                **{"MODE": 2, "TOKENS": 8, "COLUMNS": 512},
            },
            registers=40,
            fuses=True,
            holds=(r"LDG\.E(?:\.\w+)*\.64", r"STG\.E(?:\.\w+)*\.128"),
        ),
    }


NAMES = (
    "scan_keys, 1 query",
    "scan_keys, 4 queries",
    "decide among all keys",
    "look_up_doubtful",
    "round_queries",
    "filter_tiles",
    "decide among candidates",
    "encode",
    "collect",
    "filter_codes",
    "decide among codes",
    "write_values",
)


def built_for(name: str, target):
    """Return a kernel of that name; AMD's have neither the byte instructions nor a limit."""
    kernel = kernels(native=target.backend == "cuda")[name]
    module = importlib.import_module(f"grace_fast.kernels.{kernel.module}")
    return compiled(
        getattr(module, kernel.name),
        target,
        kernel.arguments,
        num_warps=kernel.warps,
        enable_fp_fusion=kernel.fuses,
        **kernel.options,
    )


@pytest.mark.parametrize("name", NAMES)
def test_sm_90_holds_what_is_meant_within_its_registers(name, tmp_path):
    kernel = kernels()[name]
    built = built_for(name, target_of("sm_90"))
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
    built = built_for(name, target_of(target))
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


class NoDevice:
    """A driver for which kernels are compiled and never started."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        load_binary=lambda *kernel: (0, 0, 0, 0, 1024),
    )
    get_current_target = staticmethod(lambda: target_of("sm_90"))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_device_interface = staticmethod(lambda: torch)
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)


@pytest.fixture
def launches(monkeypatch):
    """Collect (kernel, what run is given) of launches, without a device."""
    import triton

    if torch.cuda.is_available():
        pytest.skip("look-ups run on the GPU")
    made = []

    def record(kernel, *arguments, grid, warmup, **options):
        made.append((kernel, arguments, grid, options))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    return made


def name_of(kernel) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def specialised(kernel, arguments, options) -> str:
    """Return what Triton takes for constant of a launch: another is another compilation."""
    *_, binder = kernel.device_caches[0]
    _, specialization, options = binder(*arguments, **options)
    return f"{specialization} {options}"


def look_ups():
    """Return every look-up of queries, by name, and what each launches."""
    from grace_fast.kernels import codes, dense, nearest, tiles

    keys, _, _, _ = triton_cases.on_device("clusters in fp16", "cpu")
    made = triton_cases.certificate("clusters in fp16", "cpu")
    multiplied = tiles.filter_keys(keys.slots)
    given_up = "doubtful.look_up_doubtful"
    return {
        "dense": (
            lambda queries, keys=keys: dense.find(queries, keys),
            ["dense.scan_keys", "dense.decide"],
        ),
        "tiles": (
            lambda queries, keys=keys: tiles.find(queries, keys, multiplied),
            ["tiles.round_queries", "tile_filter.filter_tiles", "tiles.decide", given_up],
        ),
        "codes": (
            lambda queries, keys=keys: codes.find(queries, keys, made, tiled=False),
            ["encode.encode", "codes.collect", "codes.decide", given_up],
        ),
        "code tiles": (
            lambda queries, keys=keys: codes.find(queries, keys, made, tiled=True),
            ["encode.encode", "code_tiles.filter_codes", "codes.decide", given_up],
        ),
        "nearest": (
            lambda queries, keys=keys: nearest.nearest(
                queries.float(), keys.slots, keys.key_slot, keys.live
            ),
            ["nearest.nearest_in_share", "nearest.nearest_of_shares"],
        ),
    }


@pytest.mark.parametrize("path", ["dense", "tiles", "codes", "code tiles", "nearest"])
def test_batches_and_codebooks_of_any_size_are_compiled_once(launches, path):
    """Neither B, nor N, nor where a slice begins is a constant: serving waits for no compiler."""
    keys, _, _, _ = triton_cases.on_device("clusters in fp16", "cpu")
    look_up, kernels = look_ups()[path]
    rows, many = keys.width, torch.zeros(80, keys.width, dtype=torch.float16)
    assert rows % 8, "a slice begins at any even address"
    for batch in range(1, 41):
        look_up(many[batch % 9 :][:batch])
    for count in (1, 16, 33, 5000):
        live = torch.ones(count, dtype=torch.bool)
        look_up(many[1:9], keys._replace(live=live, radius=torch.ones(count)))
    assert [name_of(kernel) for kernel, *_ in launches] == 44 * kernels
    variants: dict[str, set[str]] = {}
    for kernel, arguments, _, options in launches:
        told = variants.setdefault(name_of(kernel), set())
        told.add(specialised(kernel, arguments, options))
    # One query reads the keys for itself, several share what is read.
    assert {name: len(told) for name, told in variants.items()} == dict.fromkeys(
        kernels, 2 if path == "dense" else 1
    )


def test_all_programs_of_a_device_share_what_was_given_up(launches, monkeypatch):
    from grace_fast.kernels import launch

    monkeypatch.setattr(launch, "processors", lambda device: 132)
    for path in ("tiles", "codes", "code tiles"):
        for batch in (1, 40):
            look_ups()[path][0](torch.zeros(batch, 33, dtype=torch.float16))
            kernel, _, grid, _ = launches[-1]
            assert kernel.__name__ == "look_up_doubtful"
            assert grid == (4 * 132,)


def test_look_ups_launch_what_compiles(monkeypatch):
    """What a look-up passes is compiled for sm_90; numbers that grow are not constants of it."""
    import triton
    from grace_fast.kernels import codes, dense, tiles

    if torch.cuda.is_available():
        pytest.skip("look-ups run on the GPU")
    launched = {}
    run = triton.JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        built = run(kernel, *arguments, grid=grid, warmup=True, **options)
        launched[name_of(kernel)] = built

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    keys, _, _, _ = triton_cases.on_device("clusters in bf16", "cpu")
    _, queries = triton_cases.case_of("clusters in bf16")
    made = triton_cases.certificate("clusters in bf16", "cpu")
    dense.find(queries, keys)
    tiles.find(queries, keys, tiles.filter_keys(keys.slots))
    for tiled in (False, True):
        codes.find(queries, keys, made, tiled=tiled)
    assert set(launched) == {
        *("dense.scan_keys", "dense.decide", "doubtful.look_up_doubtful"),
        *("tiles.round_queries", "tile_filter.filter_tiles", "tiles.decide"),
        *("encode.encode", "codes.collect", "code_tiles.filter_codes", "codes.decide"),
    }
    for built in launched.values():
        types = built.src.signature
        for name in types.keys() & {"batch", "programs", "shares", "steps"}:
            assert types[name] == "i32"
