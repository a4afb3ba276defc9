"""Where each row of the catalogue of faults is tested; what is named here is there.

A row is a fault and what has to hold in spite of it. It is covered by tests, by make targets that
CI runs, or by a benchmark whose gate fails; `NOT_HERE` says what takes another machine.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

CATALOGUE: dict[str, tuple[str, tuple[str, ...]]] = {
    "D1": (
        "torn writes and lost power: the state after some of the edits, all acknowledged ones",
        (
            "test_durability.py::"
            "test_after_every_prefix_of_its_file_calls_a_run_is_as_after_some_of_its_edits",
            "test_journal.py::test_what_was_edited_is_there_again_bit_for_bit_after_every_version",
        ),
    ),
    "D2": (
        "a process that is killed keeps what it acknowledged",
        (
            "test_durability.py::test_a_killed_process_keeps_what_it_acknowledged",
            "test_durability.py::test_two_hundred_kills_lose_nothing_that_was_acknowledged",
            "test_durability.py::"
            "test_a_process_that_ends_at_any_file_call_keeps_what_it_acknowledged",
        ),
    ),
    "D3": (
        "a full disk refuses an edit, and nothing else is lost",
        (
            "test_editor.py::test_every_edit_is_on_the_disk_before_the_call_returns",
            "test_disk_faults.py::"
            "test_a_disk_that_refuses_any_call_loses_nothing_and_publishes_nothing",
            "test_disk_faults.py::test_a_directory_of_which_any_call_fails_loses_nothing",
            "test_disk_faults.py::"
            "test_files_that_may_not_grow_are_written_in_part_and_lose_nothing",
            "test_disk_faults.py::"
            "test_a_journal_of_so_many_pages_refuses_what_is_too_much_and_goes_on",
        ),
    ),
    "D4": (
        "a disk that fails makes the store read-only; nothing is acknowledged falsely",
        (
            "test_journal.py::"
            "test_a_failing_disk_makes_the_store_read_only_and_nothing_is_published",
            "test_disk_faults.py::test_no_fsync_that_fails_is_acknowledged_even_if_power_is_lost",
            "test_disk_faults.py::test_a_file_is_on_the_disk_before_its_name_"
            "and_its_name_before_the_call_returns",
        ),
    ),
    "D5": (
        "a crash at any step of a compaction leaves one whole codebook",
        (
            "test_durability.py::test_compaction_leaves_one_whole_codebook_wherever_it_stops",
            "test_journal.py::test_a_crash_at_any_step_of_a_compaction_leaves_the_codebook",
        ),
    ),
    "D6": (
        "directories of every format open for ever, a newer one is refused",
        ("test_formats.py::*",),
    ),
    "D7": (
        "one writer; the lock of a dead process is no lock",
        (
            "test_journal.py::test_a_second_editor_is_refused_until_the_first_is_unloaded",
            "test_journal.py::test_the_lock_of_a_process_that_died_is_no_lock",
        ),
    ),
    "S1": (
        "whatever is done in whatever order, the codebook is what a model in numpy is",
        (
            "test_stateful.py::test_whatever_is_done_to_a_durable_codebook_it_is_what_its_model_is",
            "test_stateful.py::test_many_long_runs_leave_a_durable_codebook_as_its_model",
        ),
    ),
    "F1": (
        "no flipped bit of a file or of the journal is silent",
        (
            "test_hostile_files.py::test_no_flipped_bit_is_silent",
            "test_hostile_files.py::test_no_flipped_bit_of_a_journal_is_silent",
            "test_journal.py::test_a_row_of_the_journal_that_was_changed_or_lost_is_seen",
        ),
    ),
    "F2": (
        "headers made to harm are refused before anything is allocated",
        ("test_hostile_files.py::*",),
    ),
    "F3": (
        "contents that are not finite, too wide or out of place are named, or dropped and listed",
        ("test_hostile_contents.py::*", "test_repair.py::*"),
    ),
    "F4": (
        "whatever bytes a reader is given: it refuses them in words, or what it gives serves",
        (
            "test_fuzz_corpus.py::*",
            "test_hostile_contents.py::"
            "test_drawn_columns_are_refused_or_make_a_codebook_that_serves",
            "test_hostile_contents.py::"
            "test_drawn_versions_of_a_journal_are_refused_or_make_a_codebook_that_serves",
            "make fuzz",
        ),
    ),
    "N1": (
        "NaN, infinite, huge, denormal and zero queries: misses, other rows unaffected",
        (
            "test_odd_queries.py::test_an_odd_query_is_decided_by_the_law_and_changes_no_other",
            "test_odd_queries.py::test_a_key_with_such_numbers_is_found_by_its_own_query",
            "test_odd_queries.py::test_in_a_model_an_odd_row_misses_bit_for_bit_and_the_others_hit",
            "test_editor.py::test_a_nan_query_is_a_miss_and_leaves_the_other_rows_alone",
            "test_lookup.py::test_every_back_end_decides_every_case_by_the_law",
            "test_lookup.py::test_a_row_that_misses_keeps_every_bit_beside_one_that_hits",
        ),
    ),
    "N2": (
        "duplicates, a distance equal to the radius, cancellation at norm 1e3 to 1e6",
        (
            "test_odd_queries.py::test_keys_that_differ_by_their_last_bits_far_from_the_origin",
            "test_lookup.py::test_every_back_end_decides_every_case_by_the_law",
            "test_lookup.py::test_drawn_codebooks_are_decided_by_the_law",
            "test_cuda_on_host.py::test_ties_that_float32_does_not_see",
        ),
    ),
    "N3": (
        "more than 2^31 elements: the last row is found",
        (
            "test_odd_queries.py::test_the_last_row_of_more_than_2_31_elements_is_found",
            "test_certified.py::test_offsets_past_2_31_are_right",
            "test_out_of_core.py::test_rows_past_what_an_int32_counts_are_read_as_they_are",
        ),
    ),
    "N4": (
        "no more memory: MemoryError, the old version still answers, nothing is lost",
        (
            "test_out_of_memory.py::"
            "test_where_memory_ends_the_old_version_still_answers_and_is_found_again",
        ),
    ),
    "C1": (
        "eight readers beside an editor: no mixed read",
        (
            "test_large_benchmarks.py::"
            "test_eight_readers_beside_an_editor_read_nothing_mixed_and_lose_no_row",
            "test_large_benchmarks.py::test_a_mixed_read_and_a_lost_row_are_seen",
            "test_codebook.py::test_readers_never_see_half_an_edit",
            "test_concurrency.py::"
            "test_who_asks_while_a_value_is_trained_gets_what_is_published_and_never_that_value",
            "test_concurrency.py::test_an_edit_that_another_changes_is_decided_and_trained_anew",
            "test_concurrency.py::test_four_threads_edit_one_codebook",
            "make bench-readers",
        ),
    ),
    "C2": (
        "invalid accesses, undefined steps and data races of the C++: none",
        ("make sanitize", "make tsan"),
    ),
    "E1": (
        "the recorded decisions of the reference",
        ("test_golden.py::*", "test_compat_reference.py::*", "test_compat_easyedit.py::*"),
    ),
    "E2": (
        "attach and detach leave the model, a look-up leaves the codebook bit for bit",
        (
            "test_purity.py::test_attach_edit_and_unload_leave_state_hooks_and_outputs_as_they_were",
            "test_purity.py::test_a_look_up_changes_no_byte_of_the_codebook",
            "test_purity.py::test_forward_calls_and_generate_change_no_byte_of_an_editors_codebook",
            "test_lookup.py::test_a_look_up_writes_nothing_and_draws_nothing",
            "test_faiss.py::test_a_look_up_in_an_index_writes_nothing_and_draws_nothing",
        ),
    ),
}

NOT_HERE = {"C3": "compute-sanitizer takes a GPU: make gpu"}
CITED = [(row, place) for row, (_, places) in CATALOGUE.items() for place in places]


def functions_of(path):
    tree = ast.parse(path.read_text())
    return {part.name for part in tree.body if isinstance(part, ast.FunctionDef)}


@pytest.mark.parametrize(("row", "place"), CITED, ids=[f"{row}: {place}" for row, place in CITED])
def test_a_row_of_the_catalogue_is_tested_where_it_says(row, place):
    if place.startswith("make "):
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert place.removeprefix("make ") in targets
        return
    file, name = place.split("::")
    tests = {one for one in functions_of(TESTS / file) if one.startswith("test_")}
    assert tests if name == "*" else name in tests


def test_what_ci_has_to_run_of_it_ci_runs():
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make test", "make slow", "make fuzz", "make sanitize", "make tsan"} <= set(steps)


def test_a_row_is_covered_or_says_what_it_takes():
    assert not set(CATALOGUE) & set(NOT_HERE)
    assert all(places for _, places in CATALOGUE.values())
