"""The Triton kernels: every case equals the law bit for bit, and the machine code keeps its order.

Without a GPU the cases run under Triton's interpreter, in one process of their own:
TRITON_INTERPRET has to be set before triton is imported, and nothing can be compiled afterwards.
With a GPU they run on it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import pytest
import torch
import triton_interpreted
from torch import Tensor
from triton_compile import NVIDIA, compiled, dumped, instructions, resources, target_of

import grace_fast as gf
from grace_fast import semantics
from grace_fast.lookup import dispatch
from grace_fast.lookup.backends import triton as backend
from grace_fast.lookup.backends.workload import Workload

BLOCK_N = 64  # the kernel's, so that cases end at, before and after a block


@dataclass
class Case:
    queries: Tensor  # [B, D]
    keys: Tensor  # [slots, D]
    live: Tensor  # [N] bool
    key_slot: Tensor | None = None  # [N] int64

    def expected(self) -> tuple[Tensor, Tensor]:
        slots = torch.arange(len(self.live)) if self.key_slot is None else self.key_slot
        return semantics.nearest(self.queries, self.keys[slots], self.live)


def drawn(rows: int, width: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> Case:
    """Return normal queries and keys, the second query close to the last key."""
    generator = torch.Generator().manual_seed(1000 * rows + width)
    keys = torch.randn(rows, width, generator=generator)
    queries = torch.randn(batch, width, generator=generator)
    queries[-1] = keys[-1] + 1e-3 * queries[-1]
    return Case(queries.to(dtype), keys.to(dtype), torch.ones(rows, dtype=torch.bool))


def removed(case: Case, rows: slice | list[int]) -> Case:
    case.live[rows] = False
    return case


def duplicates() -> Case:
    case = drawn(150, 12)
    case.keys[[9, 63, 64, 149]] = case.queries[1]
    case.keys[[70, 140]] = case.queries[0] + 0.25
    return case


def mirrored_ties() -> Case:
    """Keys q + step and q - step: the same S, exactly, in three blocks."""
    case = drawn(130, 8)
    case.queries = case.queries.mul(4).round()
    case.keys[:] = case.queries[0] + 100
    case.keys[[128, 65, 40]] = case.queries[0] + torch.tensor([[1.0], [-1.0], [1.0]])
    return case


def reordered_sums() -> Case:
    """The same squares in another order for every key: only the order of summation differs."""
    case = drawn(100, 48)
    difference = torch.linspace(0.1, 3, 48).exp()
    generator = torch.Generator().manual_seed(5)
    for key in case.keys:
        key.copy_(difference[torch.randperm(48, generator=generator)])
    case.queries = torch.zeros(1, 48)
    assert len(semantics.squared_distances(case.queries, case.keys).unique()) > 3
    return case


def not_finite() -> Case:
    case = drawn(20, 20, batch=5)
    case.queries[0, 3], case.queries[1, 0], case.queries[2, 19] = math.nan, math.inf, -math.inf
    return case


def far_from_the_origin() -> Case:
    case = drawn(70, 33)
    case.keys += 1e5
    case.queries += 1e5
    return case


def scaled(case: Case, factor: float) -> Case:
    case.keys *= factor
    case.queries *= factor
    return case


def moved_keys(dtype: torch.dtype = torch.float32) -> Case:
    """Rows point anywhere; the slots that no row points to would win."""
    case = drawn(200, 20, dtype=dtype)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    case.key_slot, case.live = order[:130], case.live[:130]
    case.keys[order[130:]] = case.queries[0]
    return case


def better_rows_past_the_end() -> Case:
    """Rows past N, live and equal to the query: read by mistake, they would win."""
    case = drawn(256, 20)
    case.keys[70:] = case.queries[0]
    case.live = case.live[:70]  # a view: what follows in memory is True
    return case


def wide_queries() -> Case:
    case = drawn(70, 40, dtype=torch.bfloat16)
    case.queries = case.queries.float() + 1e-4
    return case


CASES = {
    "one key": drawn(1, 16),
    "width 1": drawn(70, 1),
    "width 7": drawn(20, 7),
    "one row short of a block": drawn(BLOCK_N - 1, 20),
    "exactly a block": drawn(BLOCK_N, 32),
    "one row past a block": drawn(BLOCK_N + 1, 20),
    "three blocks": drawn(150, 36, batch=3),
    "bf16": drawn(70, 40, dtype=torch.bfloat16),
    "bf16, odd width": drawn(20, 33, dtype=torch.bfloat16),
    "fp16": drawn(70, 40, dtype=torch.float16),
    "fp16, odd width": drawn(20, 33, dtype=torch.float16),
    "fp32 queries and bf16 keys": wide_queries(),
    "duplicates: the lowest row": duplicates(),
    "duplicates: the lowest live row": removed(duplicates(), [9, 63, 70]),
    "ties: the lowest row": mirrored_ties(),
    "the same squares in another order": reordered_sums(),
    "the nearest row was removed": removed(drawn(70, 20), [69]),
    "a block of removed rows": removed(drawn(150, 20), slice(0, BLOCK_N)),
    "every row was removed": removed(drawn(70, 20), slice(None)),
    "NaN and infinity in queries": not_finite(),
    "far from the origin": far_from_the_origin(),
    "fp32 denormals": scaled(drawn(70, 20), 1e-41),
    "fp16 denormals": scaled(drawn(70, 20, dtype=torch.float16), 1e-6),
    "squares beyond fp32": scaled(drawn(70, 20), 1e37),
    "moved keys": moved_keys(),
    "moved keys in bf16": moved_keys(torch.bfloat16),
    "better rows past the end": better_rows_past_the_end(),
}


def codebook(device: str) -> gf.Codebook:
    """Return a codebook with a removed row, a dead key and a moved one."""
    case = drawn(90, 20)
    book = gf.Codebook(20, 3, device=device)
    ids = book.append(case.keys, torch.zeros(90, 3), torch.full((90,), 0.5))
    with book.writing() as draft:
        draft.set_key(7, case.queries[0].to(device) + 0.05)
        draft.set_radius(89, -1.0)
    book.remove(ids[88])
    return book


def shares_won(rows: int) -> tuple[Tensor, Tensor]:
    """Return the winners of many shares, [2, rows]: few distinct S, and shares without a winner."""
    generator = torch.Generator().manual_seed(rows)
    squared = torch.randint(0, 5, (2, rows), generator=generator).double()
    squared[1] += 3
    squared[:, ::3] = math.inf
    row = torch.arange(rows).mul(BLOCK_N).expand(2, rows).masked_fill(squared.isinf(), -1)
    return squared, row.contiguous()


def answers(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what the kernels answer to every case, from outputs filled with NaN before."""
    from grace_fast.kernels import nearest as kernel

    assert kernel.BLOCK_N == BLOCK_N
    if device == "cpu":
        kernel.PROGRAMS_PER_PROCESSOR = 4  # programs that take several blocks each, as of 1e8 rows
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN and the largest integer
    found = {}
    try:
        for name, case in CASES.items():
            slot = None if case.key_slot is None else case.key_slot.to(device)
            live = case.live if device == "cpu" else case.live.to(device)
            queries = case.queries.to(device, torch.float32)
            found[name] = kernel.nearest(queries, case.keys.to(device), slot, live)
        squared, row = (part.to(device) for part in shares_won(2500))
        least, least_row = squared.new_empty(2), row.new_empty(2)
        kernel.nearest_of_shares[(2,)](
            squared, row, least, least_row, 2500, SHARES=kernel.SHARES, **kernel.OPTIONS
        )
        found["winners of 2 500 shares"] = least_row, least
        near = gf.nearest(drawn(90, 20).queries.to(device), codebook(device), backend="triton")
        found["a codebook"] = near.row, near.squared_distance
    finally:
        torch.use_deterministic_algorithms(False)
    return {name: (row.cpu(), squared.cpu()) for name, (row, squared) in found.items()}


