"""The page of a GPU benchmark, from its lines: also of a run that was broken off.

python -m benchmarks.gpu_page FOLDER         writes FOLDER/gpu.md from FOLDER/gpu.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_prediction, runner

Line = dict[str, Any]
# A time that differs by such a factor from what was predicted was predicted wrongly.
OFF = 1.5
HEADS = ["path", "N", "D", "B", "dtype", "asks", "caches", "p50 us", "p5", "p95", "predicted"]
HEADS += ["limit", "measured / predicted", "goal", "of the read bandwidth", "wrong", "note"]


def write(folder: Path, lines: Sequence[Line]) -> Path:
    """Write the page of a folder's lines."""
    path = folder / "gpu.md"
    path.write_text(page(lines))
    return path


def page(lines: Sequence[Line]) -> str:
    """Return the page: what was measured, stage by stage, and where the prediction was wrong."""
    heads = [line for line in lines if "machine" in line]
    cells = [line for line in lines if "key" in line]
    said = runner.where(heads[0]) + f"; {heads[0]['machine']['device']}" if heads else "unknown"
    predictions = gpu_prediction.known()
    parts = [
        f"# Look-ups on a GPU\n\n{said}.\n\nTimes are of one look-up among 20 to 50 in a captured "
        "graph. Swept: the second-level cache was swept by reading before each, and the sweeps' "
        "time is taken off. All data are synthetic; `wrong` is of the decisions that were held "
        "against the law. Predictions are estimates that were made before "
        "(`gpu-prediction-h200.md`).",
        _summary(cells),
    ]
    for stage in dict.fromkeys(line["stage"] for line in cells):
        rows = [_row(line, predictions) for line in cells if line["stage"] == stage]
        parts.append(f"## {stage.capitalize()}\n\n{runner.table(HEADS, rows)}")
    parts.append(f"## Where the prediction was wrong\n\n{_misses(cells, predictions)}")
    left = [key for key in predictions if key not in {line["key"] for line in cells}]
    parts.append(f"{len(left)} of {len(predictions)} cells were not measured.")
    return "\n\n".join(parts) + "\n"


def _summary(cells: Sequence[Line]) -> str:
    decided = sum(line.get("checked", 0) for line in cells)
    wrong = sum(line.get("wrong", 0) for line in cells if _is_ours(line))
    failed = [line for line in cells if line.get("note", "").startswith("failed")]
    said = f"{len(cells)} cells, {decided} decisions held against the law, {wrong} of ours wrong"
    return f"{said}, {len(failed)} cells failed."


def _is_ours(line: Line) -> bool:
    return line["path"] in gpu_prediction.gpu_cells.OURS


def _row(line: Line, predictions: dict[str, Line]) -> list[str]:
    expected = predictions.get(line["key"], {})
    ratio = _ratio(line, predictions)
    return [
        line["path"],
        *(f"{line[size]:,}" for size in "NDB"),
        *(line[name] for name in ("dtype", "asks", "caches")),
        *(_number(line.get(name)) for name in ("us_p50", "us_p5", "us_p95")),
        _number(expected.get("us")),
        _number(expected.get("limit_us")),
        "-" if ratio is None else f"{ratio:.2f}",
        _number(expected.get("goal_us")),
        "-" if line.get("of_read") is None else f"{line['of_read']:.0%}",
        f"{line['wrong']} / {line['checked']}" if "checked" in line else "-",
        _note(line),
    ]


def _note(line: Line) -> str:
    is_read = line["path"] == "bytes read" and "gigabytes_s" in line
    rate = f"{line['gigabytes_s']:,.0f} GB/s" if is_read else ""
    return "; ".join(part for part in (rate, line.get("note", "")) if part).replace("|", "/")


def _ratio(line: Line, predictions: dict[str, Line]) -> float | None:
    """Return measured over predicted, where there are both."""
    expected, measured = predictions.get(line["key"], {}).get("us"), line.get("us_p50")
    if expected is None or measured is None or measured <= 0 or expected <= 0:
        return None
    return float(measured / expected)


def _misses(cells: Sequence[Line], predictions: dict[str, Line]) -> str:
    known = [line for line in cells if _ratio(line, predictions) is not None]
    found = [(_off(line["us_p50"], predictions[line["key"]]), line) for line in known]
    off = [(by, line) for by, line in found if by > OFF]
    if not off:
        return f"Nowhere by more than a factor of {OFF}, in {len(known)} cells."
    rows = []
    for by, line in sorted(off, key=lambda one: -one[0]):
        expected = predictions[line["key"]]
        figures = (line["us_p50"], expected["us"], expected["limit_us"])
        rows.append([line["key"], f"{by:.2f}", *map(_number, figures), _parts(expected)])
    said = f"By more than a factor of {OFF} in {len(off)} of {len(known)} cells, the worst first."
    heads = ["cell", "off by", "p50 us", "predicted", "limit", "parts of the predicted, us"]
    return f"{said}\n\n{runner.table(heads, rows)}"


def _off(measured: float, expected: Line) -> float:
    """Return the factor between a time and what was predicted, at least 1."""
    return float(max(measured / expected["us"], expected["us"] / measured))


def _parts(expected: Line) -> str:
    return "; ".join(f"{name} {us:.4g}" for name, us in expected["parts"].items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def in_a_line(line: Line) -> str:
    """Return what the terminal shows of a line."""
    told = [line["key"]]
    if "us_p50" in line:
        told.append(f"{line['us_p50']:.2f} us")
    if "of_read" in line:
        told.append(f"{line['of_read']:.0%} of the read bandwidth")
    if "checked" in line:
        told.append(f"{line['wrong']} / {line['checked']} wrong")
    if line.get("note"):
        told.append(line["note"])
    return "; ".join(told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    from benchmarks.gpu import read_lines

    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 1:
        print("give the folder that holds gpu.jsonl: python -m benchmarks.gpu_page FOLDER")
        return 2
    lines = read_lines(Path(given[0]))
    if not lines:
        print(f"there is no whole line in {given[0]}/gpu.jsonl: nothing was written")
        return 1
    print(write(Path(given[0]), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
