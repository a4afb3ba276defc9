"""The command line: try it, edit a model, evaluate and calibrate, look at a codebook, verify, time.

Every command prints a table, or with `--json` one object, and ends with a code other than 0 where
something is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import grace_fast as gf
from grace_fast.attachment import Saved, read_saved
from grace_fast.edits import Edit, History
from grace_fast.store import headers, portable
from grace_fast.store import repair as repairing
from grace_fast.store.durable import difference, journal_of
from grace_fast.store.files import read_config, steadily
from grace_fast.store.saved import Offline, read_newest

app = typer.Typer(
    help="GRACE: lifelong edits of a language model, found again exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
FAILED = 1
LOST = 3  # it was repaired, and not all of it is there any more


@app.callback()
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """GRACE: lifelong edits of a language model, found again exactly."""
    if show:
        typer.echo(gf.__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the codebook, table and plot go.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the classifier and the order of edits.")] = 0,
    as_json: Json = False,
) -> None:
    """Repair the real mistakes of a real model, offline, and show what it cost."""
    try:
        from grace_fast.demo import run
    except ModuleNotFoundError as error:
        _fail(str(error))
    figures = run(out, seed=seed, as_json=as_json)
    if as_json:
        typer.echo(json.dumps(figures))
    if not figures["passed"]:
        raise typer.Exit(FAILED)


@app.command()
def edit(
    model: Annotated[str, typer.Argument(help="A transformers model: a directory or a hub name.")],
    layer: Annotated[str, typer.Option(help="Dotted name of the layer to edit.")],
    edits: Annotated[Path, typer.Option(help='JSON lines: {"prompt": ..., "target": ...}.')],
    out: Annotated[Path, typer.Option(help="Directory for the codebook.")],
    epsilon: Annotated[float, typer.Option(help="Radius of a new key.")] = 1.0,
    replacement: Annotated[
        str, typer.Option(help="replace_prompt, replace_last or replace_all.")
    ] = "replace_prompt",
    iterations: Annotated[int, typer.Option(help="Most training steps of one edit.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Of Adam on the value.")] = 1.0,
    value_init: Annotated[str, typer.Option(help="cold or warm.")] = "cold",
    store_text: Annotated[
        bool, typer.Option(help="Keep prompts and targets beside the codebook.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Edit a model with every line of a file and save the codebook."""
    wanted = _read_edits(edits)
    loaded, tokenizer = _load(model)
    settings: dict[str, Any] = {
        "epsilon": epsilon,
        "replacement": replacement,
        "iterations": iterations,
        "learning_rate": learning_rate,
        "value_init": value_init,
        "store_text": store_text,
    }
    try:
        grace = gf.attach(loaded, layer, tokenizer=tokenizer, **settings)
        made = [
            grace.edit(line.get("messages", line.get("prompt")), line["target"])
            for line in tqdm(wanted, desc="edits", unit="edit", disable=None)
        ]
        verification = grace.verify()
        grace.save_pretrained(out)
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error))
    wrong = [report.id for report in made if not report.correct]
    figures = {
        "edits": len(made),
        "keys": len(grace.codebook),
        "not_learnt": wrong,
        "broken": verification.broken,
        "superseded": len(verification.superseded),
        "out": str(out),
    }
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        Console().print(_edit_table(made, {}))
        typer.echo(f"{len(made)} edits on {figures['keys']} keys saved to {out}")
        if wrong:
            typer.echo(f"not learnt: edits {wrong}; try more iterations or another layer", err=True)
    if wrong or not verification.ok:
        raise typer.Exit(FAILED)


