"""Epsilon and layer from measured distances, on a sample of edits and of inputs to leave alone.

A decision depends on distances and labels alone, so the distances of a layer are measured once and
every epsilon is tried on them: the edits of the sample go through the edit table (`semantics`), and
then each edit, paraphrase and unrelated input is looked up.

    usable: TRR >= 1 - budget, and ERR + TRR within 1 % of the best of these
    chosen: of the usable, the one that generalises most

Distances do not say whether a value at a layer can be trained to give an answer. Where that was
tried, layers at which too few edits were learnt are left out.

Of several that generalise alike the middle one is taken: it is farthest from the ends, where balls
hold no paraphrase or swallow their neighbours. A sample with as many edits as are to come says how
crowded the codebook will be; a smaller one is too kind to large epsilons, so where it holds less
than a third of them the smallest is taken. How sure the choice is
comes from a bootstrap over what the inputs are about. Without a sample of edits there is a rule of
thumb, `epsilon_from`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_fast import semantics
from grace_fast.semantics import Rules

# Half the distance of the closest 5 % of unrelated pairs: balls of such a radius rarely touch.
CLOSE_QUANTILE = 0.05
CALIBRATION_INPUTS = 8  # fewer say nothing of a quantile

BUDGET = 0.01  # of unrelated inputs that may be disturbed
USABLE = 0.01  # what of ERR + TRR may be given up to generalise
ALIKE = 0.005  # generality that differs by less is alike
NEAR_BEST = 0.02
CROWDED = 3  # times as many edits to come as in the sample
LEARNABLE = 0.75  # of the edits that were tried at a layer
RESAMPLES = 500
GRID = 24
CHUNK = 256  # queries whose differences to every key are held at once

Truths = NDArray[np.bool_]


@dataclass(frozen=True)
class CalibrationEdit:
    """An edit of the kind that is to come, for `attach(epsilon="auto", calibration_edits=...)`."""

    prompt: str
    target: str | int
    paraphrases: Sequence[str] = ()  # other prompts that should get the target


@dataclass(frozen=True)
class Labelled:
    """Queries of one layer with what they should be answered and what they are about."""

    queries: Tensor  # [M, D]
    labels: Sequence[Hashable]  # equal where one answer is right for both; None: unknown
    about: Sequence[Hashable]  # inputs about one thing are drawn together by the bootstrap

    def __post_init__(self) -> None:
        if not len(self.queries) == len(self.labels) == len(self.about):
            raise ValueError(
                "every query needs a label and what it is about, got "
                f"{len(self.queries)}, {len(self.labels)} and {len(self.about)}"
            )


@dataclass(frozen=True)
class Distances:
    """How far the inputs of a sample are from its edits at one layer, measured once."""

    layer: str
    edits: Labelled
    paraphrases: Labelled
    unrelated: Labelled
    to_edits: NDArray[np.float64]  # [edits + paraphrases + unrelated, edits], squared


@dataclass(frozen=True)
class Trial:
    """What one epsilon does at one layer, input by input."""

    layer: str
    epsilon: float
    keys: int
    retained: Truths  # [edits], the edit's prompt gets its newest answer
    general: Truths  # [paraphrases]
    undisturbed: Truths  # [unrelated], missed, or hit a key with the right answer

    @property
    def err(self) -> float:
        """The share of edits retained."""
        return float(self.retained.mean())

    @property
    def generality(self) -> float:
        """The share of paraphrases that get the answer of their edit; NaN without any."""
        return float(self.general.mean()) if len(self.general) else math.nan

    @property
    def trr(self) -> float:
        """The share of unrelated inputs left as they were; NaN without any."""
        return float(self.undisturbed.mean()) if len(self.undisturbed) else math.nan


@dataclass(frozen=True)
class Recommendation:
    """The layer and epsilon to attach with, and how sure that is."""

    layer: str
    epsilon: float
    within_budget: bool  # False: no epsilon leaves enough unrelated inputs alone; the gentlest
    err: float
    generality: float
    trr: float
    intervals: dict[str, tuple[float, float]]  # 95 %, of epsilon, ERR, generality and TRR
    near_best: float  # the share of resamples in which its ERR + TRR is within 2 % of their best
    trials: tuple[Trial, ...]
    learnt: Mapping[str, float] = field(default_factory=dict)  # the share by layer, where tried

    @property
    def learnable(self) -> bool:
        """Whether edits can be learnt at the layer, as far as that was tried."""
        return self.learnt.get(self.layer, 1.0) >= LEARNABLE


def measure(layer: str, edits: Labelled, paraphrases: Labelled, unrelated: Labelled) -> Distances:
    """Measure every distance of a sample at one layer, in float64.

    Raises: ValueError for a sample without edits, or one that is not finite.
    """
    if not len(edits.queries):
        raise ValueError("calibration needs at least one edit in its sample, got none")
    keys = edits.queries.double().cpu()
    parts = [part.queries.double().cpu() for part in (edits, paraphrases, unrelated) if part.labels]
    asked = torch.cat(parts)
    if not asked.isfinite().all():
        raise ValueError(f"the queries at {layer} must be finite, got NaN or infinity")
    squared = torch.cat([_apart(chunk, keys) ** 2 for chunk in torch.split(asked, CHUNK)])
    return Distances(layer, edits, paraphrases, unrelated, squared.numpy())


def _apart(queries: Tensor, keys: Tensor) -> Tensor:
    # The matmul formula loses small distances.
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")


def grid(distances: Distances, steps: int = GRID) -> list[float]:
    """Return epsilons to try: geometric, from a repeat's jitter to half of the sample in one ball.

    Raises: ValueError where the layer sees one query only.
    """
    apart = np.sqrt(distances.to_edits)
    positive = apart[apart > 0]
    if not positive.size:
        raise ValueError(
            f"the sample asks {distances.layer} with one query only, so no epsilon can tell its "
            "inputs apart; calibrate another layer"
        )
    high = float(np.median(positive))
    low = max(float(np.quantile(positive, 0.001)) / 4, high / 1000)
    return [float(f"{value:.3g}") for value in np.geomspace(low, high, steps)]


def attempt(distances: Distances, rules: Rules) -> Trial:
    """Put the edits of a sample through the edit table with one epsilon and look everything up.

    Keys stay where they are: under `expand="moving_average"` this is an approximation.
    """
    count = len(distances.edits.labels)
    labels = list(distances.edits.labels)
    keys: list[int] = []  # edits that became keys
    radii: list[float] = []
    answers: list[Hashable] = []
    for at in range(count):
        if keys:
            squared = distances.to_edits[at, keys]
            near = int(squared.argmin())  # the lowest row on a tie
            decision = semantics.decide(
                rules, float(squared[near]), radii[near], answers[near] == labels[at]
            )
        else:
            decision, near = semantics.decide(rules, math.inf, 0.0, False), 0
        if decision.outcome in ("added", "split"):
            if decision.nearest_radius is not None:
                radii[near] = decision.nearest_radius
            keys.append(at)
            radii.append(decision.radius)
            answers.append(labels[at])
        else:
            radii[near], answers[near] = decision.radius, labels[at]
    return _look_up(distances, rules.epsilon, keys, np.array(radii), answers)


def _look_up(
    distances: Distances,
    epsilon: float,
    keys: Sequence[int],
    radii: NDArray[np.float64],
    answers: Sequence[Hashable],
) -> Trial:
    squared = distances.to_edits[:, list(keys)]
    near = squared.argmin(axis=1)
    radius = radii[near]
    hit = (radius >= 0) & (squared[np.arange(len(squared)), near] <= radius * radius)
    groups = (distances.edits, distances.paraphrases, distances.unrelated)
    wanted = [label for group in groups for label in group.labels]
    alike = np.array([answers[row] == label for row, label in zip(near, wanted, strict=True)])
    edits, paraphrases = len(groups[0].labels), len(groups[1].labels)
    split = (edits, edits + paraphrases)
    right = (hit & alike)[: split[1]]
    return Trial(
        distances.layer,
        epsilon,
        len(keys),
        retained=right[: split[0]],
        general=right[split[0] :],
        undisturbed=(~hit | alike)[split[1] :],
    )


def recommend(
    measured: Sequence[Distances],
    rules: Rules,
    epsilons: Sequence[float] | None = None,
    budget: float = BUDGET,
    seed: int = 0,
    learnt: Mapping[str, float] | None = None,
    expected: int = 0,
) -> Recommendation:
    """Try every epsilon at every layer and return the best within a budget.

    measured: one a layer, of the same sample; rules: how edits are decided, but for their epsilon;
    epsilons: those to try, by default a grid over the distances of each layer; budget: the share of
    unrelated inputs that may be disturbed; learnt: by layer, the share of edits that could be
    trained there. Layers below `LEARNABLE` are left out, unless all are: `learnable` says so;
    expected: edits to come, 0 for about as many as in the sample.

    Raises: ValueError where nothing was measured or the budget is not a share.
    """
    if not measured:
        raise ValueError("calibration needs at least one layer, got none")
    if not 0 <= budget <= 1:
        raise ValueError(f"the locality budget must be a share in [0, 1], got {budget}")
    learnt = dict(learnt or {})
    layers = {distances.layer for distances in measured}
    able = {layer for layer in layers if learnt.get(layer, 1.0) >= LEARNABLE} or layers
    every = [
        attempt(distances, replace(rules, epsilon=epsilon))
        for distances in measured
        for epsilon in (grid(distances) if epsilons is None else epsilons)
    ]
    trials = [trial for trial in every if trial.layer in able]
    measures = np.array([[trial.err, trial.generality, trial.trr] for trial in trials])
    smallest = expected > CROWDED * len(measured[0].edits.labels)
    chosen = _choose(trials, measures, budget, smallest)
    drawn = _resampled(measured[0], trials, seed)  # [RESAMPLES, trials, 3]
    picks = np.array([trials[_choose(trials, one, budget, smallest)].epsilon for one in drawn])
    kept = drawn[:, :, 0] + np.nan_to_num(drawn[:, :, 2], nan=1.0)
    best = trials[chosen]
    names = ("ERR", "generality", "TRR")
    intervals = {name: _interval(drawn[:, chosen, at]) for at, name in enumerate(names)}
    return Recommendation(
        layer=best.layer,
        epsilon=best.epsilon,
        within_budget=not best.trr < 1 - budget,
        err=best.err,
        generality=best.generality,
        trr=best.trr,
        intervals={"epsilon": _interval(picks), **intervals},
        near_best=float((kept[:, chosen] >= (1 - NEAR_BEST) * kept.max(axis=1)).mean()),
        trials=tuple(every),
        learnt=learnt,
    )


def _choose(
    trials: Sequence[Trial], measures: NDArray[np.float64], budget: float, smallest: bool
) -> int:
    """Return the trial to recommend, given ERR, generality and TRR of each, [trials, 3].

    smallest: take the smallest epsilon of those that generalise alike, not the middle one.

    What was not measured (NaN) counts alike for all.
    """
    err, generality, trr = measures.T
    trr, generality = np.nan_to_num(trr, nan=1.0), np.nan_to_num(generality, nan=0.0)
    allowed = trr >= 1 - budget
    if not allowed.any():
        allowed = trr == trr.max()
    kept = np.where(allowed, err + trr, -math.inf)
    usable = kept >= (1 - USABLE) * kept.max()
    general = np.where(usable, generality, -math.inf)
    best = int(general.argmax())
    if smallest:
        return best
    last = best
    while (
        last + 1 < len(trials)
        and trials[last + 1].layer == trials[best].layer
        and general[last + 1] >= general[best] - ALIKE
    ):
        last += 1
    return (best + last) // 2


def _resampled(distances: Distances, trials: Sequence[Trial], seed: int) -> NDArray[np.float64]:
    """Return ERR, generality and TRR of every trial in resamples of the things asked about.

    Edits and paraphrases about one thing are drawn together. Returns [RESAMPLES, trials, 3].
    """
    dealer = np.random.default_rng(seed)
    edited = _draws(distances.edits.about, dealer)
    unrelated = _draws(distances.unrelated.about, dealer)
    parts = (
        _means([trial.retained for trial in trials], distances.edits.about, edited),
        _means([trial.general for trial in trials], distances.paraphrases.about, edited),
        _means([trial.undisturbed for trial in trials], distances.unrelated.about, unrelated),
    )
    return np.stack(parts, axis=2)


def _draws(
    about: Sequence[Hashable], dealer: np.random.Generator
) -> dict[Hashable, NDArray[np.int64]]:
    """Return how often each thing is drawn in every resample, [RESAMPLES] each."""
    things = list(dict.fromkeys(about))
    if not things:
        return {}
    counts = dealer.multinomial(len(things), [1 / len(things)] * len(things), size=RESAMPLES)
    return {thing: counts[:, at] for at, thing in enumerate(things)}


def _means(
    truths: Sequence[Truths],
    about: Sequence[Hashable],
    drawn: dict[Hashable, NDArray[np.int64]],
) -> NDArray[np.float64]:
    """Return the share of truths in every resample, [RESAMPLES, trials]; NaN of none."""
    if not about:
        return np.full((RESAMPLES, len(truths)), math.nan)
    nothing = np.zeros(RESAMPLES, dtype=np.int64)
    weights = np.stack([drawn.get(thing, nothing) for thing in about], axis=1).astype(np.float64)
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = weights @ np.stack(truths, axis=1) / total
    return shares


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def require_enough(unrelated: int) -> None:
    """Raise ValueError for fewer than 8 unrelated inputs."""
    if unrelated < CALIBRATION_INPUTS:
        raise ValueError(
            f'epsilon="auto" needs at least {CALIBRATION_INPUTS} unrelated calibration_inputs, '
            f"got {unrelated}"
        )


def epsilon_from(queries: Tensor) -> float:
    """Return an epsilon for a layer from the queries [M, D] of unrelated inputs.

    Raises: ValueError for fewer than 8 inputs, or where they all ask with one query.
    """
    require_enough(len(queries))
    distinct = torch.unique(queries, dim=0).double()
    if len(distinct) < 2:
        raise ValueError(
            "the calibration inputs all ask with the same query, so no epsilon can tell them "
            "apart; attach to another layer"
        )
    nearest = _apart(distinct, distinct).fill_diagonal_(torch.inf).amin(dim=1).float()
    return float(nearest.quantile(CLOSE_QUANTILE)) / 2