def expected(name: str) -> tuple[Tensor, Tensor]:
    if name == "a codebook":
        book = codebook("cpu")
        return semantics.nearest(drawn(90, 20).queries, book.keys, book.live)
    if name == "winners of 2 500 shares":
        squared, row = shares_won(2500)
        block, best = semantics.lowest(squared, torch.ones(2500, dtype=torch.bool))
        return row.gather(1, block[:, None])[:, 0], best
    return CASES[name].expected()


@pytest.fixture(scope="module", params=triton_interpreted.PLACES)
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    return triton_interpreted.answers_on(request.param, sys.modules[__name__], folder)


@pytest.mark.parametrize("name", [*CASES, "winners of 2 500 shares", "a codebook"])
def test_the_kernel_equals_the_law_bit_for_bit(found, name):
    row, squared = found[name]
    expected_row, expected_squared = expected(name)
    assert row.tolist() == expected_row.tolist()
    assert row.dtype == torch.int64
    # As bits: neither a tolerance nor -0.0 == 0.0.
    assert torch.equal(squared.view(torch.int64), expected_squared.view(torch.int64))


@pytest.mark.parametrize("rows", [1, 64, 65, 100_000, 10**8, 3 * 10**9])
def test_shares_cover_the_rows_by_no_more_programs_than_can_be_launched(rows):
    triton_interpreted.skip_unless_importable()
    from grace_fast.kernels import nearest as kernel

    for batch in (1, 2, 31, 4096, 100_000):
        shares, share_blocks = kernel.shares_of(rows, batch, processors=132)
        share_rows = share_blocks * BLOCK_N
        assert (shares - 1) * share_rows < rows <= shares * share_rows
        assert batch * shares <= kernel.PROGRAMS_PER_PROCESSOR * 132 + batch
        assert batch * shares < 1 << 31