@app.command()
def evaluate(
    name: Annotated[
        str,
        typer.Argument(
            help="facts, labels or fabrications (offline); zsre, scotus or hallucination (files)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where state, table and plots go.")] = Path(
        "evaluation-output"
    ),
    seed: Annotated[int, typer.Option(help="Of the data, the training and the resamples.")] = 0,
    every: Annotated[int | None, typer.Option(help="Edits between measurements.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="By default calibrated.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Fine-tuning, retraining, the reference's rule.")
    ] = False,
    sweep: Annotated[
        int, typer.Option(help="Epsilons to try on the whole stream beside the calibrated one.")
    ] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget a run that was interrupted or ended.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Trained models; by default $XDG_CACHE_HOME/grace_fast."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the files of zsre, scotus or hallucination.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Stream edits into a model and measure what lasts, generalises and disturbs nothing."""
    try:
        from grace_fast.evaluate import run

        figures = run(
            name,
            out,
            seed=seed,
            every=every,
            epsilon=epsilon,
            baselines=baselines,
            sweep=sweep,
            restart=restart,
            cache_folder=cache,
            data=data,
            as_json=as_json,
        )
    except (ModuleNotFoundError, ValueError, LookupError, OSError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(figures))
    if figures["broken"]:
        raise typer.Exit(FAILED)


@app.command()
def calibrate(
    model: Annotated[
        str,
        typer.Argument(help="A transformers model, or facts, labels or fabrications."),
    ],
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Dotted name; {} for every block. May be given more than once."),
    ] = None,
    edits: Annotated[
        Path | None,
        typer.Option(help='JSON lines: {"prompt": ..., "target": ..., "paraphrases": [...]}.'),
    ] = None,
    unrelated: Annotated[Path | None, typer.Option(help='JSON lines: {"prompt": ...}.')] = None,
    replacement: Annotated[
        str, typer.Option(help="replace_prompt, replace_last or replace_all.")
    ] = "replace_prompt",
    budget: Annotated[
        float, typer.Option(help="Share of unrelated inputs that may be disturbed.")
    ] = 0.01,
    tries: Annotated[
        int,
        typer.Option(min=0, help="Edits to try at each layer; 0: go by the distances alone."),
    ] = 8,
    plot: Annotated[Path | None, typer.Option(help="Where the trade-off is drawn, a PNG.")] = None,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Where trained models are kept.")] = None,
    as_json: Json = False,
) -> None:
    """Find layer and epsilon from a sample of edits, and say how sure they are.

    Ends with code 1 where too few edits can be learnt at any of the layers.
    """
    try:
        from grace_fast.evaluate import OFFLINE, given, load
        from grace_fast.evaluate.calibration import report_on

        if model in OFFLINE:
            task = load(model, seed, cache, None, progress=True)
        else:
            if not layer or edits is None or unrelated is None:
                _fail("calibrating a model needs --layer, --edits and --unrelated")
            task = given.task(*_load(model), edits, unrelated, layer, replacement, budget)
        found = report_on(task, plot, seed, as_json, tries)
    except (ModuleNotFoundError, ValueError, LookupError, OSError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(found))
    if not found["learnable"]:
        raise typer.Exit(FAILED)


@app.command()
def info(
    directory: Annotated[Path, typer.Argument(help="A saved codebook.")], as_json: Json = False
) -> None:
    """List the edits of a codebook: radii, hits, and the text where it was stored."""
    saved, book, history = _open(directory)
    listed = list(history.edits.values())
    if as_json:
        rows = [_edit_fields(edit, saved.hits) for edit in listed]
        settings = saved.config["settings"]
        typer.echo(json.dumps({"settings": settings, "keys": len(book), "edits": rows}))
        return
    typer.echo(f"{directory}: {len(listed)} edits on {len(book)} keys at {saved.settings.layer}")
    Console().print(_edit_table(listed, saved.hits))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A saved codebook.")],
    out: Annotated[
        Path, typer.Option(help="Where the page goes, a name in .html; in place of one there.")
    ] = Path("report.html"),
    key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that the directory is signed with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page of a codebook: edits, hits, radii, conflicts, a map, epsilon."""
    key = _key(key_file)
    try:
        from grace_fast.report import write

        figures = write(directory, out, key)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        _fail(str(error))
    said = f"{out}: {figures['edits']} edits on {figures['keys']} keys"
    typer.echo(json.dumps(figures) if as_json else said)


@app.command()
def log(
    directory: Annotated[Path, typer.Argument(help="A codebook that attach(path=) edits.")],
    as_json: Json = False,
) -> None:
    """List the versions of a codebook since it was compacted last."""
    try:
        saved, entries = steadily(directory, lambda: _versions(directory))
    except (OSError, ValueError) as error:
        _fail(str(error))
    if as_json:
        named = [dict(zip(("version", "time", "kind"), each, strict=True)) for each in entries]
        typer.echo(json.dumps({"base": saved.base, "versions": named}))
        return
    table = Table("version", "time", "kind")
    for number, seconds, kind in entries:
        when = datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
        table.add_row(str(number), when, kind)
    typer.echo(f"{directory}: {len(entries)} versions after version {saved.base}, the base")
    Console().print(table)


@app.command()
def diff(
    directory: Annotated[Path, typer.Argument(help="A codebook that attach(path=) edits.")],
    old: Annotated[int, typer.Argument(help="A version, as `log` lists them.")],
    new: Annotated[int | None, typer.Argument(help="By default the newest.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a version has otherwise than an earlier one."""
    try:
        one, other = steadily(directory, lambda: _two_versions(read_saved(directory), old, new))
    except (OSError, ValueError) as error:
        _fail(str(error))
    found = difference((one[0].snapshot(), one[1]), (other[0].snapshot(), other[1]))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(f"edits made: {found.made}\nedits undone: {found.undone}")
    typer.echo(f"rows added: {found.added}\nrows removed: {found.removed}")
    typer.echo(f"rows with other values: {found.values}")
    for row, (before, after) in found.radii.items():
        typer.echo(f"row {row}: radius {before:.6g} -> {after:.6g}")


@app.command()
def checkout(
    directory: Annotated[Path, typer.Argument(help="A codebook that attach(path=) edits.")],
    to: Annotated[int, typer.Argument(metavar="VERSION", help="As `log` lists them.")],
    as_json: Json = False,
) -> None:
    """Go back to an earlier version, in a new version that can itself be taken back."""
    figures = _change(directory, lambda offline: offline.checkout(to))
    said = f"version {figures['version']} decides as version {to}: {figures['keys']} keys"
    typer.echo(json.dumps(figures) if as_json else said)


@app.command()
def compact(
    directory: Annotated[Path, typer.Argument(help="A codebook that attach(path=) edits.")],
    as_json: Json = False,
) -> None:
    """Make the newest version the base; earlier versions go, every edit stays."""
    figures = _change(directory, Offline.compact)
    said = f"version {figures['version']} is the base of {directory}: {figures['keys']} keys"
    typer.echo(json.dumps(figures) if as_json else said)


def _change(directory: Path, way: Callable[[Offline], None]) -> dict[str, int]:
    """Change a codebook without its model; return its version and the number of its keys."""
    try:
        with closing(Offline(directory)) as offline:
            way(offline)
            return {"version": offline.book.version, "keys": len(offline.book)}
    except (OSError, ValueError) as error:
        _fail(str(error))


@app.command("export")
def export_(
    directory: Annotated[Path, typer.Argument(help="A saved codebook.")],
    file: Annotated[Path, typer.Argument(help="One file that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Write a codebook and its edits to one file, to be carried elsewhere."""
    _carry(portable.pack, directory, file, as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that `export` wrote.")],
    directory: Annotated[Path, typer.Argument(help="Absent or empty.")],
    as_json: Json = False,
) -> None:
    """Make a directory of a file that was exported, once all of it was tested."""
    _carry(portable.unpack, file, directory, as_json)


def _carry(way: Callable[[Path, Path], int], source: Path, target: Path, as_json: bool) -> None:
    try:
        edits = way(source, target)
    except (OSError, ValueError) as error:
        _fail(str(error))
    figures = {"edits": edits, "out": str(target)}
    typer.echo(json.dumps(figures) if as_json else f"{edits} edits in {target}")


def _versions(directory: Path) -> tuple[Saved, list[tuple[int, float, str]]]:
    saved = read_saved(directory)
    journal = journal_of(saved.path, saved.config)
    if journal is None:
        raise ValueError(
            f"{directory} has no versions: it was saved, and not attached with path= since"
        )
    with closing(journal):
        return saved, [(each.version, each.time, each.kind) for each in journal.entries()]


def _two_versions(saved: Saved, old: int, new: int | None) -> list[tuple[gf.Codebook, History]]:
    return [saved.codebook(version=old), saved.codebook(version=new)]


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="About a minute, synthetic keys.")] = False,
    rows: Annotated[
        str, typer.Option(help="Build this many keys on the disk and open them: 10M, 500k.")
    ] = "",
    folder: Annotated[Path | None, typer.Option(help="With --rows: where there is room.")] = None,
    as_json: Json = False,
) -> None:
    """Time look-ups on this machine; every decision is checked before it is timed."""
    from grace_fast import largebench, quickbench

    if quick == bool(rows):
        _fail("choose --quick or --rows; for more, in the source tree, run `make bench`")
    try:
        figures = (
            largebench.run(_count(rows), folder, as_json)
            if rows
            else quickbench.run(as_json=as_json)
        )
    except OSError as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps(figures))
    if not figures["passed"]:
        raise typer.Exit(FAILED)


