"""The law of GRACE, once, in plain torch: distances, look-up, the edit table, replacement.

A codebook row is a key k, a value v, a radius and a label. A query q asks one question (R64):

    S_i = sum over j of (q_j - k_ij)^2      in float64, j ascending, no fused multiply-add
    i*  = argmin S_i                        the lowest row among equal S
    hit = radius[i*] >= 0 and S[i*] <= radius[i*]^2

Every back end and every shortcut returns exactly this. The order of the sum is part of the law:
other orders round otherwise, and an edit whose radius equals a distance is then lost. These
functions are the documentation, the last fallback and the oracle of the tests; nothing in here has
state.

Source: Hartvigsen et al., "Aging with GRACE", NeurIPS 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Expand = Literal["coverage", "moving_average"]
Outcome = Literal["added", "split", "expanded", "reused", "replaced"]
Replacement = Literal["replace_all", "replace_last", "replace_prompt"]
Semantics = Literal["paper", "reference", "easyedit"]

# A split keeps the two balls apart by this much; the reference's constant.
SPLIT_GAP = 1e-5

# How far the same prompt's query moves between batch shapes and paddings, relative to an expanded
# radius: MiniLM layer 4, batch of 16 against single, needed 2e-6 (fp32) and 1.3e-2 (bf16). fp16 has
# three more mantissa bits than bf16 and takes an eighth of its margin.
EXPAND_MARGIN = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}

IGNORED_LABEL = -100
SCORES = -(2**63)  # the first id of a label of numbers; no token and no class has it

_CHUNK_ELEMENTS = 1 << 22  # of a [N, D] block of differences in float64: 32 MiB


def squared_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Return S for every query and key, in the canonical order.

    queries: [B, D], keys: [N, D], any floating dtype. Returns [B, N] float64.
    """
    wide_queries, wide_keys = queries.double(), keys.double()
    total = torch.zeros(len(queries), len(keys), dtype=torch.float64, device=queries.device)
    for query_column, key_column in zip(wide_queries.T, wide_keys.T, strict=True):
        difference = query_column[:, None] - key_column[None, :]
        total += difference * difference  # two roundings: the product is stored before it is added
    return total


def pair_squared_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Return S of queries [P, D] against keys [P, D], row by row: [P] float64 on the host."""
    difference = queries.cpu().double().numpy() - keys.cpu().double().numpy()
    squares = np.multiply(difference, difference, out=difference)
    # `accumulate` keeps every partial sum, so it cannot but add from the first to the last.
    sums = np.add.accumulate(squares, axis=1, out=squares)
    return torch.from_numpy(sums[:, -1].copy())


def nearest(queries: Tensor, keys: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest live row of each query and its S; (-1, inf) where there is none.

    queries: [B, D], keys: [N, D], live: [N] bool. Returns row [B] int64 and S [B] float64.
    A query with a NaN or an infinity is near to nothing.
    """
    if len(keys) == 0:
        return no_row(len(queries), queries.device)
    return lowest(squared_distances(queries, keys), live)


def nearest_of_one(query: Tensor, keys: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `nearest` does for one query [D], in far less time where keys [N, D] are many.

    A float64 pass in any order brackets every S; only keys inside that bracket of the smallest are
    summed again in the canonical order.
    """
    query, width = query.double(), keys.shape[1]
    step = max(1, _CHUNK_ELEMENTS // width)
    rough = torch.cat(
        [(query - part.double()).square().sum(dim=1) for part in torch.split(keys, step)]
    )
    rough = rough.masked_fill(~(live & rough.isfinite()), math.inf)
    # Each S, in either order, is within (D + 2) roundings of the exact sum.
    slack = 1 + 4 * (width + 2) * 2.0**-53
    candidates = (rough <= rough.amin() * slack).logical_and(rough.isfinite()).nonzero()[:, 0]
    if not len(candidates):
        return no_row(1, query.device)
    every = torch.ones_like(candidates, dtype=torch.bool)
    place, squared = nearest(query[None], keys[candidates], every)
    return candidates[place], squared


def lowest(squared: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return the argmin over the live rows of squared [B, N], the lowest row on a tie."""
    candidates = squared.masked_fill(~(live & squared.isfinite()), math.inf)
    best = candidates.amin(dim=1)
    row = (candidates == best[:, None]).int().argmax(dim=1)  # argmax: the first of equals
    return row.masked_fill(best.isinf(), -1), best


def no_row(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what `nearest` says of an empty codebook, for a batch of queries."""
    row = torch.full((batch,), -1, dtype=torch.int64, device=device)
    return row, torch.full((batch,), math.inf, dtype=torch.float64, device=device)


def in_ball(squared: Tensor, radius: Tensor) -> Tensor:
    """Tell whether S is inside a ball: inclusive, never with a negative radius (a dead key).

    The square of a float32 is exact in float64.
    """
    wide = radius.double()
    return (wide >= 0) & (squared <= wide * wide)


def replacement_mask(mode: Replacement, positions: Tensor, length: int) -> Tensor:
    """Tell which tokens a hit replaces, given each row's query position.

    positions: [B] int64, the query token t. Returns [B, T] bool: every token (`replace_all`), token
    t (`replace_last`), or the tokens before t (`replace_prompt`, which leaves t itself alone).
    """
    token = torch.arange(length, device=positions.device)[None, :]
    if mode == "replace_all":
        return (token >= 0).expand(len(positions), length)
    if mode == "replace_last":
        return token == positions[:, None]
    if mode == "replace_prompt":
        return token < positions[:, None]
    raise ValueError(f"replacement must be one of {get_args(Replacement)}, got {mode!r}")


def replace(output: Tensor, hit: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return output with the value written where the row hit and the mask is set.

    output: [B, T, V], hit: [B] bool, values: [B, V], mask: [B, T] bool.
    """
    where = (hit[:, None] & mask)[:, :, None]
    return torch.where(where, values.to(output.dtype)[:, None, :], output)


@dataclass(frozen=True)
class Rules:
    """How edits are decided: the epsilon of new keys and the variant of the edit table.

    `paper` is the native mode. `reference` reproduces the authors' code: labels match by their
    mean, expanded radii have no margin, and an exact repeat with a new label kills both keys.
    `easyedit` is `reference` with labels kept the other way round: see `label_row`.
    """

    epsilon: float  # radius of a new key, in the units of the layer's input
    expand: Expand = "coverage"
    margin: float = 0.0  # an expanded radius is distance * (1 + margin); paper only
    semantics: Semantics = "paper"
    max_radius: float = math.inf  # an edit whose ball would be wider is refused

    def __post_init__(self) -> None:
        if not self.max_radius > 0:
            raise ValueError(f"max_radius must be a number > 0, got {self.max_radius}")
        if not 0 < self.epsilon <= torch.finfo(torch.float32).max:  # as radii are
            raise ValueError(f"epsilon must be a positive number of float32, got {self.epsilon}")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"expand_margin must be a number >= 0, got {self.margin}")
        for name, choices in (("expand", Expand), ("semantics", Semantics)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}"
                )

    @property
    def repeat_distance(self) -> float:
        """The distance up to which a query is the stored query come again, jitter included."""
        return max(2 * SPLIT_GAP, self.margin * self.epsilon)


