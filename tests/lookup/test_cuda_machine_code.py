"""The GPU look-up as nvcc compiles it: what speed and law rest on is in the machine code."""

import pytest
from cuda_build import compiled, instructions

# 512 threads share the 65 536 registers of a multiprocessor.
REGISTERS = 128
# setup.py's list; 90a is where speed is measured. A minute's compilation is enough for each day.
ARCHITECTURES = (
    "80",
    "90a",
    *(pytest.param(other, marks=pytest.mark.slow) for other in ("89", "100", "120")),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    made = {}

    def of(architecture):
        if architecture not in made:
            used, cubin = compiled(architecture, tmp_path_factory.mktemp("cubin"))
            made[architecture] = used, instructions(cubin)
        return made[architecture]

    return of


def of_kind(counted, kind):
    found = {name: count for name, count in counted.items() if kind in name}
    assert found
    return found.items()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits_its_registers(built, architecture):
    used, _ = built(architecture)
    assert len(used) == 3 * 3 + 3 + 1  # dense by dtype and queries, by codes by dtype, and encode
    for name, use in used.items():
        assert use["registers"] <= REGISTERS, name
        if architecture == "90a":
            assert use["spills"] == 0, name


def test_the_scan_takes_two_instructions_for_four_code_bytes(built):
    for name, count in of_kind(built("90a")[1], "indexed_kernel"):
        differences = sum(n for op, n in count.items() if op.startswith("VABSDIFF4"))
        products = sum(n for op, n in count.items() if op.startswith("IDP.4A.S8.S8"))
        assert differences >= 2 * 4, name  # two keys a lane, four words a key
        assert differences == products, name


def test_boxes_are_tested_two_slots_at_a_time(built):
    for name, count in of_kind(built("90a")[1], "indexed_kernel"):
        assert count["VIADDMNMX.S16x2.RELU"] >= 8, name  # 16 slots
        assert count["IDP.4A.U8.U8"] >= 4, name


@pytest.mark.parametrize("kind", ["dense_kernel", "indexed_kernel", "encode_kernel"])
def test_memory_is_read_16_bytes_at_a_time(built, kind):
    for name, count in of_kind(built("90a")[1], kind):
        assert any(op.startswith("LDG.E") and ".128" in op for op in count), name
        if kind != "encode_kernel":  # queries, or codes of them
            assert count["LDS.128"], name


def test_what_is_counted_in_shared_memory_is_known_to_be_there(built):
    for name, count in of_kind(built("90a")[1], "indexed_kernel"):
        assert count["ATOMS.ADD"], name
        assert not any(op.startswith("ATOM.E.ADD") for op in count), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_canonical_sum_is_not_contracted(built, architecture):
    """Sums by DADD, products by DMUL: 8 of the one stand unrolled beside the other."""
    for kind in ("dense_kernel", "indexed_kernel"):
        for name, count in of_kind(built(architecture)[1], kind):
            assert count["DADD"] >= 8, name
            assert count["DMUL"], name