def test_keys_on_the_host_are_never_given_to_triton_unasked():
    workload = Workload("cpu", torch.float32, 1, 1, 1)
    assert backend not in dispatch.AUTOMATIC["cpu"]
    assert dispatch.choose(workload).NAME != "triton"


def test_keys_on_a_gpu_are_given_to_triton():
    triton_interpreted.skip_unless_importable()
    assert dispatch.choose(Workload("cuda", torch.bfloat16, 64, 1000, 4096)) is backend


def test_a_refusal_names_the_device_and_the_way_out():
    triton_interpreted.skip_unless_importable()
    book = gf.Codebook(4, 4)
    book.append(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1))
    with pytest.raises(
        gf.BackendUnavailable, match="triton: keys are on cpu, and TRITON_INTERPRET"
    ):
        gf.nearest(torch.zeros(1, 4), book, backend="triton")
    assert backend.why_not(Workload("xpu", torch.float32, 1, 1, 1)) == (
        "keys are on xpu, not on a GPU"
    )


def test_without_triton_the_back_end_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "grace_fast.kernels.nearest", raising=False)
    backend._missing.cache_clear()
    try:
        reason = backend.why_not(Workload("cuda", torch.float32, 1, 1, 1))
        assert reason is not None
        assert reason.startswith("triton cannot be imported")
        assert "grace_fast[triton]" in reason
    finally:
        backend._missing.cache_clear()


# 64 registers a lane leave 16 programs of two warps to a multiprocessor of 65 536. A width that is
# not a multiple of 16 is read element by element; it may take what there is, but not spill.
REGISTERS = 64
REGISTERS_ODD_WIDTH = 255

# The element type of keys, whether rows point to slots, whether D is a multiple of 16.
VARIANTS = {
    "fp32": ("fp32", False, True),
    "bf16, moved keys": ("bf16", True, True),
    "fp16, odd width": ("fp16", False, False),
}
SUMS_ON_NVIDIA = [
    *((target, variant) for target in NVIDIA for variant in ("fp32", "bf16, moved keys")),
    ("sm_90", "fp16, odd width"),
]