@dataclass(frozen=True)
class Decision:
    """What one edit does to the codebook before its value is trained."""

    outcome: Outcome
    radius: float  # of the row the edit lives on, afterwards
    nearest_radius: float | None = None  # of the nearest key, where a split shrinks it
    moves_key: bool = False  # the nearest key moves half-way to the query


def not_beyond(within: float, row: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
    """Return row [B] and S [B] with -1 and inf where S > within^2."""
    beyond = squared > within * within
    return row.masked_fill(beyond, -1), squared.masked_fill(beyond, math.inf)


def decide(rules: Rules, squared: float, radius: float, same_label: bool) -> Decision:
    """Return what an edit does, given its nearest key (the edit table of the paper, section 3.2).

    squared: S of the nearest key, inf where there is none; radius: that key's own radius.
    """
    distance = math.sqrt(squared)
    if distance > rules.epsilon + radius:
        return Decision("added", rules.epsilon)
    native = rules.semantics == "paper"
    if not same_label:
        if native and distance <= rules.repeat_distance:
            # A ball too small to cover the repeat (or a dead key) is opened just enough for it.
            opened = covering_radius(max(rules.repeat_distance**2, squared), 0.0)
            return Decision("replaced", max(radius, opened))
        return Decision("split", distance / 2, nearest_radius=distance / 2 - SPLIT_GAP)
    if radius >= 0 and squared <= radius * radius:
        return Decision("reused", radius)
    margin = rules.margin if native else 0.0
    return Decision(
        "expanded",
        covering_radius(squared, margin),
        moves_key=rules.expand == "moving_average",
    )


def covering_radius(squared: float, margin: float) -> float:
    """Return the least float32 that covers distance * (1 + margin), so that S itself is inside."""
    radius = torch.tensor(math.sqrt(squared) * (1 + margin), dtype=torch.float32, device="cpu")
    while radius.double().square() < squared:
        radius = torch.nextafter(radius, torch.tensor(math.inf, dtype=torch.float32, device="cpu"))
    return float(radius)


def label_ids(labels: Tensor, padding: int | None = None) -> Tensor:
    """Return the label ids that count, in order: without -100 and padding. Returns [L] int64."""
    flat = labels.detach().reshape(-1).to("cpu", torch.int64)
    kept = flat != IGNORED_LABEL
    if padding is not None:
        kept &= flat != padding
    return flat[kept]


def score_label(scores: Tensor) -> Tensor:
    """Return numbers as a label of ids: a mark, then the float64 bits of each. [1 + L] int64.

    They are kept as float32 has them, and -0 as 0: what is the same number is the same label.
    """
    kept = scores.detach().reshape(-1).to("cpu", torch.float32).double() + 0.0
    mark = torch.tensor([SCORES], dtype=torch.int64, device="cpu")
    return torch.cat([mark, kept.view(torch.int64)])


def scores_of(label: Tensor) -> Tensor | None:
    """Return the numbers that a label is of, [L] float64; None where it is of ids."""
    if label.dtype != torch.int64 or label.ndim != 1 or not len(label) or int(label[0]) != SCORES:
        return None
    return label[1:].contiguous().view(torch.float64)


def same_label(rules: Rules, one: Tensor, other: Tensor) -> bool:
    """Tell whether two stored labels call for the same answer.

    `paper` compares ids, and numbers one by one; the others compare means, as the authors' code
    does ([1, 9] equals [4, 6]).
    """
    if rules.semantics == "paper":
        return torch.equal(one, other)
    return label_mean(one) == label_mean(other)


def label_mean(label: Tensor) -> float:
    """Return the mean of a label's ids or numbers, in float32; NaN of none."""
    scores = scores_of(label)
    return float((label if scores is None else scores).float().mean())


def label_row(rules: Rules, row: int, rows: int) -> int:
    """Return whose label is compared where a row of `rows` is nearest.

    EasyEdit puts a new label in front of the others and a new key behind them, so that it compares
    with the label of the row as far from the other end.
    """
    return rows - 1 - row if rules.semantics == "easyedit" else row
