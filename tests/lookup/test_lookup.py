"""The front door: every back end against the law, what it refuses, what it leaves alone."""

from __future__ import annotations

import math
import random
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CASES, Case, Oracle, codebooks, drawn, f32
from hypothesis import given
from torch import Tensor

import grace_fast as gf
from grace_fast import _native, semantics
from grace_fast.edits.history import History
from grace_fast.lookup import dispatch
from grace_fast.lookup.backends import cpu, cuda, reference, triton
from grace_fast.lookup.backends.workload import Workload

MODES = ("replace_all", "replace_last", "replace_prompt")


def device_for(backend: ModuleType, case: Case) -> str:
    """Return where a back end takes a case; skip with its own words where it takes it nowhere."""
    reasons = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        rows, width = case.keys.shape
        workload = Workload(device, case.keys.dtype, len(case.queries), rows, width)
        reason = backend.why_not(workload)
        if reason is None:
            return device
        reasons.append(reason)
    pytest.skip(f"{backend.NAME}: {'; '.join(reasons)}")


@pytest.fixture(params=dispatch.BACKENDS.values(), ids=dispatch.BACKENDS.keys())
def backend(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fill torch.empty with NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_lawful(case: Case, backend: str, device: str) -> None:
    expected = case.expected()
    book, queries = case.book(device), case.queries.to(device)
    narrow = np.sqrt(np.asarray(expected.squared)).astype(np.float32)
    if hasattr(dispatch.BACKENDS[backend], "nearest"):
        near = gf.nearest(queries, book, backend=backend)
        assert near.row.tolist() == expected.row
        assert near.squared_distance.tolist() == expected.squared  # bit for bit: the order is law
        assert near.squared_distance.dtype == torch.float64
        assert near.row.dtype == torch.int64
        assert near.distance.tolist() == narrow.tolist()
    match = gf.find(queries, book, backend=backend)
    assert match.hit.tolist() == expected.hit
    rows = [row if hit else -1 for row, hit in zip(expected.row, expected.hit, strict=True)]
    assert match.row.tolist() == rows
    distances = [
        d if hit else math.inf for d, hit in zip(narrow.tolist(), expected.hit, strict=True)
    ]
    assert match.distance.tolist() == distances
    assert match.distance.dtype == torch.float32


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_back_end_decides_every_case_by_the_law(case, backend):
    assert_lawful(case, backend.NAME, device_for(backend, case))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, case in CASES.items() if case.hits is not None],
)
def test_the_oracle_says_what_the_case_says(case):
    expected: Oracle = case.expected()
    rows = [row if hit else -1 for row, hit in zip(expected.row, expected.hit, strict=True)]
    assert rows == list(case.hits)
    if case.nearest is not None:
        assert expected.row == list(case.nearest)


def test_the_case_of_permuted_coordinates_is_lost_by_other_orders():
    case = CASES["permuted coordinates tie only in canonical order"]
    [winner] = case.expected().row
    squares = case.keys.double().numpy() ** 2
    others = {
        "numpy": int(squares.sum(axis=1).argmin()),
        "backwards": int(squares[:, ::-1].cumsum(axis=1)[:, -1].argmin()),
        "float32": int((case.keys**2).sum(dim=1).argmin()),
        "norm": int(case.keys.double().norm(dim=1).argmin()),
    }
    assert {name for name, row in others.items() if row != winner} >= {"numpy", "backwards"}


@given(case=codebooks())
def test_drawn_codebooks_are_decided_by_the_law(case):
    for name in ("cpu", "reference"):
        if dispatch.BACKENDS[name].why_not(Workload("cpu", case.keys.dtype, 1, 1, 1)) is None:
            assert_lawful(case, name, "cpu")


@given(case=codebooks())
def test_the_law_in_torch_is_the_law(case):
    expected = case.expected()
    snapshot = case.book().snapshot()
    row, squared = semantics.nearest(case.queries, snapshot.keys, snapshot.live)
    assert row.tolist() == expected.row
    assert squared.tolist() == expected.squared


@pytest.mark.parametrize("odd", ["transposed", "strided", "learning"])
def test_queries_in_any_memory_layout_ask_the_same(odd, backend):
    case = drawn(40, 12, 6)
    device = device_for(backend, case)
    queries = case.queries
    if odd == "transposed":
        queries = queries.T.contiguous().T
    elif odd == "strided":
        queries = torch.stack((queries, queries + 99), dim=1).reshape(6, 24)[:, :12]
    else:
        queries = queries.clone().requires_grad_()
    assert odd == "learning" or not queries.is_contiguous()
    match = gf.find(queries.to(device), case.book(device), backend=backend.NAME)
    assert match.hit.tolist() == case.expected().hit
    assert not match.distance.requires_grad


