"""The quantizer: short codes of keys from which a distance is bounded below, with proof.

    phi(x) = (W (x - centre), c(x))     W: rows fitted on the keys, kept in bfloat16, the near ones
                                        turned by a 16 x 16 matrix so that they are orthonormal
    c(x)   = norm of what the first 15 rows leave over of x - centre; a near slot, if it helps
    z(x)   = round(clamp(phi(x) / step)) mod 256,  e(x) >= |phi(x) / step - z(x)|

phi never stretches a distance by more than `lipschitz`; clamping, and wrapping onto a circle of
256, stretch nothing. Hence, for a query q and a key k within radius r of it,

    |z(q) - z(k)| <= (lipschitz * r) / step + e(q) + e(k)        differences taken around the circle

and a key whose sum of squared code differences is larger than `threshold` is farther than r. The
left side is an integer: no floating point is to be trusted there. e holds everything else: the
rounding to whole steps, the arithmetic of W (x - centre) (float64 for keys, float32 for queries)
and what `eta` does to c. How well W fits the keys decides how much is proved, never whether it is
true.

The first 16 slots (near) are read for every key of a leaf that is touched, the other 48 (far) for
candidates; the far sum leaves the slot of c out, because the far rows look at what c measures.
`csrc/cpu/encode.cpp` does to queries what `encode_queries` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grace_fast.codebook.once import cached_property

NEAR, FAR = 16, 48
SLOTS = NEAR + FAR
PADDING = 64  # widths are padded with zeros to a multiple of this
SLOT_LIMIT = 2.0**21  # below it a float32 still holds a fraction of a step
STEPS_PER_RADIUS = 34  # the step is a power of two: radii are 24 .. 48 steps
SMALLEST_STEP, LARGEST_STEP = 2.0**-40, 2.0**40
SLACK_STEPS = 1e-3  # what underflow may take from a projection
_UNIT32, _UNIT64 = 2.0**-24, 2.0**-53
_SAMPLE = 4096  # keys that the rows are fitted on
_STAGES = (5, 5, SLOTS - 10)  # directions that are found together
_SPARE = 16  # further ones that their subspace iteration carries
_CLOSE = 1 / 200  # the share of a key's others that are close to it, if they are
_FEWEST_CLOSE = 8  # of them


@dataclass(frozen=True, eq=False)
class Projection:
    """A fitted projection phi and its step."""

    centre: Tensor  # [D] float32
    rows: Tensor  # [64, D] float32, every element a bfloat16; W before the turn
    turn: Tensor  # [16, 16] float64, applied to the projections on the near rows
    step: float
    norm_slot: bool  # slot 15 is c
    eta: float  # >= the spectral norm of W W^T - 1 on the rows that c leaves out
    lipschitz: float
    row_norm: float  # >= the norm of every row

    @property
    def far(self) -> bool:
        """Whether the far slots say anything: there are more dimensions than near slots."""
        return len(self.centre) > NEAR

    @cached_property
    def wide_rows(self) -> Tensor:
        """W [64, D] float64."""
        wide = self.rows.double()
        return torch.cat([self.turn @ wide[:NEAR], wide[NEAR:]])

    @cached_property
    def padded_centre(self) -> Tensor:
        """[Dp] float32, padded with zeros."""
        padded = torch.zeros(_padded(len(self.centre)), dtype=torch.float32, device="cpu")
        padded[: len(self.centre)] = self.centre
        return padded

    @cached_property
    def padded_rows(self) -> Tensor:
        """[64, Dp] bfloat16, padded with zeros."""
        padded = torch.zeros(SLOTS, _padded(len(self.centre)), dtype=torch.bfloat16, device="cpu")
        padded[:, : len(self.centre)] = self.rows
        return padded

    @cached_property
    def packed_rows(self) -> Tensor:
        """[64, Dp] bfloat16 for the kernels: of 16 elements, j and j + 8 side by side."""
        by_16 = self.padded_rows.view(SLOTS, -1, 2, 8)
        return by_16.transpose(2, 3).reshape(SLOTS, -1).contiguous()

    @property
    def numbers(self) -> dict[str, float | bool]:
        """What the extensions read of it beside arrays."""
        names = ("step", "lipschitz", "row_norm", "eta", "norm_slot", "far")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class Quantized:
    """z of some vectors, before it is wrapped, and e; both in steps."""

    whole: Tensor  # [n, 64] int32; its low byte is the code
    near_error: Tensor  # [n] float64, e of the near slots
    far_error: Tensor  # [n] float64, e of the rows of all slots


def _padded(width: int) -> int:
    return -(-width // PADDING) * PADDING


def fit(keys: Tensor, scale: float) -> Projection | None:
    """Fit phi on keys [n, D], with a step for radii of about `scale`; None where no step will do.

    The rows are directions that tell the keys apart, as far as there are any, then random ones.
    """
    if not (len(keys) and scale > 0):
        return None
    step = 2.0 ** round(math.log2(scale / STEPS_PER_RADIUS))
    if not SMALLEST_STEP <= step <= LARGEST_STEP:
        return None
    sample = keys[:: max(1, len(keys) // _SAMPLE)].float()
    centre = sample.mean(dim=0)
    centred = sample - centre
    if not (centred.isfinite().all() and float(centred.abs().amax()) < 1e15):
        return None
    directions = _telling_apart(centred[:: -(-len(centred) // _SAMPLE)], scale)
    projected = centred.double() @ directions[:NEAR].T
    norm_slot = _norm_helps(centred, projected, step)
    rows = torch.zeros(SLOTS, keys.shape[1], dtype=torch.float32, device="cpu")
    near = NEAR - int(norm_slot)
    found = directions[: near + FAR].bfloat16().float()
    rows[: min(near, len(found))] = found[:near]
    rows[NEAR : NEAR + max(0, len(found) - near)] = found[near:]
    return _measured(centre, rows, step, norm_slot)


def _telling_apart(centred: Tensor, scale: float) -> Tensor:
    """Return orthonormal directions [m, D] float64 in which keys [n, D] differ, the best first.

    The first are the principal ones of all keys, the next those of the differences between keys
    that are close in the first. Look-ups spend most of their time where keys are densest, and there
    keys do not vary as all keys do.
    """
    largest = centred.abs().amax().clamp(min=1e-30)
    unit, width = (centred / largest).double(), centred.shape[1]
    generator = torch.Generator(device="cpu").manual_seed(0)  # never the caller's
    found = torch.zeros(0, width, dtype=torch.float64, device="cpu")
    for count in _STAGES:
        inside = unit @ found.T
        weights = _closeness(inside.float(), scale / float(largest))
        left = (unit - inside @ found).float()
        shape = (width, min(count + _SPARE, width - len(found)))
        start = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        found = torch.cat([found, _principal(left, weights, start)[:count]])
        found = torch.linalg.qr(found.T)[0].T  # random directions may lie in those before
    return found


def _closeness(points: Tensor, scale: float) -> Tensor:
    """Return [n, n], 1 for points [n, m] in one place, near 0 for those not close; ones if m is 0.

    Close is as far as a few of the others are, and what is within `scale`.
    """
    count = len(points)
    if not points.shape[1]:
        return torch.ones(count, count, dtype=torch.float32, device="cpu")
    exactly = "donot_use_mm_for_euclid_dist"
    apart = torch.cdist(points, points, compute_mode=exactly)
    some = apart[:: -(-count // 256)]
    close = 1 + max(_FEWEST_CLOSE, round(_CLOSE * count))  # and the point itself
    reach = float(some.flatten().kthvalue(len(some) * min(close, count)).values)
    return torch.exp(-0.5 * (apart / max(reach, scale)).square())


def _principal(keys: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Return orthonormal directions [m, D] float64 along which keys [n, D] differ most.

    A pair counts as much as its weight in [n, n]; the sum over pairs of w_ij (x_i - x_j)^2 is
    x^T (diag(sum_j w_ij) - W) x. start: [D, m], random.
    """
    total = weights.sum(dim=1, keepdim=True)
    basis = start
    for _ in range(3):
        basis = torch.linalg.qr(basis)[0]
        inside = keys @ basis
        basis = keys.T @ ((total * inside - weights @ inside) / total.amax()) + 1e-6 * basis
    wide = torch.linalg.qr(basis.double())[0]
    inside = (keys @ wide.float()).double()
    spread = inside.T @ (total * inside - (weights @ inside.float()))
    turn = torch.linalg.eigh(spread + spread.T)[1].flip(1)
    directions: Tensor = (wide @ turn).T
    return directions


