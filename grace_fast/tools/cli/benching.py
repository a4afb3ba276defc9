"""Commands for large codebooks: built from files, and timed on this machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import grace_fast as gf
from grace_fast.tools.cli.command import FAILED, Json, answer, command, fail, typer
from grace_fast.tools.terminal import say_json

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


@command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="About a minute, synthetic keys.")] = False,
    rows: Annotated[
        str, typer.Option(help="Build this many keys on the disk and open them: 10M, 500k.")
    ] = "",
    folder: Annotated[Path | None, typer.Option(help="With --rows: where there is room.")] = None,
    as_json: Json = False,
) -> None:
    """Time look-ups on this machine; every decision is checked before it is timed."""
    from grace_fast.tools.bench import large
    from grace_fast.tools.bench import quick as quick_bench

    if quick == bool(rows):
        fail("choose --quick or --rows; for more, in the source tree, run `make bench`")
    figures = large.run(_count(rows), folder, as_json) if rows else quick_bench.run(as_json=as_json)
    if as_json:
        say_json(figures)
    if not figures["passed"]:
        raise typer.Exit(FAILED)


def _count(rows: str) -> int:
    """Return the number that `10M`, `500k` or `1e6` stands for."""
    text = rows.lower().replace("_", "").replace(",", "")
    try:
        count = float(text.rstrip("kmg")) * UNITS.get(text[-1:], 1)
    except ValueError:
        count = 0
    if not 1 <= count < math.inf or text[:-1].rstrip("kmg") != text[:-1]:
        fail(f"--rows must be a number such as 10M, 500k or 1e6, got {rows!r}")
    return round(count)


@command(also=(TypeError,))
def build(
    directory: Annotated[Path, typer.Argument(help="Where the codebook goes.")],
    shards: Annotated[
        list[Path],
        typer.Argument(help="safetensors files: keys [M, D], values [M, V] and perhaps radii [M]."),
    ],
    radius: Annotated[
        float | None, typer.Option(help="Of the keys of files that have no radii.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="By default as many as torch uses.")] = None,
    as_json: Json = False,
) -> None:
    """Build a codebook larger than memory from files, going on where it was interrupted."""
    from grace_fast.store.large.shard_files import FilesOfRows

    given = FilesOfRows(shards, radius)
    book = gf.Codebook.build(directory, given.blocks, rows=given.rows, threads=threads)
    figures = {"keys": len(book), "key_dim": book.key_dim, "value_dim": book.value_dim}
    said = f"{len(book):,} keys [D = {book.key_dim}] in {directory}"
    answer(figures | {"out": str(directory)}, said, as_json)