def compiled_in_share(target, variant: str, **options):
    from grace_fast.kernels import nearest as kernel

    key, moved, aligned = VARIANTS[variant]
    arguments = {
        "queries": "*fp32",
        "keys": "*" + key,
        "key_slot": "*i64" if moved else None,
        "live": "*i1",
        "share_squared": "*fp64",
        "share_row": "*i64",
        **dict.fromkeys(("batch", "rows", "shares", "share_blocks"), "i32"),
        "width": "i32 aligned" if aligned else "i32",
        "BLOCK_N": kernel.BLOCK_N,
        "CHUNK": kernel.CHUNK_BYTES // (4 if key == "fp32" else 2),
        "STAGES": kernel.STAGES[target.backend],
    }
    warps = kernel.BLOCK_N // target.warp_size
    return compiled(kernel.nearest_in_share, target, arguments, num_warps=warps, **options)


def compiled_of_shares(target):
    from grace_fast.kernels import nearest as kernel

    arguments = {
        "share_squared": "*fp64",
        "share_row": "*i64",
        "squared": "*fp64",
        "row": "*i64",
        "shares": "i32",
        "SHARES": kernel.SHARES,
    }
    return compiled(kernel.nearest_of_shares, target, arguments, **kernel.OPTIONS)


@pytest.fixture
def target(request):
    triton_interpreted.skip_unless_importable()
    return target_of(request.param)


@pytest.mark.parametrize(("target", "variant"), SUMS_ON_NVIDIA, indirect=["target"])
def test_the_sum_is_compiled_for_nvidia_without_contraction_or_spills(target, variant, tmp_path):
    from grace_fast.kernels import nearest as kernel

    built = compiled_in_share(target, variant, **kernel.OPTIONS)
    found = instructions(built.asm["ptx"], r"\b(?:add|sub|mul|fma|mad)\.\w*\.?f64")
    assert found == {"add.rn.f64", "sub.rn.f64", "mul.rn.f64"}
    # The machine code too: the assembler may contract what PTX does not.
    machine_code = dumped(built.asm["cubin"], "-sass", tmp_path)
    assert instructions(machine_code, r"\bD(?:ADD|MUL|FMA)\b") == {"DADD", "DMUL"}
    used = resources(built.asm["cubin"], tmp_path)
    assert used["REG"] <= (REGISTERS_ODD_WIDTH if "odd" in variant else REGISTERS)
    assert (used["STACK"], used["LOCAL"]) == (0, 0)


@pytest.mark.parametrize("variant", ["fp32", "bf16, moved keys"])
@pytest.mark.parametrize("target", ["gfx942"], indirect=True)
def test_the_sum_is_compiled_for_amd_without_contraction_or_spills(target, variant):
    from grace_fast.kernels import nearest as kernel

    code = compiled_in_share(target, variant, **kernel.OPTIONS).asm["amdgcn"]
    arithmetic = instructions(code, r"\bv_(?:pk_)?(?:add|mul|fma|fmac|mad|mac)_f64")
    assert arithmetic == {"v_add_f64", "v_mul_f64"}
    assert instructions(code, r"\.[sv]gpr_spill_count:\s+(\d+)") == {"0"}


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"], indirect=True)
def test_the_winners_are_compiled(target, tmp_path):
    built = compiled_of_shares(target)
    if target.backend == "hip":
        assert instructions(built.asm["amdgcn"], r"\.[sv]gpr_spill_count:\s+(\d+)") == {"0"}
        return
    used = resources(built.asm["cubin"], tmp_path)
    assert used["REG"] <= REGISTERS
    assert (used["STACK"], used["LOCAL"]) == (0, 0)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"], indirect=True)
def test_a_contraction_would_be_seen(target):
    """The option that forbids it is what keeps the order, and the patterns above would find it."""
    built = compiled_in_share(target, "fp32", enable_fp_fusion=True)
    if target.backend == "hip":
        assert instructions(built.asm["amdgcn"], r"\bv_fmac?_f64")
    else:
        assert "fma.rn.f64" in built.asm["ptx"]


if __name__ == "__main__":
    torch.save(answers("cpu"), sys.argv[1])
