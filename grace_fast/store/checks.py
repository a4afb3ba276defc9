"""Checks of columns: opening raises on the first fault, repair drops every row that has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.codebook.checks import MAX_NUMBER
from grace_fast.codebook.pages import Counts
from grace_fast.errors import CodebookCorrupt


@dataclass(frozen=True)
class Fault:
    """A rule that a column breaks: the places, and why."""

    field: str
    wrong: Tensor  # [n] or [n, m] bool
    why: str
    text: Callable[[int], str] | None = None  # the message of a place, where it is another one

    def message(self, place: int) -> str:
        """Return what is wrong in one place of the column."""
        return f"{self.field} {self.why} in row {place}" if self.text is None else self.text(place)


def refuse(faults: Iterable[Fault]) -> None:
    """Raise CodebookCorrupt, with its column and place, for the first fault that there is."""
    for fault in faults:
        if bool(fault.wrong.any()):
            place = int(fault.wrong.nonzero()[0][0])
            raise CodebookCorrupt(fault.message(place), field=fault.field, row=place)


def outside(name: str, column: Tensor, slots: int, least: int = 0) -> Fault:
    """Tell where a column [n] or [n, m] points outside of what there is."""
    wrong = (column < least) | (column >= slots)
    return Fault(name, wrong, f"points outside the {slots} slots there are")


def not_finite(name: str, tensor: Tensor) -> Fault:
    """Tell where a tensor [n] or [n, m] is NaN or infinite."""
    # The two ends of one that holds NaN are NaN; where they are finite, no mask is made.
    is_whole = not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())
    wrong = tensor.new_zeros(0, dtype=torch.bool) if is_whole else ~tensor.isfinite()
    return Fault(name, wrong, "must be finite, got NaN or infinity")


def not_ascending(name: str, ids: Tensor, limit: int = MAX_NUMBER) -> Iterator[Fault]:
    """Tell where ids [n] do not ascend, or are not numbers of ours."""
    known = torch.where(ids < limit, ids, -1)
    before = torch.cat((known.new_full((1,), -1), known.cummax(0).values))[:-1]
    yield Fault(name, ids <= before, "must ascend from 0 or more")
    yield Fault(name, ids >= limit, f"must be below {limit}")


def too_wide(name: str, radii: Tensor, max_radius: float | None) -> Fault:
    """Tell where a ball is wider than allowed, or an undo would make it so.

    max_radius: None allows every finite radius. Anything below 0 is a dead key's, and allowed.
    """
    allowed = torch.inf if max_radius is None else max_radius
    # As wide as a radius is kept when it is the widest that is allowed.
    widest = torch.tensor(allowed, dtype=torch.float32, device="cpu").to(radii.dtype)
    why = f"must be at most {max_radius}"
    return Fault(
        name, radii > widest, why, lambda at: f"{name} {why}, got {float(radii[at])} in row {at}"
    )


def check_radii(tensors: Mapping[str, Tensor], max_radius: float | None) -> None:
    """Raise CodebookCorrupt for a ball that is too wide: see `too_wide`."""
    if max_radius is not None:
        names = [name for name in ("rows.radius", "events.radius") if name in tensors]
        refuse(too_wide(name, tensors[name], max_radius) for name in names)


def row_faults(columns: Mapping[str, Tensor], counts: Counts) -> Iterator[Fault]:
    """Tell where the rows of a codebook cannot be; columns: `rows.key_slot` and so on."""
    for name, slots in (
        ("key_slot", counts.keys),
        ("value_slot", counts.values),
        ("label_slot", counts.labels),
    ):
        yield outside(f"rows.{name}", columns[f"rows.{name}"], slots)
    yield not_finite("rows.radius", columns["rows.radius"])


def get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor by its name.

    Raises: CodebookCorrupt where it is missing.
    """
    if name not in tensors:
        raise CodebookCorrupt(f"the tensor {name} is missing", field=name)
    return tensors[name]


def column(
    tensors: Mapping[str, Tensor],
    name: str,
    dtype: torch.dtype,
    count: int | None = None,
    widths: tuple[int, ...] = (),
) -> Tensor:
    """Return a tensor [count, *widths] that must be of one element type; any count for None.

    Raises: CodebookCorrupt where it is missing or another one.
    """
    column = get(tensors, name)
    is_right = column.ndim == 1 + len(widths) and column.shape[1:] == widths
    if column.dtype != dtype or not is_right or count not in (None, len(column)):
        wanted = ", ".join(map(str, ("*" if count is None else count, *widths)))
        raise CodebookCorrupt(
            f"{name} must be {dtype} [{wanted}], got {column.dtype} {tuple(column.shape)}",
            field=name,
        )
    return column


def column_or_empty(
    tensors: Mapping[str, Tensor],
    name: str,
    dtype: torch.dtype,
    *widths: int,
    count: int | None = None,
) -> Tensor:
    """Return a column [count, *widths] of a version; one that was left out is empty.

    Raises: CodebookCorrupt where it has another type or shape.
    """
    empty = torch.zeros(0, *widths, dtype=dtype, device="cpu")
    return column({name: tensors.get(name, empty)}, name, dtype, count, widths)