def test_a_snapshot_is_looked_up_as_it_was():
    case = CASES["ties go to the lowest row"]
    book = case.book()
    before = book.snapshot()
    book.append(case.queries, torch.zeros(1, 2), f32(1))
    assert gf.find(case.queries, before).row.tolist() == [0]
    assert gf.find(case.queries, book).row.tolist() == [2]


# The rule of the references, on our codebook


def reference_rule(queries: Tensor, snapshot: gf.codebook.Snapshot) -> Tensor:
    """Tell what hits by the references' rule: torch.cdist as it comes, argmin, <= radius."""
    distance, row = torch.cdist(queries, snapshot.keys).min(dim=1)
    return distance <= snapshot.radii[row]


@pytest.mark.parametrize("keys", [26, 300])
def test_expanded_edits_beyond_25_keys_are_all_found_where_the_reference_loses_them(keys):
    generator = torch.Generator().manual_seed(keys)
    centres = torch.randn(keys, 64, generator=generator) * 4
    step = torch.randn(keys, 64, generator=generator)
    queries = centres + 1.5 * step / step.norm(dim=1, keepdim=True)
    rules = semantics.Rules(1.0, semantics="reference")  # no margin: the radius is the distance
    book, history = gf.Codebook(64, 2), History()
    with book.writing() as draft:
        for edit, query in enumerate(torch.cat((centres, queries))):
            label, value = torch.zeros(1).long(), torch.zeros(2)
            done = history.apply(draft, rules, query, label, value, edit)
        assert done.outcome == "expanded"
    assert len(book) == keys
    match = gf.find(queries, book)
    assert match.row.tolist() == list(range(keys))
    lost = int((~reference_rule(queries, book.snapshot())).sum())
    assert lost >= keys // 10


# Replacement


def replaced_tokens(mode: str, position: int, length: int) -> list[int]:
    return {
        "replace_all": list(range(length)),
        "replace_last": [position],
        "replace_prompt": list(range(position)),
    }[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", [None, [0, 2, 4]], ids=["last token", "a token of each row"])
def test_a_hit_writes_its_own_rows_value_at_the_tokens_the_mode_names(mode, positions, backend):
    book_case = Case(f32(0, 4, 8)[:, None], f32(0, 4)[:, None], f32(1, 1))
    device = device_for(backend, book_case)
    book = book_case.book(device)
    output = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)).to(device)
    before = output.clone()
    where = None if positions is None else torch.tensor(positions, device=device)
    out = gf.replace(output, book_case.queries.to(device), book, where, mode, backend=backend.NAME)
    expected = before.clone()
    for at, row in ((0, 0), (1, 1)):  # the third query misses
        tokens = replaced_tokens(mode, 4 if positions is None else positions[at], 5)
        expected[at, tokens] = torch.tensor([row, -row], dtype=torch.float32, device=device)
    assert torch.equal(out, expected)
    assert torch.equal(output, before)


def test_replace_prompt_is_the_default_and_leaves_the_query_token():
    case = CASES["on the radius is a hit"]
    output = torch.full((1, 3, 2), 7.0)
    out = gf.replace(output, case.queries, case.book())
    assert out.tolist() == [[[0, 0], [0, 0], [7, 7]]]