def _norm_helps(centred: Tensor, projected: Tensor, step: float) -> bool:
    """Tell whether c says more than one more row would, and float32 gets it to half a step."""
    if centred.shape[1] <= NEAR:
        return False
    inside = projected[:, : NEAR - 1].square().sum(dim=1)
    left = (centred.double().square().sum(dim=1) - inside).clamp(min=0).sqrt()
    norm = float(centred.norm(dim=1).amax())
    wrong = 4 * dot_roundings(centred.shape[1]) * _UNIT32 * norm**2
    if wrong / max(float(left.median()), math.sqrt(wrong), 1e-30) > step / 2:
        return False
    few = len(centred) < 4 * NEAR  # rows fitted on a few keys say little about a query
    return few or float(left.var()) >= float(projected[:, NEAR - 1].var())


def _measured(centre: Tensor, rows: Tensor, step: float, norm_slot: bool) -> Projection:
    """Return the projection on rows as they are stored, with bounds on what it does to distance."""
    room = 1 + 1e-9  # float64 errors of what follows
    turn, eta = torch.eye(NEAR, dtype=torch.float64, device="cpu"), 0.0
    if norm_slot:
        near = rows[: NEAR - 1].double()
        values, vectors = torch.linalg.eigh(near @ near.T)
        turn[: NEAR - 1, : NEAR - 1] = (vectors / values.clamp(min=0.5).sqrt()) @ vectors.T
        turned = turn[: NEAR - 1, : NEAR - 1] @ near
        apart = turned @ turned.T - torch.eye(NEAR - 1, dtype=torch.float64, device="cpu")
        eta = float(torch.linalg.matrix_norm(apart, 2)) * room + 1e-12
    row_norm = float(rows.double().norm(dim=1).amax()) * room
    # What the turn does to errors; it is the identity up to the rounding of the rows to bfloat16.
    row_norm *= max(1.0, float(torch.linalg.matrix_norm(turn, 2)) * room)
    projection = Projection(centre, rows, turn, step, norm_slot, eta, 0.0, row_norm)
    largest = float(torch.linalg.matrix_norm(projection.wide_rows, 2)) * room
    return replace(projection, lipschitz=max(largest, math.sqrt(1 + eta)))


