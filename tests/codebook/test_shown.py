"""Text that came from elsewhere is shown as it is, and nothing in it is carried out."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_fast.codebook import printable


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plain [/INST] \\x1b", "plain [/INST] \\x1b"),
        ("\x00\x07\x1b[2J\x7f\x85\x9b", r"\x00\x07\x1b[2J\x7f\x85\x9b"),
        ("two\r\n\tlines", r"two\r\n\tlines"),
        ("\u202eabc\u2066d\u200e\u200f\u061c", r"\u202eabc\u2066d\u200e\u200f\u061c"),
        ("a\u200bb\ufeff\u2060\u00ad", r"a\u200bb\ufeff\u2060\xad"),
        ("line\u2028par\u2029", r"line\u2028par\u2029"),
        ("lone \ud800 and \udfff", r"lone \ud800 and \udfff"),
        ("\U000e0041\U000e0001\U000e0fff", r"\U000e0041\U000e0001\U000e0fff"),
        ("a\u3164b\u115f\u034f", r"a\u3164b\u115f\u034f"),
        ("pay\u200dpal\u200c", r"pay\u200dpal\u200c"),
        ("x\ufe00\ufe01\U000e0100", "x\ufe00\\ufe01\\U000e0100"),
        ("\u6cd5\u56fd \u05e9\u05dc\u05d5\u05dd", "\u6cd5\u56fd \u05e9\u05dc\u05d5\u05dd"),
        ("\U0001f469\u200d\U0001f52c", "\U0001f469\u200d\U0001f52c"),
        ("\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f3f3\ufe0f\u200d\U0001f308"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),
        ("\u0915\u094d\u200d\u0937", None),
        (3.5, "3.5"),
    ],
    ids=lambda text: ascii(text)[:24],
)
def test_what_hides_moves_or_reorders_is_spelt_out_and_nothing_else(text, said):
    assert printable.spelt(text) == (text if said is None else said)


@given(st.text(st.characters(), max_size=60))
def test_no_text_has_a_control_left_in_it(text):
    line = printable.spelt(text)
    line.encode()
    assert len(line.splitlines()) <= 1
    joiners = "\u200c\u200d"
    kinds = {unicodedata.category(one) for one in line if one not in joiners}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(st.text(st.characters(), max_size=60), st.sampled_from(["ascii", "latin-1", "cp437", "no"]))
def test_any_text_can_be_written_to_any_stream(text, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii" if encoding == "no" else encoding)
    stream.write(printable.fit(text, stream))
    stream.flush()

    class Odd:
        encoding = "no-such-encoding"

    assert printable.fit(text, Odd()).isascii()


def test_line_ends_stay_where_they_are_wanted():
    assert printable.spelt("a\n\x1bb", keep="\n") == "a\n\\x1bb"
    assert printable.listed(range(30), 3) == "0, 1, 2 and 27 more"


def test_a_label_of_a_plot_is_no_formula_and_is_shown():
    assert printable.for_plot("_a $x$ \x1b") == r" _a \$x\$ \x1b"