def test_values_take_the_outputs_element_type():
    case = Case(f32(0)[None], f32(0)[None], f32(1))
    book = gf.Codebook(1, 2)
    book.append(case.keys, f32(1.0078125, 0.1)[None], case.radii)
    output = torch.zeros(1, 2, 2, dtype=torch.bfloat16)
    out = gf.replace(output, case.queries, book, mode="replace_all")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[0, 1], f32(1.0078125, 0.1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_output_is_the_very_same_where_nothing_hits(mode, dtype):
    case = CASES["nearest wins, not widest"]
    output = torch.tensor([[[-0.0, math.nan], [math.inf, 1e-7]]], dtype=dtype)
    bits = output.view(torch.uint8).clone()
    out = gf.replace(output, case.queries, case.book(), mode=mode)
    assert out is output
    assert torch.equal(output.view(torch.uint8), bits)
    assert gf.replace(output, case.queries, gf.Codebook(1, 2), mode=mode) is output


def test_a_row_that_misses_keeps_every_bit_beside_one_that_hits():
    odd = torch.tensor([0x7FC00001, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int32)
    output = torch.stack((odd, odd)).view(torch.float32).reshape(2, 2, 2)
    case = Case(f32(0, 3)[:, None], f32(0)[:, None], f32(1))
    out = gf.replace(output, case.queries, case.book(), mode="replace_all")
    assert out[0].tolist() == [[0, 0], [0, 0]]
    assert out[1].contiguous().view(torch.int32).flatten().tolist() == odd.tolist()


def test_a_gradient_reaches_the_output_only_where_nothing_was_written():
    case = CASES["on the radius is a hit"]
    output = torch.zeros(1, 3, 2, requires_grad=True)
    gf.replace(output, case.queries, case.book()).sum().backward()
    assert output.grad is not None
    assert output.grad[0, :, 0].tolist() == [0, 0, 1]


# What a look-up leaves alone


def everything(book: gf.Codebook) -> list[bytes]:
    tensors = (book.keys, book.values, book.radii, book.live, book.ids)
    return [tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("call", ["nearest", "find", "replace"])
def test_a_look_up_writes_nothing_and_draws_nothing(call, backend):
    case = CASES["moved keys"]
    device = device_for(backend, case)
    book, queries = case.book(device), case.queries.to(device)
    snapshot, before, asked = book.snapshot(), everything(book), queries.clone()
    output = torch.ones(3, 4, 2, device=device)
    torch_state, numpy_state, python_state = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),  # noqa: NPY002
        random.getstate(),
    )
    if call == "replace":
        gf.replace(output, queries, book, mode="replace_all", backend=backend.NAME)
    else:
        getattr(gf, call)(queries, book, backend=backend.NAME)
    assert book.snapshot() is snapshot
    assert everything(book) == before
    assert torch.equal(queries, asked)
    assert torch.equal(output, torch.ones_like(output))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert random.getstate() == python_state


# Refusals

BOOK = CASES["on the radius is a hit"].book()
REFUSED_QUERIES = {
    "no tensor": ([[1, 2]], TypeError, "queries must be a tensor [B, 2], got list"),
    "wrong width": (torch.zeros(4, 5), ValueError, "queries must be [B, 2], got (4, 5)"),
    "one query without a batch": (torch.zeros(2), ValueError, "queries must be [B, 2], got (2,)"),
    "a token dimension": (torch.zeros(1, 3, 2), ValueError, "must be [B, 2], got (1, 3, 2)"),
    "float64": (
        torch.zeros(1, 2).double(),
        ValueError,
        "queries must be float32, bfloat16 or float16, got torch.float64; "
        "cast them to the codebook's element type",
    ),
    "integers": (torch.zeros(1, 2).long(), ValueError, "or float16, got torch.int64"),
    "another device": (
        torch.zeros(1, 2, device="meta"),
        ValueError,
        "queries must be on the codebook's device cpu, got meta",
    ),
}


@pytest.mark.parametrize("call", [gf.find, gf.nearest])
@pytest.mark.parametrize(
    ("queries", "error", "text"), REFUSED_QUERIES.values(), ids=REFUSED_QUERIES.keys()
)
def test_queries_of_another_form_are_refused_in_words(call, queries, error, text):
    with pytest.raises(error) as refusal:
        call(queries, BOOK)
    assert text in str(refusal.value)


REFUSED_REPLACEMENTS = {
    "another batch": ({"output": torch.zeros(2, 3, 2)}, "output must be [1, T, 2], got (2, 3, 2)"),
    "another width": ({"output": torch.zeros(1, 3, 4)}, "output must be [1, T, 2], got (1, 3, 4)"),
    "no token dimension": ({"output": torch.zeros(1, 2)}, "output must be [1, T, 2], got (1, 2)"),
    "positions of another batch": (
        {"positions": torch.tensor([1, 2])},
        "positions must be [1], got (2,)",
    ),
    "positions as a matrix": ({"positions": torch.tensor([[1]])}, "must be [1], got (1, 1)"),
    "an unknown mode": (
        {"mode": "replace_some"},
        "replacement must be one of ('replace_all', 'replace_last', 'replace_prompt'), "
        "got 'replace_some'",
    ),
    "an unknown back end": (
        {"backend": "abacus"},
        "backend must be one of ('auto', 'cpu', 'cuda', 'triton', 'faiss', 'reference'), "
        "got 'abacus'",
    ),
}


@pytest.mark.parametrize(
    ("changed", "text"), REFUSED_REPLACEMENTS.values(), ids=REFUSED_REPLACEMENTS.keys()
)
def test_a_replacement_of_another_form_is_refused_in_words(changed, text):
    call = {"output": torch.zeros(1, 3, 2), "queries": torch.zeros(1, 2)} | changed
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        gf.replace(codebook=BOOK, **call)
    assert text in str(refusal.value)


def test_something_else_than_a_codebook_is_refused():
    with pytest.raises(TypeError, match="codebook must be a Codebook, got dict"):
        gf.find(torch.zeros(1, 2), {})


# The choice of a back end, without its hardware


@pytest.fixture
def machine(monkeypatch):
    """Make `choose` see a machine where only the named parts are there."""

    def pretend(*parts: str) -> None:
        dispatch.choose.cache_clear()
        monkeypatch.setattr(cpu, "_cpu", object() if "compiled" in parts else None)
        monkeypatch.setattr(cuda, "_cuda", None)
        monkeypatch.setattr(_native, "missing", "the extension was not built")
        missing = None if "triton" in parts else "triton cannot be imported"
        monkeypatch.setattr(triton, "_missing", lambda: missing)
        monkeypatch.setattr(triton, "_interpreted", lambda: "interpreter" in parts)

    yield pretend
    dispatch.choose.cache_clear()


def workload(device: str) -> Workload:
    return Workload(device, torch.float32, 1, 100, 64)


CHOICES = {
    "host, compiled": ("cpu", ("compiled",), "auto", cpu),
    "host, no compiler": ("cpu", (), "auto", reference),
    "host, compiled, triton there": ("cpu", ("compiled", "triton"), "auto", cpu),
    "host, an interpreter has to be named": ("cpu", ("triton", "interpreter"), "auto", reference),
    "host, the interpreter by name": ("cpu", ("triton", "interpreter"), "triton", triton),
    "GPU": ("cuda", ("compiled", "triton"), "auto", triton),
    "GPU without triton": ("cuda", ("compiled",), "auto", reference),
    "GPU, triton interpreted": ("cuda", ("triton", "interpreter"), "auto", reference),
    "another device": ("mps", ("compiled", "triton"), "auto", reference),
    "the law by name": ("cpu", ("compiled",), "reference", reference),
}


@pytest.mark.parametrize(
    ("device", "parts", "asked", "chosen"), CHOICES.values(), ids=CHOICES.keys()
)
def test_the_back_end_is_chosen_from_the_workload_alone(machine, device, parts, asked, chosen):
    machine(*parts)
    assert dispatch.choose(workload(device), asked) is chosen


REFUSALS = {
    "cpu on a GPU": ("cuda", ("compiled",), "cpu", "cpu: keys are on cuda, not on the host"),
    "cpu without a compiler": ("cpu", (), "cpu", "cpu: the extension was not built"),
    "triton not installed": ("cuda", (), "triton", "triton: triton cannot be imported"),
    "triton on the host": ("cpu", ("triton",), "triton", "TRITON_INTERPRET=1 was not set"),
    "triton elsewhere": ("mps", ("triton",), "triton", "keys are on mps, not on a GPU"),
}


@pytest.mark.parametrize(
    ("device", "parts", "asked", "reason"), REFUSALS.values(), ids=REFUSALS.keys()
)
def test_a_named_back_end_never_falls_back(machine, device, parts, asked, reason):
    machine(*parts)
    with pytest.raises(gf.BackendUnavailable) as refusal:
        dispatch.choose(workload(device), asked)
    assert reason in str(refusal.value)
    assert "reference" not in str(refusal.value)


def test_a_refusal_lists_the_reason_of_every_back_end(machine, monkeypatch):
    machine()
    monkeypatch.setattr(reference, "why_not", lambda workload: "on holiday")
    monkeypatch.setitem(dispatch.AUTOMATIC, "cpu", (cpu, triton, reference))
    with pytest.raises(gf.BackendUnavailable) as refusal:
        dispatch.choose(workload("cpu"))
    for reason in (
        "cpu: the extension was not built",
        "triton: triton cannot be imported",
        "reference: on holiday",
    ):
        assert reason in str(refusal.value)


def test_few_keys_are_all_read_more_by_their_codes_and_many_by_codes_in_order():
    if cpu.why_not(workload("cpu")) is not None:
        pytest.skip("the extension was not built")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 64, generator=generator)
    for rows, by_codes, in_order in ((40, False, False), (900, True, False), (5000, True, True)):
        keys = base[torch.arange(rows) % 40] * 5 + torch.randn(rows, 64, generator=generator)
        book = gf.Codebook(64, 2)
        book.append(keys, torch.zeros(rows, 2), torch.full((rows,), 0.3))
        gf.prepare(book)
        view = cpu.view_of(book.snapshot())
        assert view.keys_pay is by_codes
        if by_codes:
            assert any(part.leaf_boxes is not None for part in view.holds[0].segments) is in_order


