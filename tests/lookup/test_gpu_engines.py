"""Which engine answers on a GPU, and what is said where one cannot; without a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import grace_fast as gf
from grace_fast.lookup import dispatch
from grace_fast.lookup.backends import cuda, reference, triton
from grace_fast.lookup.backends.workload import Workload


class Extension:
    """`grace_fast._cuda`, as far as the choice asks it."""

    def __init__(self, devices=1, capability=(9, 0), shared_memory=232448):
        self.count = devices
        self.told = {"capability": capability, "shared_memory": shared_memory}

    def devices(self):
        return self.count

    def device(self, index):
        return self.told


@pytest.fixture
def machine(monkeypatch):
    """Make the choice see a machine: an extension or None, whether triton is there, a GPU."""

    def pretend(extension, has_triton=True, capability=(9, 0)):
        dispatch.choose.cache_clear()
        cuda._device.cache_clear()
        triton._too_old.cache_clear()
        monkeypatch.setattr(cuda, "_cuda", extension)
        monkeypatch.setattr(cuda, "_missing", "the extension grace_fast._cuda was not built")
        missing = None if has_triton else "triton cannot be imported"
        monkeypatch.setattr(triton, "_missing", lambda: missing)
        monkeypatch.setattr(triton, "_interpreted", lambda: False)
        there = SimpleNamespace(
            is_available=lambda: True,
            current_device=lambda: 0,
            get_device_capability=lambda index: capability,
        )
        monkeypatch.setattr(torch, "cuda", there)

    yield pretend
    for cached in (dispatch.choose, cuda._device, triton._too_old):
        cached.cache_clear()


def workload(batch=4, rows=10**5, width=4096, verb="find"):
    return Workload("cuda", torch.bfloat16, batch, rows, width, verb)


@pytest.mark.parametrize(
    ("batch", "engine"), [(1, cuda), (8, cuda), (31, cuda), (32, triton), (4096, triton)]
)
def test_few_queries_go_to_the_compiled_kernels_and_many_to_triton(machine, batch, engine):
    machine(Extension())
    assert dispatch.choose(workload(batch)) is engine


@pytest.mark.parametrize("batch", [1, 4096])
def test_every_batch_has_an_engine_where_only_one_is_there(machine, batch):
    machine(None)
    assert dispatch.choose(workload(batch)) is triton
    machine(Extension(), has_triton=False)
    assert dispatch.choose(workload(batch)) is (cuda if batch == 1 else reference)


def test_the_nearest_key_outside_all_balls_is_looked_for_by_triton(machine):
    machine(Extension())
    assert dispatch.choose(workload(verb="nearest")) is triton


def test_no_figure_is_said_to_be_measured_that_was_not():
    assert {turn.measured for turn in dispatch.ON_A_GPU} == {"estimated"}
    batches = [turn.batch for turn in dispatch.ON_A_GPU]
    assert batches == sorted(batches)
    assert batches[0] < triton.TILED  # where Triton begins to multiply


REFUSED = {
    "no driver": (
        Extension("CUDA error 35: CUDA driver version is insufficient"),
        {},
        "cuda: CUDA error 35: CUDA driver version is insufficient",
    ),
    "no device": (Extension(0), {}, "cuda: there is no CUDA device"),
    "an old GPU": (
        Extension(capability=(7, 5)),
        {},
        "cuda: the GPU has compute capability 7.5, and the kernels need 8.0",
    ),
    "not built": (None, {}, "cuda: the extension grace_fast._cuda was not built"),
    "a wide query": (
        Extension(shared_memory=49152),
        {"width": 16384},
        "cuda: a query of width 16384 does not fit in shared memory",
    ),
    "many queries": (Extension(), {"batch": 33}, "cuda: 33 queries are more than 32"),
    "many rows": (Extension(), {"rows": 2**31}, "cuda: 2^31 rows or more"),
}


@pytest.mark.parametrize(
    ("extension", "asked", "reason"), REFUSED.values(), ids=list(REFUSED.keys())
)
def test_an_engine_that_cannot_says_why_and_another_one_answers(machine, extension, asked, reason):
    machine(extension)
    with pytest.raises(gf.BackendUnavailable) as refusal:
        dispatch.choose(workload(**asked), "cuda")
    assert reason in str(refusal.value)
    assert dispatch.choose(workload(**asked)) is triton


def test_each_device_is_asked_what_it_can(machine, monkeypatch):
    extension = Extension(2)
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(
        extension, "device", lambda index: extension.told | {"capability": capabilities[index]}
    )
    machine(extension)
    engines = [dispatch.choose(replace(workload(), index=index)) for index in (0, 1)]
    assert engines == [cuda, triton]


def test_an_old_gpu_is_answered_by_the_law_and_keeps_no_graphs(machine, monkeypatch):
    machine(Extension(capability=(7, 5)), capability=(7, 5))
    assert dispatch.choose(workload()) is reference
    book = SimpleNamespace(
        snapshot=lambda: SimpleNamespace(
            key_slots=SimpleNamespace(
                device=SimpleNamespace(type="cuda", index=0), dtype=torch.float32
            )
        ),
        key_dim=8,
        __len__=lambda: 3,
    )
    monkeypatch.setattr(dispatch, "len", lambda book: 3, raising=False)
    with pytest.raises(gf.BackendUnavailable) as refusal:
        dispatch.keep_for_graphs(book)
    for engine in ("cuda", "triton"):
        assert f"{engine}: the GPU has compute capability 7.5" in str(refusal.value)