def dot_roundings(width: int) -> float:
    """Return how many roundings of float32 a dot product of the kernels may gather (kernels.h)."""
    return 48.0 + width / 256


def encode_keys(projection: Projection, keys: Tensor) -> Quantized:
    """Encode keys [n, D] where they are, in float64; the codes are on the host."""
    centred = keys.double() - projection.centre.to(keys.device).double()
    norm = centred.norm(dim=1)
    rounding = 4 * len(projection.centre) * _UNIT64 * norm * projection.row_norm * math.sqrt(SLOTS)
    slots = centred @ projection.wide_rows.T.to(keys.device)
    return _encode(projection, slots.cpu(), norm.cpu(), rounding.cpu(), 1e-12)


def encode_queries(projection: Projection, queries: Tensor) -> Quantized:
    """Encode queries [n, D] in float32, with the bound that csrc/cpu/encode.cpp uses."""
    centred = queries.float() - projection.centre
    norm = centred.norm(dim=1).double() * 1.0001 + 1e-16
    relative = dot_roundings(len(projection.centre)) * _UNIT32 * 1.0001
    rounding = norm * (
        math.sqrt(SLOTS) * relative * projection.row_norm + _UNIT32 * projection.lipschitz
    )
    slots = (centred @ projection.rows.T).double()
    slots[:, :NEAR] = slots[:, :NEAR] @ projection.turn.T
    return _encode(projection, slots, norm, rounding, relative + 4 * _UNIT32)