@app.command()
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
    from grace_fast.store.source import FilesOfRows

    try:
        given = FilesOfRows(shards, radius)
        book = gf.build(directory, given.blocks, rows=given.rows, threads=threads)
    except (OSError, ValueError, TypeError) as error:
        _fail(str(error))
    figures = {"keys": len(book), "key_dim": book.key_dim, "value_dim": book.value_dim}
    if as_json:
        typer.echo(json.dumps(figures | {"out": str(directory)}))
        return
    typer.echo(f"{len(book):,} keys [D = {book.key_dim}] in {directory}")


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="A saved codebook.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop what cannot be trusted, and list it.")
    ] = False,
    keep_rows: Annotated[
        bool, typer.Option("--keep-rows", help="With --repair: rows stay whose edits are lost.")
    ] = False,
    max_radius: Annotated[
        float | None, typer.Option(help="With --repair: no ball may be wider.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that the directory is signed with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every checksum of a codebook and look every stored query up again.

    With --repair it ends with 0 where nothing was lost, and with 3 where something was.
    """
    key = _key(key_file)
    if repair:
        _repair(directory, key, max_radius, keep_rows, as_json)
        return
    if keep_rows or max_radius is not None:
        _fail("--keep-rows and --max-radius need --repair")
    if _is_bare(directory):
        _verify_files(directory, key, as_json)
        return
    saved, book, history = _open(directory, key)
    verification = history.verify(book, saved.settings.rules(book.dtype))
    if as_json:
        figures = {
            "ok": verification.ok,
            "fires": len(verification.fires),
            "superseded": {str(old): new for old, new in verification.superseded.items()},
            "broken": verification.broken,
        }
        typer.echo(json.dumps(figures))
    else:
        typer.echo(
            f"{len(verification.fires)} edits fire, {len(verification.superseded)} are superseded, "
            f"{len(verification.broken)} are broken"
        )
        for old, new in verification.superseded.items():
            typer.echo(f"edit {old} is superseded by edit {new}")
    if not verification.ok:
        typer.echo(f"broken: edits {verification.broken}", err=True)
        raise typer.Exit(FAILED)


def _key(file: Path | None) -> bytes | None:
    try:
        return None if file is None else file.read_bytes()
    except OSError as error:
        _fail(f"cannot read the key: {error}")


def _repair(
    directory: Path, key: bytes | None, max_radius: float | None, keep_rows: bool, as_json: bool
) -> None:
    try:
        report = repairing.repair(
            directory, hmac_key=key, max_radius=max_radius, keep_rows=keep_rows
        )
    except (OSError, ValueError) as error:
        _fail(str(error))
    dropped = [asdict(each) for each in report.dropped]
    if as_json:
        kept = None if report.kept is None else str(report.kept)
        figures = {"was_sound": report.was_sound, "kept": kept, "dropped": dropped}
        typer.echo(json.dumps(figures | {"made_again": report.made_again}))
    elif report.was_sound:
        typer.echo(f"{directory} is sound; nothing was changed")
    else:
        typer.echo(f"{directory} is sound again; as it was it lies in {report.kept}")
        for each in report.made_again:
            typer.echo(f"made again: {each}")
        table = Table("dropped", "number", "why")
        for one in dropped:
            table.add_row(
                one["what"], "" if one["number"] is None else str(one["number"]), one["why"]
            )
        if dropped:
            Console().print(table)
    if dropped:
        raise typer.Exit(LOST)


def _is_bare(directory: Path) -> bool:
    """Tell whether a directory holds a codebook alone, without a model's edits."""
    try:
        return "settings" not in read_config(directory)
    except (OSError, ValueError) as error:
        _fail(str(error))


def _verify_files(directory: Path, key: bytes | None, as_json: bool) -> None:
    try:
        book = gf.open(directory, verify=True, hmac_key=key)
    except (OSError, ValueError, TypeError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps({"ok": True, "keys": len(book)}))
    else:
        typer.echo(f"{len(book):,} keys and their values are as they were saved")


def _count(rows: str) -> int:
    """Return the number that `10M`, `500k` or `1e6` stands for."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9}
    text = rows.lower().replace("_", "").replace(",", "")
    try:
        count = float(text.rstrip("kmg")) * units.get(text[-1:], 1)
    except ValueError:
        count = 0
    if not 1 <= count < math.inf or text[:-1].rstrip("kmg") != text[:-1]:
        _fail(f"--rows must be a number such as 10M, 500k or 1e6, got {rows!r}")
    return round(count)


def _open(directory: Path, key: bytes | None = None) -> tuple[Saved, gf.Codebook, History]:
    try:
        return read_newest(directory, key)
    except (OSError, ValueError) as error:
        _fail(str(error))


def _edit_fields(edit: Edit, hits: Mapping[int, int]) -> dict[str, Any]:
    return {
        "id": edit.id,
        "outcome": edit.outcome,
        "row": edit.row,
        "radius": edit.radius,
        "distance": None if edit.distance == float("inf") else edit.distance,
        "loss": None if edit.loss != edit.loss else edit.loss,
        "correct": edit.correct,
        "hits": hits.get(edit.row, 0),
        "text": None if edit.text is None else list(edit.text),
    }


def _edit_table(edits: Iterable[Edit], hits: Mapping[int, int]) -> Table:
    table = Table("edit", "outcome", "row", "radius", "distance", "loss", "right", "hits", "text")
    for edit in edits:
        table.add_row(
            str(edit.id),
            edit.outcome,
            str(edit.row),
            f"{edit.radius:.4g}",
            f"{edit.distance:.4g}",
            f"{edit.loss:.3g}",
            "yes" if edit.correct else "no",
            str(hits.get(edit.row, 0)),
            "" if edit.text is None else f"{edit.text[0]} -> {edit.text[1]}",
        )
    return table


def _read_edits(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"cannot read the edits: {error}")
    wanted = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = headers.parse_line(line)
        except (ValueError, RecursionError) as error:
            _fail(f"{path}, line {number} is not JSON: {error}")
        if not isinstance(fields, dict) or "target" not in fields:
            _fail(f"{path}, line {number} must be an object with a prompt and a target")
        if "prompt" not in fields and "messages" not in fields:
            _fail(f"{path}, line {number} must have a prompt or messages, got {sorted(fields)}")
        wanted.append(fields)
    if not wanted:
        _fail(f"{path} holds no edits")
    return wanted


def _load(name: str) -> tuple[Any, Any]:
    """Return a transformers model, of the class its config names, and its tokenizer."""
    try:
        import transformers
    except ModuleNotFoundError:
        _fail("editing a model needs transformers: pip install 'grace_fast[models]'")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if named is None:
            fallback = transformers.AutoModelForCausalLM
            named = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else fallback
        return named.from_pretrained(name).eval(), tokenizer
    except (OSError, ValueError, KeyError) as error:
        _fail(f"cannot load the model {name!r}: {error}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(FAILED)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
