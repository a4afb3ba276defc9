"""The certificate on its own: no lower bound is ever above the true distance."""

import math

import pytest
import torch

from grace_fast.index import quantizer


def normal(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def spectrum(rows, width, power, seed=0):
    return normal(rows, width, seed) * torch.arange(1, width + 1).float() ** -power


def massive(rows, width, seed=0):
    x = normal(rows, width, seed)
    x[:, :3] *= 1000
    return x


# name: (keys, queries, a radius of the right size)
CASES = {
    "isotropic": lambda: (normal(400, 96), normal(50, 96, 1), 2.0),
    "j^-2 spectrum": lambda: (spectrum(400, 96, 2), spectrum(50, 96, 2, 1), 0.01),
    "massive dimensions": lambda: (massive(400, 96), massive(50, 96, 1), 1.0),
    "far from the origin": lambda: (normal(400, 96) + 1e4, normal(50, 96, 1) + 1e4, 1.0),
    "queries of another domain": lambda: (spectrum(400, 96, 1), 30 * normal(50, 96, 1), 0.1),
    "queries far beyond the clamp": lambda: (normal(400, 96), 1e9 * normal(50, 96, 1), 1e-3),
    "bfloat16": lambda: (normal(400, 96).bfloat16(), normal(50, 96, 1).bfloat16(), 2.0),
    "all keys equal": lambda: (torch.ones(200, 96), normal(50, 96, 1), 0.5),
    "one key": lambda: (normal(1, 96), normal(50, 96, 1), 0.5),
    "fewer keys than slots": lambda: (normal(20, 96), normal(50, 96, 1), 0.5),
    "width 1": lambda: (normal(300, 1), normal(50, 1, 1), 0.01),
    "width 15": lambda: (normal(300, 15), normal(50, 15, 1), 0.1),
    "width 17": lambda: (normal(300, 17), normal(50, 17, 1), 0.1),
    "width 2000": lambda: (normal(300, 2000), normal(20, 2000, 1), 5.0),
    "step far too small": lambda: (normal(300, 96), normal(50, 96, 1), 1e-7),
    "step far too large": lambda: (normal(300, 96), normal(50, 96, 1), 1e6),
    "a query next to a key": lambda: (normal(400, 96), normal(50, 96) + 1e-4, 0.01),
    "the queries are keys": lambda: (massive(400, 96), massive(50, 96), 0.01),
}


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("name", CASES)
def test_no_lower_bound_exceeds_the_distance(name, far):
    keys, queries, radius = CASES[name]()
    phi = quantizer.fit(keys, radius)
    assert phi is not None
    bounds = quantizer.lower_bounds(
        phi, quantizer.encode_queries(phi, queries), quantizer.encode_keys(phi, keys), far
    )
    distances = torch.cdist(
        queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert (bounds <= distances).all(), (bounds - distances).max()


@pytest.mark.parametrize("norm_slot", [False, True])
def test_no_bound_exceeds_the_distance_with_either_last_slot(norm_slot, monkeypatch):
    monkeypatch.setattr(quantizer, "_norm_helps", lambda *_: norm_slot)
    for power in (0.0, 0.5, 1.0):
        keys, queries = spectrum(500, 64, power), spectrum(100, 64, power, 1)
        phi = quantizer.fit(keys, 0.3)
        made = quantizer.encode_queries(phi, queries), quantizer.encode_keys(phi, keys)
        distances = torch.cdist(queries.double(), keys.double())
        for far in (False, True):
            assert (quantizer.lower_bounds(phi, *made, far) <= distances + 1e-9).all()


def test_the_cut_keeps_every_key_within_the_radius():
    keys = spectrum(800, 64, 0.7)
    radius = 0.05
    direction = torch.nn.functional.normalize(normal(800, 64, 1), dim=1)
    queries = keys + direction * radius * (1 - 1e-6)  # each barely within the radius of its key
    phi = quantizer.fit(keys, radius)
    asked, kept = quantizer.encode_queries(phi, queries), quantizer.encode_keys(phi, keys)
    for far, name in ((False, "near_error"), (True, "far_error")):
        sums = quantizer.code_distances(phi, asked, kept, far).diagonal()
        for total, e_q, e_k in zip(
            sums.tolist(), getattr(asked, name).tolist(), getattr(kept, name).tolist(), strict=True
        ):
            assert total <= quantizer.threshold(phi, radius, e_q, e_k)


def test_a_good_fit_proves_nearly_every_miss():
    keys, queries = spectrum(2000, 256, 1), spectrum(200, 256, 1, 1)
    nearest = torch.cdist(queries, keys).amin(dim=1).median()
    radius = 0.2 * float(nearest)
    phi = quantizer.fit(keys, radius)
    bounds = quantizer.lower_bounds(
        phi, quantizer.encode_queries(phi, queries), quantizer.encode_keys(phi, keys), far=True
    )
    assert (bounds <= radius).float().mean() < 1e-3


def test_keys_in_the_densest_part_are_told_apart_where_all_keys_vary_elsewhere():
    wide, dense = torch.zeros(1000, 96), torch.zeros(1000, 96)
    wide[:, :20] = 10 * normal(1000, 20)  # more principal directions than there are near slots
    dense[:, 30:36] = 2 * normal(1000, 6, 1)
    keys = torch.cat([wide, dense])
    phi = quantizer.fit(keys, 0.5)
    asked = quantizer.encode_queries(phi, dense[:200])
    near = quantizer.lower_bounds(phi, asked, quantizer.encode_keys(phi, dense))
    assert (near > 0.5).float().mean() > 0.95


def test_the_step_is_a_power_of_two_near_the_radius():
    phi = quantizer.fit(normal(100, 32), 0.7)
    assert math.log2(phi.step).is_integer()
    assert 24 <= 0.7 / phi.step <= 49


def test_the_rows_are_stored_exactly_and_bounded():
    phi = quantizer.fit(spectrum(300, 80, 1), 0.1)
    assert torch.equal(phi.rows, phi.rows.bfloat16().float())
    assert float(torch.linalg.matrix_norm(phi.wide_rows, 2)) <= phi.lipschitz
    assert abs(phi.lipschitz - 1) < 0.02


def test_packed_rows_hold_every_element_once():
    phi = quantizer.fit(normal(100, 70), 0.5)
    packed = phi.packed_rows.float().view(quantizer.SLOTS, -1, 8, 2)
    plain = packed.transpose(2, 3).reshape(quantizer.SLOTS, -1)
    assert torch.equal(plain[:, :70], phi.rows)
    assert not plain[:, 70:].any()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_a_scale_that_no_step_suits_is_refused(scale):
    assert quantizer.fit(normal(100, 8), scale) is None


def test_a_fit_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    quantizer.fit(normal(100, 32), 0.5)
    assert torch.equal(before, torch.get_rng_state())
