"""The GPU look-up as nvcc compiles it: what speed and law rest on is in the machine code."""

import pytest
from cuda_build import compiled, innermost_loops, instructions, listing

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
            code = listing(cubin)
            made[architecture] = used, instructions(code), code
        return made[architecture]

    return of


def of_kind(counted, kind):
    found = {name: count for name, count in counted.items() if kind in name}
    assert found
    return found.items()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits_its_registers(built, architecture):
    used, _, _ = built(architecture)
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


def runs_without(code, kind):
    """Return the names of instructions between those of a kind, in lists."""
    runs = [[]]
    for each in code:
        if each.name.startswith(kind):
            runs.append([])
        else:
            runs[-1].append(each.name)
    return runs


def wide_loads(names):
    return sum(name.startswith("LDG.E.128") for name in names)


def test_a_leaf_that_holds_nothing_takes_few_instructions_a_query(built):
    """16 of them compare 64 codes; 4 leaves share what is once a query. Rare paths are counted."""
    for name, code in of_kind(built("90a")[2], "indexed_kernel"):
        scans = []
        for loop in innermost_loops(code):
            names = [each.name for each in loop]
            if names.count("VABSDIFF4.U8") == 4 * 8:
                scans.append(names)
                assert not any(op.startswith(("LDL", "STL")) for op in names), name
        assert scans, name
        assert min(len(names) for names in scans) <= 4 * 28, name


def test_four_leaves_are_in_flight_before_the_first_is_compared(built):
    for name, code in of_kind(built("90a")[2], "indexed_kernel"):
        runs = runs_without(code, "VABSDIFF4")
        assert sum(wide_loads(names) >= 4 * 2 for names in runs) >= 2, name  # listed, and in order


def test_encode_asks_for_two_groups_of_elements_before_it_multiplies(built):
    for name, code in of_kind(built("90a")[2], "encode_kernel"):
        # Of each: the query, four rows of the projection, and the centre as float32.
        runs = runs_without(code, "FFMA")
        assert max(wide_loads(names) for names in runs) >= 2 * (1 + 4 + 2), name
        widest = max(runs, key=wide_loads)
        assert sum(op.startswith("LDG.E.U16") for op in widest) <= 2 * 8, name  # odd addresses


def test_what_the_kernel_before_has_written_is_waited_for(built):
    for name, code in of_kind(built("90a")[2], "indexed_kernel"):
        names = [each.name for each in code]
        assert names.index("ACQBULK") < names.index("LDG.E.STRONG.GPU"), name
        # What does not depend on it is asked for before.
        assert any(op.startswith("UBLKPF") for op in names[: names.index("ACQBULK")]), name
    for name, count in of_kind(built("90a")[1], "encode_kernel"):
        assert count["PREEXIT"] == 1, name


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


def test_a_ticket_is_one_atomic_with_one_fence(built):
    """A release before it, an acquire after it; none waits for all of the device's order."""
    for kind in ("dense_kernel", "indexed_kernel", "encode_kernel"):
        for name, count in of_kind(built("90a")[1], kind):
            fences = {op: n for op, n in count.items() if op.startswith("MEMBAR")}
            assert fences == {"MEMBAR.ALL.GPU": 1}, name
            assert count["ATOMG.E.INC.STRONG.GPU"] == 1, name
            assert count["CCTL.IVALL"] == 1, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_canonical_sum_is_not_contracted(built, architecture):
    """Sums by DADD, products by DMUL: 8 of the one stand unrolled beside the other."""
    for kind in ("dense_kernel", "indexed_kernel"):
        for name, count in of_kind(built(architecture)[1], kind):
            assert count["DADD"] >= 8, name
            assert count["DMUL"], name