def test_a_look_up_without_the_compiled_part_is_the_same(machine):
    case = CASES["two hundred expanded keys"]
    machine()
    assert gf.find(case.queries, case.book()).row.tolist() == list(case.hits)


def test_queries_of_every_kind_get_the_same_answer():
    book = gf.Codebook(6, 2)
    keys = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    book.append(keys, torch.zeros(40, 2), torch.full((40,), 0.7))
    queries = keys + 0.25 * torch.randn(40, 6, generator=torch.Generator().manual_seed(4))
    expected = gf.find(queries, book)
    assert 0 < int(expected.hit.sum()) < 40
    conjugate = torch.complex(torch.zeros_like(queries), -queries).conj()
    wide = torch.zeros(40, 12)
    wide[:, ::2] = queries
    for same in (
        queries.clone().requires_grad_(),
        torch.nn.Parameter(queries.clone()),
        conjugate.imag,  # a negative view of every other element
        wide[:, ::2],
        queries.T.contiguous().T,
        torch.cat([queries, queries], dim=1)[:, 6:],
    ):
        got = gf.find(same, book)
        assert torch.equal(got.hit, expected.hit)
        assert torch.equal(got.row, expected.row)
        assert torch.equal(got.squared_distance, expected.squared_distance)
        assert torch.equal(gf.nearest(same, book).row, gf.nearest(queries, book).row)


