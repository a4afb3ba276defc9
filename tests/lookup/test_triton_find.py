"""The Triton look-ups decide as the law does, on the interpreter or, where there is one, a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_cases
import triton_interpreted
from cases import INF, oracle

from grace_fast import semantics
from grace_fast.lookup.backends import triton as backend


@pytest.fixture(scope="module", params=triton_interpreted.PLACES)
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    return triton_interpreted.answers_on(request.param, triton_cases, folder)


@pytest.mark.parametrize("path", triton_cases.PATHS)
@pytest.mark.parametrize("name", triton_cases.NAMES)
def test_a_look_up_decides_as_the_law(found, path, name):
    if f"{path}: {name}" not in found:
        assert name in ("squares beyond fp32", "fp32 denormals")  # no map: no certificate
        return
    hit, row, squared, _ = found[f"{path}: {name}"]
    assert (hit, row, squared) == triton_cases.expected(name)


@pytest.mark.parametrize("path", triton_cases.PATHS)
@pytest.mark.parametrize("name", triton_cases.WITHOUT_SUMS)
def test_without_canonical_sums_the_decision_is_the_same(found, path, name):
    hit, row, squared = found[f"{path}, no sums: {name}"]
    wanted_hit, wanted_row, wanted = triton_cases.expected(name)
    assert (hit, row) == (wanted_hit, wanted_row)
    assert [s == INF for s in squared] == [s == INF for s in wanted]
    assert squared == pytest.approx(wanted, rel=1e-5)


def test_the_cases_hold_hits_and_misses():
    hits = [hit for name in triton_cases.NAMES for hit in triton_cases.expected(name)[0]]
    assert hits.count(True) > 50
    assert hits.count(False) > 50


@pytest.mark.parametrize("path", ["codes", "code tiles"])
def test_codes_decide_by_themselves(found, path):
    """Nothing is read densely but what the codes cannot hold and what a ring is too small for."""
    given_up = {
        name: told[3]
        for name in triton_cases.NAMES
        if (told := found.get(f"{path}: {name}")) and told[3]
    }
    assert given_up.pop("a ring too small") > 0
    assert given_up.pop("more rows without codes than a ring holds") == triton_cases.MOST_QUERIES
    assert not given_up


@pytest.mark.parametrize("path", ["tiles", "codes", "code tiles"])
@pytest.mark.parametrize("what", triton_cases.GIVEN_UP)
def test_of_many_queries_only_the_odd_ones_are_looked_up_among_all_keys(found, what, path):
    given_up, (hit, row, squared) = found["given up"][f"{path}: {what}"]
    case, odd = triton_cases.with_odd_rows(what)
    told = oracle(case.queries, case.keys, case.radii, [True] * len(case.keys))
    assert hit == told.hit
    assert row == [row if hit else -1 for hit, row in zip(told.hit, told.row, strict=True)]
    assert squared == [s if hit else INF for hit, s in zip(told.hit, told.squared, strict=True)]
    # Products of numbers so large bound nothing, so that tiles make every key a candidate.
    assert given_up == list(odd) or (path == "tiles" and "float32" in what)
    assert any(hit)


def test_tiles_give_up_only_where_a_ring_is_too_small_or_float32_ends(found):
    given_up = {name for name in triton_cases.NAMES if found[f"tiles: {name}"][3]}
    assert "a ring too small" in given_up
    assert given_up <= {
        "a ring too small",
        "more rows without codes than a ring holds",
        "squares beyond fp32",
        "across pages",
        "far from the origin",
    }


def test_a_hit_beyond_the_floor_needs_its_second_look(found):
    assert found["without a second look"] == [True, True]
    assert triton_cases.expected("a wide ball hides a nearer key")[0] == [False, True]


def test_many_queries_read_codes_until_survivors_cost_more_than_keys_that_are_shared():
    triton_interpreted.skip_unless_importable()
    rows = 1_000_000

    def reads_codes(batch: int, width: int, survivors: int) -> bool:
        snapshot = SimpleNamespace(rows=rows, key_dim=width, dtype=torch.bfloat16)
        state = SimpleNamespace(predicted_bytes=16 * rows + survivors, fitted_rows=rows)
        return backend.codes_pay(state, snapshot, batch)

    assert all(reads_codes(batch, 4096, rows) for batch in (1, 32, 4096))
    assert reads_codes(4096, 32, survivors=rows // 4)
    assert not reads_codes(4096, 32, survivors=rows // 2)
    assert not reads_codes(4096, 16, survivors=0)


def test_folded_codes_are_no_farther_apart_than_codes():
    triton_interpreted.skip_unless_importable()
    from grace_fast.kernels.code_layout import fold

    byte = torch.arange(256, dtype=torch.uint8)
    folded = fold(byte).int()
    around = (byte.int()[:, None] - byte.int()[None, :]) % 256
    assert ((folded[:, None] - folded[None, :]).abs() <= torch.minimum(around, 256 - around)).all()
    assert int(folded.abs().max()) == 64
    centred = byte[:65].int()
    assert torch.equal(folded[:65] - folded[0], -centred)  # nothing is lost of codes around 0


def test_products_of_codes_leave_the_candidates_that_codes_leave(found):
    held = 0
    for code_by_code, by_products in found["collected"]:
        assert by_products == code_by_code
        assert not by_products[3]
        held += sum(map(len, by_products))
    assert held > 60


def test_queries_are_encoded_as_on_the_host(found):
    for apart, least, largest in found["encoded"]:
        assert apart <= 1  # a sum in another order may round to the next step
        assert 0.9 < least <= largest < 1.1


def test_values_are_written_where_the_mask_is_set(found):
    expected = []
    for mode, output, hit, row, values, slot, positions in triton_cases.replacements("cpu"):
        rows = row.clamp(min=0)
        taken = values[rows if slot is None else slot[rows]]
        mask = semantics.replacement_mask(mode, positions, output.shape[1])
        expected.append(semantics.replace(output, hit, taken, mask))
    for told, wanted in zip(found["replaced"], expected, strict=True):
        assert torch.equal(told, wanted)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_look_ups_between_edits_decide_as_the_law(device):
    triton_interpreted.skip_unless_importable()
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "cpu":
        triton_interpreted.skip_where_a_gpu_runs_the_same()
        triton_interpreted.skip_unless_interpreted()
    program = Path(triton_cases.__file__).with_name("triton_edits.py")
    triton_interpreted.run(program, device, interprets=device == "cpu")
