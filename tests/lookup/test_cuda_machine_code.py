"""The GPU look-up as nvcc compiles it: what speed and law rest on is in the machine code."""

import pytest
import sass
from cuda_build import compiled, instructions

# 512 threads share the 65 536 registers of a multiprocessor.
REGISTERS = 128
# setup.py's list; 90a is where speed is measured. A minute's compilation is enough for each day.
ARCHITECTURES = (
    "80",
    "90a",
    *(pytest.param(other, marks=pytest.mark.slow) for other in ("89", "100", "120")),
)


def counts(architecture):
    return instructions(compiled(architecture)[1])


def kernels(kind, architecture="90a"):
    found = [k for name, k in sass.kernels(compiled(architecture)[1]).items() if kind in name]
    assert found
    return found


def of_kind(counted, kind):
    found = {name: count for name, count in counted.items() if kind in name}
    assert found
    return found.items()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits_its_registers(architecture):
    used, _ = compiled(architecture)
    assert len(used) == 3 * 3 + 3 + 1  # dense by dtype and queries, by codes by dtype, and encode
    for name, use in used.items():
        assert use["registers"] <= REGISTERS, name
        if architecture == "90a":
            assert use["spills"] == 0, name


def test_the_scan_takes_two_instructions_for_four_code_bytes():
    for name, count in of_kind(counts("90a"), "indexed_kernel"):
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


def test_a_leaf_that_holds_nothing_takes_few_instructions_a_query():
    """16 of them compare 64 codes; 4 leaves share what is once a query."""
    for kernel in kernels("indexed_kernel"):
        scans = []
        for loop in kernel.innermost():
            names = [kernel.code[place].name for place in sass.stretch(loop)]
            if names.count("VABSDIFF4.U8") == 4 * 8:
                scans.append(names)
                assert not any(op.startswith(("LDL", "STL")) for op in names), kernel.name
        assert scans, kernel.name
        assert min(len(names) for names in scans) <= 4 * 28, kernel.name


def test_four_leaves_are_in_flight_before_the_first_is_compared():
    for kernel in kernels("indexed_kernel"):
        runs = runs_without(kernel.code, "VABSDIFF4")
        # Once for leaves that are listed, once for leaves in order.
        assert sum(wide_loads(names) >= 4 * 2 for names in runs) >= 2, kernel.name


def test_encode_asks_for_two_groups_of_elements_before_it_multiplies():
    for kernel in kernels("encode_kernel"):
        # Of each: the query, four rows of the projection, and the centre as float32.
        runs = runs_without(kernel.code, "FFMA")
        assert max(wide_loads(names) for names in runs) >= 2 * (1 + 4 + 2), kernel.name
        widest = max(runs, key=wide_loads)
        at_odd_addresses = sum(op.startswith("LDG.E.U16") for op in widest)
        assert at_odd_addresses <= 2 * 8, kernel.name


def test_boxes_are_tested_two_slots_at_a_time():
    for name, count in of_kind(counts("90a"), "indexed_kernel"):
        assert count["VIADDMNMX.S16x2.RELU"] >= 8, name  # 16 slots
        assert count["IDP.4A.U8.U8"] >= 4, name


@pytest.mark.parametrize("kind", ["dense_kernel", "indexed_kernel", "encode_kernel"])
def test_memory_is_read_16_bytes_at_a_time(kind):
    for name, count in of_kind(counts("90a"), kind):
        assert any(op.startswith("LDG.E") and ".128" in op for op in count), name
        if kind != "encode_kernel":  # queries, or codes of them
            assert count["LDS.128"], name


def test_what_is_counted_in_shared_memory_is_known_to_be_there():
    for name, count in of_kind(counts("90a"), "indexed_kernel"):
        assert count["ATOMS.ADD"], name
        assert not any(op.startswith("ATOM.E.ADD") for op in count), name


def test_what_blocks_tell_each_other_takes_no_order_of_the_whole_device():
    """A ticket is one atomic that releases before and acquires after it; so are the fences."""
    for kind in ("dense_kernel", "indexed_kernel", "encode_kernel"):
        for name, count in of_kind(counts("90a"), kind):
            fences = {op for op in count if op.startswith("MEMBAR")}
            assert fences == {"MEMBAR.ALL.GPU"}, name
            assert count["ATOMG.E.INC.STRONG.GPU"], name
            assert count["CCTL.IVALL"], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_of_the_dense_look_up_are_copied_ahead(architecture):
    """Four pieces a lane and stage, for few rows and for many, before the loop and in it."""
    for name, count in of_kind(counts(architecture), "dense_kernel"):
        copies = sum(n for op, n in count.items() if op.startswith("LDGSTS.E.BYPASS.128"))
        assert copies == 2 * 2 * 4, name
        assert count["LDGDEPBAR"] == 2 * 2, name
        assert count["DEPBAR.LE"] >= 2, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_canonical_sum_is_not_contracted(architecture):
    """Sums by DADD, products by DMUL: 8 of the one stand unrolled beside the other."""
    for kind in ("dense_kernel", "indexed_kernel"):
        for name, count in of_kind(counts(architecture), kind):
            assert count["DADD"] >= 8, name
            assert count["DMUL"], name


def test_the_second_node_waits_before_it_reads_what_the_first_wrote():
    for kernel in kernels("indexed_kernel"):
        (wait,) = kernel.places("ACQBULK")
        assert kernel.code[wait].always, kernel.name
        fresh = kernel.places(r"LDG?\..*STRONG\.GPU")
        assert fresh, kernel.name
        for place in (*fresh, *kernel.places("LD", "take_queries"), *kernel.places("ATOM")):
            assert wait < place, (kernel.name, kernel.code[place])
        # What does not depend on it is asked for before.
        assert min(kernel.places("UBLKPF")) < wait, kernel.name


def test_the_first_node_lets_the_second_start_before_it_works():
    for kernel in kernels("encode_kernel"):
        (let,) = kernel.places("PREEXIT")
        assert kernel.code[let].always, kernel.name
        assert let < min(kernel.places("BAR")), kernel.name
        assert all(let < min(loop) for loop in kernel.loops()), kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["dense_kernel", "indexed_kernel", "encode_kernel"])
def test_a_ticket_releases_what_was_written_and_acquires_what_is_read(kind, architecture):
    for kernel in kernels(kind, architecture):
        tickets = kernel.places(r"ATOM.*INC")
        assert tickets
        for ticket in tickets:
            before, after = range(ticket - 16, ticket), range(ticket + 1, ticket + 24)
            assert kernel.count(r"MEMBAR.*GPU", before), kernel.name
            assert kernel.count("CCTL.IVALL", after), kernel.name


# A query's elements are loaded by these; `at` takes 16 bytes where they lie so.
OF_QUERIES = ("element", "bits_at", "at")


@pytest.mark.parametrize("kind", ["dense_kernel", "encode_kernel"])
def test_queries_that_lie_at_16_bytes_are_read_in_loops_without_smaller_loads(kind):
    """One loop for each type of queries."""
    for kernel in kernels(kind):
        loads = {place for name in OF_QUERIES for place in kernel.places("LDG", name)}
        small = [place for place in loads if "128" not in kernel.code[place].name]
        loops = kernel.loops(without=small)
        assert sum(len(loads & loop) >= 2 for loop in loops) >= 3, kernel.name
