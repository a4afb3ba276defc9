"""Scores of an answer against the wanted one, from 0 to 1."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from grace_fast.tools.evaluate.task import Answer


def exact(answer: Answer, wanted: Answer) -> float:
    """Return 1 where the answer is the wanted one, spaces at its ends aside."""
    if isinstance(answer, str) and isinstance(wanted, str):
        return float(answer.strip() == wanted.strip())
    return float(answer == wanted)


def token_f1(answer: Answer, wanted: Answer) -> float:
    """Return the harmonic mean of precision and recall over words, as SQuAD counts them.

    Case, punctuation and articles do not count.
    """
    given, asked = _words(str(answer)), _words(str(wanted))
    shared = sum((Counter(given) & Counter(asked)).values())
    if not given or not asked:
        return float(given == asked)
    return 2 * shared / (len(given) + len(asked))


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


SCORES: dict[str, Callable[[Answer, Answer], float]] = {"exact": exact, "f1": token_f1}


def mean(scores: Sequence[float]) -> float:
    """Return the mean of scores, NaN of none."""
    return sum(scores) / len(scores) if scores else math.nan