def test_the_cuda_look_up_says_why_it_refuses(monkeypatch):
    found = {"devices": "CUDA error 35: CUDA driver version is insufficient"}
    described = [
        {"shared_memory": 227 << 10, "capability": (9, 0)},
        {"shared_memory": 64 << 10, "capability": (7, 5)},
    ]
    extension = SimpleNamespace(devices=lambda: found["devices"], device=described.__getitem__)
    monkeypatch.setattr(cuda, "_cuda", extension)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda._device.cache_clear()

    def reason(batch=1, rows=100, width=64, verb="find", index=None):
        return cuda.why_not(Workload("cuda", torch.float32, batch, rows, width, verb, index))

    assert reason() == "CUDA error 35: CUDA driver version is insufficient"
    found["devices"] = 0
    assert reason() == "there is no CUDA device"
    found["devices"] = 1
    assert reason() is None
    assert reason(index=1) == "the GPU has compute capability 7.5, and the kernels need 8.0"
    assert reason(batch=33) == "33 queries are more than 32"
    assert reason(rows=1 << 31) == "2^31 rows or more"
    assert reason(width=1 << 16) == "a query of width 65536 does not fit in shared memory"
    assert reason(verb="nearest").startswith("the kernels find")
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_missing", "the extension was not built")
    with pytest.raises(gf.BackendUnavailable, match="cuda: the extension was not built"):
        dispatch.choose.__wrapped__(workload("cuda"), "cuda")
    cuda._device.cache_clear()


def test_the_triton_look_up_refuses_a_gpu_that_is_too_old(monkeypatch):
    capability = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    triton._too_old.cache_clear()
    assert triton._too_old(0) is None
    old = triton._too_old(1)
    triton._too_old.cache_clear()
    assert old == "the GPU has compute capability 7.5, and the kernels need 8.0"


def test_only_a_codebook_on_a_gpu_is_kept_for_graphs():
    book = gf.Codebook(4, 2)
    with pytest.raises(gf.BackendUnavailable, match="for graphs: cuda: keys are on cpu"):
        gf.prepare(book, cuda_graphs=True)
    assert not book._listeners


def test_what_cannot_follow_an_edit_refuses_it():
    book = gf.Codebook(4, 2)
    followed = []
    book.subscribe("a device", lambda snapshot: followed.append(snapshot.version))
    book.append(torch.ones(1, 4), torch.ones(1, 2), torch.ones(1))
    assert followed == [0, 1]

    def out_of_memory(snapshot):
        if snapshot.rows > 1:
            raise MemoryError("the device has no more")

    book.subscribe("a device", out_of_memory)
    with pytest.raises(MemoryError, match="no more"):
        book.append(torch.zeros(1, 4), torch.ones(1, 2), torch.ones(1))
    assert len(book) == 1
    assert gf.find(torch.ones(1, 4), book).row.tolist() == [0]


def test_an_output_elsewhere_is_refused():
    book = gf.Codebook(4, 2)
    output = torch.zeros(1, 3, 2, device="meta")
    with pytest.raises(ValueError, match="on the codebook's device cpu, got meta"):
        gf.replace(output, torch.ones(1, 4), book)
