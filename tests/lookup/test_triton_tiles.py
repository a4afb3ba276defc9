"""Tiles of many queries: they decide as the law does, and are made of the instructions meant."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton_interpreted
import triton_tile_cases
from triton_compile import compiled, dumped, resources, target_of

pytest.importorskip("triton")

SHARED = 227 << 10  # bytes that a program may have on sm_90


@pytest.fixture(scope="module", params=triton_interpreted.PLACES)
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    return triton_interpreted.answers_on(request.param, triton_tile_cases, folder)


@pytest.mark.parametrize("tile", ["small", "large"])
@pytest.mark.parametrize("name", triton_tile_cases.CASES)
def test_tiles_decide_as_the_law(found, tile, name):
    wrong, by_descriptors = found[f"{tile}: {name}"]
    assert not wrong
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        assert not by_descriptors
    else:
        assert by_descriptors == (name not in ("moved keys", "fp16, rows of 66 bytes"))


def cut(number: np.ndarray, exponent: int) -> np.ndarray:
    """Return numbers without what is below 2^(exponent - 23)."""
    unit = 2.0 ** (exponent - 23)
    return np.trunc(number / unit) * unit


def product_of_blocks(q: np.ndarray, k: np.ndarray, block: int) -> float:
    """Return q k as a tensor core sums it that keeps no bit beyond those of float32."""
    total = 0.0
    for first in range(0, len(q), block):
        terms = np.append(q[first : first + block] * k[first : first + block], total)
        terms = cut(terms, int(np.frexp(np.abs(terms).max())[1]) - 1)
        total = terms.sum()
        total = float(cut(total, int(np.frexp(total)[1]) - 1))
    return total


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("kind", ["normal", "one sign", "a large term first"])
def test_the_bound_holds_for_sums_that_are_cut(block, kind):
    from grace_fast.kernels.tile_filter import gap_of

    dice = torch.Generator().manual_seed(block)
    q, k = torch.randn(2, 4096, generator=dice)
    if kind == "one sign":
        q, k = q.abs(), k.abs()
    if kind == "a large term first":  # of which every other is lost but for its last bit
        q = k = torch.full((4096,), 1.40625 * 2.0**-12)
        q[0] = 1.0
    q, k = (one.bfloat16().double().numpy() for one in (q, k))
    apart = abs(2 * product_of_blocks(q, k, block) - 2 * float(q @ k))
    allowed = gap_of.fn(4096).value * float(q @ q + k @ k)
    assert apart <= allowed
    if kind == "a large term first":
        assert apart > 0.5 * allowed  # the bound is no wider than it has to be


def built_large(dtype: str, key_slot: str | None):
    from grace_fast.kernels import tile_filter, tiles
    from grace_fast.kernels.exact import Keys
    from grace_fast.kernels.ring import Ring

    tile, bits = tiles.LARGE_TILE, "*i16" if dtype == "bf16" else "*fp16"
    described = [
        None if key_slot else f"tensordesc<{dtype}[{tile[rows]}, {tile['BLOCK_D']}]>"
        for rows in ("BLOCK_B", "BLOCK_N")
    ]
    arguments = {
        "rounded": tiles.FilterQueries(f"*{dtype}", bits, "*fp32", "*fp32", limit="*i32"),
        "multiplied": tiles.FilterKeys(f"*{dtype}", "*fp32", "*fp32", centre=None),
        "query_tiles": described[0],
        "key_tiles": described[1],
        "keys": Keys(f"*{dtype}", "i32 aligned", "*i1", "*fp32", "*i64", "*fp32", key_slot),
        "ring": Ring("*i32", "*i32", "*i32", "*fp32", size=tiles.RING),
        "batch": "i32",
        "programs": "i32",
        "GROUP": tiles.TOGETHER // tile["BLOCK_B"],
        "UPCAST": False,
        **tile,
    }
    warps = {"num_warps": tiles.LARGE_WARPS}
    target = target_of("sm_90")
    return compiled(tile_filter.filter_tiles, target, arguments, **warps, enable_fp_fusion=True)


@pytest.mark.parametrize(
    ("dtype", "key_slot", "copies"),
    [("bf16", None, r"UTMALDG\.2D"), ("fp16", None, r"UTMALDG\.2D"), ("bf16", "*i64", "LDGSTS")],
)
def test_a_large_tile_fills_a_multiprocessor_and_spills_nothing(dtype, key_slot, copies, tmp_path):
    built = built_large(dtype, key_slot)
    used = resources(built.asm["cubin"], tmp_path)
    assert used["REG"] <= 255
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    assert 128 << 10 < built.metadata.shared <= SHARED
    code = dumped(built.asm["cubin"], "-sass", tmp_path)
    assert re.search(copies, code)
    products = set(re.findall(r"HGMMA\.\S+", code))
    kind = ".BF16" if dtype == "bf16" else ""
    assert products == {f"HGMMA.64x256x16.F32{kind}"}
    loop = code[code.index("HGMMA") : code.rindex("HGMMA")]
    assert len(re.findall("HGMMA", code)) * 16 == 64  # one chunk of columns, in one loop
    assert not re.search(r"\b(?:LDL|STL|LDS|STS)\b", loop)