def _encode(
    projection: Projection, slots: Tensor, norm: Tensor, rounding: Tensor, relative: float
) -> Quantized:
    """Encode projections [n, 64] that are `rounding` [n] off; `relative` is the norm's square's."""
    error = rounding
    if projection.norm_slot:
        inside = slots[:, : NEAR - 1].square().sum(dim=1)
        wrong = relative * norm.square() + 2 * inside.sqrt() * rounding + rounding.square()
        wrong = 1.001 * (wrong + 2 * projection.eta * inside) + 1e-30
        left = (norm.square() - inside).clamp(min=0).sqrt()
        slots[:, NEAR - 1] = left
        apart = wrong / torch.maximum(left, wrong.sqrt()) + left * 2.0**-23
        error = (rounding.square() + apart.square()).sqrt()
    steps = (slots / projection.step).clamp(-SLOT_LIMIT, SLOT_LIMIT)
    whole = steps.round()
    residual = (steps - whole).square()
    near = residual[:, :NEAR].sum(dim=1)
    far = residual.sum(dim=1) - (residual[:, NEAR - 1] if projection.norm_slot else 0)
    return Quantized(
        whole.to(torch.int32),
        near.sqrt() * (1 + 1e-12) + error / projection.step,
        far.sqrt() * (1 + 1e-12) + rounding / projection.step,
    )


def code_distances(
    projection: Projection, queries: Quantized, keys: Quantized, far: bool = False
) -> Tensor:
    """Return sums of squared circular code differences, [B, N] int64; of all slots if `far`."""
    slots = torch.arange(SLOTS if far else NEAR, device="cpu")
    if far and projection.norm_slot:
        slots = slots[slots != NEAR - 1]
    apart = queries.whole[:, None, slots].long() - keys.whole[None, :, slots].long()
    apart = (apart + 128) % 256 - 128
    return apart.abs().clamp(max=127).square().sum(dim=2)


def threshold(projection: Projection, radius: float, query_error: float, key_error: float) -> int:
    """Return the largest sum of squared code differences that a key within `radius` can have."""
    steps = (
        projection.lipschitz * (1 + 1e-6) * radius / projection.step
        + query_error
        + key_error
        + SLACK_STEPS
    )
    return min(math.floor(steps * steps * (1 + 1e-6)) + 1, 2**31 - 1)


def lower_bounds(
    projection: Projection, queries: Quantized, keys: Quantized, far: bool = False
) -> Tensor:
    """Return what no distance is below, [B, N] float64: the proof read backwards."""
    apart = code_distances(projection, queries, keys, far).double().sqrt()
    name = "far_error" if far else "near_error"
    errors = getattr(queries, name)[:, None] + getattr(keys, name)[None, :] + SLACK_STEPS
    bound: Tensor = (apart - errors) * projection.step / (projection.lipschitz * (1 + 1e-6))
    return bound.clamp(min=0)


def scale_of(radii: Tensor, keys: Tensor) -> float:
    """Return the radius that a step should suit: the median one, or less than the keys' spacing."""
    positive = radii[radii > 0]
    if len(positive):
        return float(positive.median())
    sample = keys[:: max(1, len(keys) // 256)].float()
    apart = torch.cdist(sample, sample)
    apart = apart[apart > 0]
    return float(apart.median()) / 8 if len(apart) else 1.0
