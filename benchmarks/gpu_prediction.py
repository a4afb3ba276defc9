"""What every cell of the GPU benchmark is expected to take on an H200, before it has been measured.

    python -m benchmarks.gpu_prediction          writes results/gpu-prediction-h200.json and .md

A prediction is a sum of parts: launches by the cost of a node, dependent round trips by their
latency, and the larger of bytes over bandwidth and instructions over the rate they are issued at.
Where a loop does not fetch ahead, the two overlap only in part: half way between the larger and the
sum. `us` is of the kernels as their machine code was counted, `limit_us` what their bytes or
products take alone. All of it is an estimate, none of it measured on a GPU: it is kept so that the
first measurement can be held against it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_cells, gpu_model, runner
from benchmarks.gpu_cells import BESIDE, BOXES, LINEAR, MILLION, Cell

RESULTS = Path(__file__).parent / "results" / "gpu-prediction-h200"

# What was set as the goal, in us, for D = 4 096, bf16, misses from a graph; see `goal_of`.
DENSE_GOALS = {1_000: 6.0, 10_000: 24.0, 100_000: 207.0, MILLION: 2000.0}
LINEAR_GOALS = {100_000: 7.0, MILLION: 10.0, 10 * MILLION: 50.0, 100 * MILLION: 450.0}
BOXES_GOALS = {100_000: 7.0, MILLION: 9.0, 10 * MILLION: 15.0, 100 * MILLION: 20.0}
MANY = {gpu_cells.TILES: (4096, 100_000), gpu_cells.CODE_TILES: (4096, MILLION)}  # B, N
MANY_GOALS = {gpu_cells.TILES: 5300.0, gpu_cells.CODE_TILES: 300.0}
BESIDE_GOAL = 2.0  # more than the layer alone


@dataclass(frozen=True)
class Prediction:
    """What a cell is expected to take."""

    us: float
    limit_us: float | None  # of ours: bytes over bandwidth, or products; None beside a layer
    goal_us: float | None
    parts: dict[str, float]  # that `us` is the sum of


def predicted(cell: Cell) -> Prediction:
    """Return the prediction for a cell of `gpu_cells`.

    Raises: KeyError for a path that is not known.
    """
    parts = gpu_model.parts_of(cell)
    is_bound = cell.is_ours and cell.asks != BESIDE
    limit = round(gpu_model.limit(cell), 2) if is_bound else None
    kept = {name: round(us, 2) for name, us in parts.items() if us}
    return Prediction(round(sum(parts.values()), 2), limit, goal_of(cell), kept)


def goal_of(cell: Cell) -> float | None:
    """Return the goal that a cell is held against, or None."""
    if cell.asks == BESIDE:
        return None if "dense" in cell.path else BESIDE_GOAL
    if not cell.is_ours or cell.asks != gpu_cells.MISSES or cell.D != gpu_cells.WIDTH:
        return None
    if cell.path in LINEAR:
        return LINEAR_GOALS.get(cell.N) if cell.B <= 8 else None
    if cell.path in BOXES:
        return BOXES_GOALS.get(cell.N) if cell.B <= 8 else None
    if cell.path in MANY_GOALS:
        return MANY_GOALS[cell.path] if MANY[cell.path] == (cell.B, cell.N) else None
    return DENSE_GOALS.get(cell.N) if cell.B <= 4 and "dense" in cell.path else None


def table() -> list[dict[str, Any]]:
    """Return the prediction for every cell, in the order of the benchmark."""
    return [
        {"key": cell.key, **asdict(cell), **asdict(predicted(cell))} for cell in gpu_cells.cells()
    ]


def known() -> dict[str, dict[str, Any]]:
    """Return the predictions that were kept, by the key of their cell."""
    path = RESULTS.with_suffix(".json")
    rows = json.loads(path.read_text())["predictions"] if path.exists() else []
    return {row["key"]: row for row in rows}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the predictions as a page."""
    constants = [
        [name, f"{value:.4g}", source] for name, (value, source) in gpu_model.CONSTANTS.items()
    ]
    cells = [
        [
            row["path"],
            *(f"{row[name]:,}" for name in "NDB"),
            row["dtype"],
            row["asks"],
            row["caches"],
        ]
        + [_number(row[name]) for name in ("us", "limit_us", "goal_us")]
        + ["; ".join(f"{name} {us:.4g}" for name, us in row["parts"].items())]
        for row in rows
    ]
    heads = ["path", "N", "D", "B", "dtype", "asks", "caches", "predicted us", "limit", "goal"]
    command, about = (__doc__ or "").split("\n\n    ")[0], (__doc__ or "").split("\n\n")[2:]
    said = " ".join("\n".join([command, *about]).split())
    return (
        f"# Predictions for an H200\n\n{said} Written by `python -m benchmarks.gpu_prediction`: "
        "`predicted us` is `us`, `limit` is `limit_us`.\n\n"
        f"{runner.table(['constant', 'value', 'source'], constants)}\n\n"
        f"{runner.table([*heads, 'parts, us'], cells)}\n"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def main() -> int:
    """Write both files."""
    rows = table()
    constants = {
        name: {"value": value, "source": source}
        for name, (value, source) in gpu_model.CONSTANTS.items()
    }
    found = {"what": "estimates, not measured", "constants": constants, "predictions": rows}
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
