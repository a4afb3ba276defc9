"""The command line: try it, edit a model, evaluate and calibrate, look at a codebook, verify, time.

Every command prints a table, or with `--json` one object, and ends with

    0    all is well
    1    something is wrong, or was left out: an error, an edit not learnt, a line of a file refused
    2    it could not begin: a wrong call, or an extra that is not installed (it is named)
    3    a directory was repaired, and not all of it is there any more

Commands that look after a codebook need nothing but `pip install .`.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import grace_fast as gf
from grace_fast import errors
from grace_fast.codebook.printable import listed
from grace_fast.editor import prompts
from grace_fast.editor.attach import Saved, read_saved
from grace_fast.edits import verify as replays
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History
from grace_fast.store import archive
from grace_fast.store import repair as repairing
from grace_fast.store.files import read_config, steadily
from grace_fast.store.saved import Offline, read_newest
from grace_fast.store.versions import difference, journal_of
from grace_fast.tools import textfiles
from grace_fast.tools.terminal import guard, say, say_json, table, ticking
from grace_fast.tools.textfiles import Record

try:
    import rich  # noqa: F401  (typer imports it only when it has something to draw)
    import typer
except ImportError:
    from grace_fast.tools import arguments as typer  # type: ignore[no-redef]

app = typer.Typer(
    help="GRACE: lifelong edits of a language model, found again exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Do nothing where a line is wrong, or cannot be edited.")
]
FAILED = 1
CANNOT_BEGIN = 2
LOST = 3  # it was repaired, and not all of it is there any more


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Take a function for a command, which says in one line what it needs and is not installed."""

    def take(function: Callable[..., None]) -> Callable[..., None]:
        called = name or function.__name__

        @functools.wraps(function)
        def guarded(*given: Any, **named: Any) -> None:
            try:
                function(*given, **named)
            except ImportError as error:
                _fail(errors.told(f"grace-fast {called}", error), CANNOT_BEGIN)

        app.command(name)(guarded)
        return function

    return take


@app.callback()
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """GRACE: lifelong edits of a language model, found again exactly."""
    if show:
        say(gf.__version__)
        raise typer.Exit


@command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the codebook, table and plot go.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the classifier and the order of edits.")] = 0,
    as_json: Json = False,
) -> None:
    """Repair the real mistakes of a real model, offline, and show what it cost."""
    from grace_fast.tools.demo import run

    figures = run(out, seed=seed, as_json=as_json)
    if as_json:
        say_json(figures)
    if not figures["passed"]:
        raise typer.Exit(FAILED)


@command()
def edit(
    model: Annotated[str, typer.Argument(help="A transformers model: a directory or a hub name.")],
    layer: Annotated[str, typer.Option(help="Dotted name of the layer to edit.")],
    edits: Annotated[
        Path,
        typer.Option(
            help='JSON lines {"prompt": ..., "target": ...}, a JSON array, or CSV. Chat has '
            'messages in place of a prompt; "joint" is what stands between prompt and target.'
        ),
    ],
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
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Edit a model with every line of a file and save the codebook.

    A line that cannot be edited is named and left out, and the command ends with code 1.
    """
    refused: list[_Refused] = []
    wanted = _read_edits(edits, refused, strict)
    if any("messages" in record for record in wanted):
        errors.require("a chat template", "jinja2")
    _require_writable(out)
    loaded, tokenizer = _load(model)
    settings: dict[str, Any] = {
        "epsilon": epsilon,
        "replacement": replacement,
        "iterations": iterations,
        "learning_rate": learning_rate,
        "value_init": value_init,
        "store_text": store_text,
    }
    made, failed = [], list[_Refused]()
    try:
        grace = gf.attach(loaded, layer, tokenizer=tokenizer, **settings)
        for record in ticking(wanted, "edits", "edit"):
            prompt = record["messages"] if "messages" in record else record["prompt"]
            try:
                made.append(grace.edit(prompt, record["target"], joint=record.get("joint")))
            except ImportError:
                raise
            except (
                Exception
            ) as error:  # of the model, its tokenizer or the record: the next goes on
                failed.append(_Refused(record, f"{edits}, {record.place}: {_said(error)}"))
                if strict:
                    break
        _tell(failed)
        if not made or (failed and strict):
            _fail("no codebook was saved")
        verification = grace.verify()
        grace.save_pretrained(out)
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error))
    refused += failed
    wrong = [report.id for report in made if not report.correct]
    figures = {
        "edits": len(made),
        "keys": len(grace.codebook),
        "not_learnt": wrong,
        "refused": [one.why for one in refused],
        "broken": verification.broken,
        "superseded": len(verification.superseded),
        "out": str(out),
    }
    if as_json:
        say_json(figures)
    else:
        _edit_table(made, {})
        say(f"{len(made)} edits on {figures['keys']} keys saved to {out}")
        if refused:
            say(f"left out: {listed(one.record.place for one in refused)} of {edits}", err=True)
        if wrong:
            say(f"not learnt: edits {wrong}; try more iterations or another layer", err=True)
    if wrong or refused or not verification.ok:
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class _Refused:
    """A record of a file that was left out."""

    record: Record
    why: str


def _tell(refused: Iterable[_Refused]) -> None:
    for one in refused:
        say(f"error: {one.why}", err=True)


def _said(error: Exception) -> str:
    """Return what an error of one edit says: by its kind where its words alone say little."""
    is_ours = isinstance(error, ValueError | TypeError)
    return str(error) if is_ours else f"{type(error).__name__}: {error}"


@command()
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
        from grace_fast.tools.evaluate import run

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
    except (ValueError, LookupError, OSError) as error:
        _fail(str(error))
    if as_json:
        say_json(figures)
    if figures["broken"]:
        raise typer.Exit(FAILED)


@command()
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
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Find layer and epsilon from a sample of edits, and say how sure they are.

    Ends with code 1 where too few edits can be learnt at any of the layers, or a line of a file is
    wrong: it is named and left out.
    """
    refused: list[str] = []
    try:
        from grace_fast.tools.evaluate import OFFLINE, given, load
        from grace_fast.tools.evaluate.calibration import report_on

        if model in OFFLINE:
            task = load(model, seed, cache, None, progress=True)
        else:
            if not layer or edits is None or unrelated is None:
                _fail("calibrating a model needs --layer, --edits and --unrelated")
            sample = given.sample(edits, unrelated, None if strict else refused)
            for why in refused:
                say(f"error: {why}", err=True)
            task = given.task(*_load(model), sample, layer, replacement, budget)
        found = report_on(task, plot, seed, as_json, tries)
    except (ValueError, LookupError, OSError) as error:
        _fail(str(error))
    if as_json:
        say_json({**found, "refused": refused})
    if refused or not found["learnable"]:
        raise typer.Exit(FAILED)


@command()
def info(
    directory: Annotated[Path, typer.Argument(help="A saved codebook.")], as_json: Json = False
) -> None:
    """List the edits of a codebook: radii, hits, and the text where it was stored."""
    saved, book, history = _open(directory)
    listed = list(history.edits.values())
    if as_json:
        rows = [_edit_fields(edit, saved.hits) for edit in listed]
        settings = saved.config["settings"]
        say_json({"settings": settings, "keys": len(book), "edits": rows})
        return
    say(f"{directory}: {len(listed)} edits on {len(book)} keys at {saved.settings.layer}")
    _edit_table(listed, saved.hits)


@command()
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
        from grace_fast.tools.report import write

        figures = write(directory, out, key)
    except (OSError, ValueError) as error:
        _fail(str(error))
    said = f"{out}: {figures['edits']} edits on {figures['keys']} keys"
    _answer(figures, said, as_json)


@command()
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
        say_json({"base": saved.base, "versions": named})
        return
    say(f"{directory}: {len(entries)} versions after version {saved.base}, the base")
    rows = [(number, _when(seconds), kind) for number, seconds, kind in entries]
    table(("version", "time", "kind"), rows)


def _when(seconds: float) -> str:
    """Return a time as it was written; one that no calendar has as the number it is."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return f"{seconds!r}"


@command()
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
        say_json(asdict(found))
        return
    say(f"edits made: {found.made}")
    say(f"edits undone: {found.undone}")
    say(f"rows added: {found.added}")
    say(f"rows removed: {found.removed}")
    say(f"rows with other values: {found.values}")
    for row, (before, after) in found.radii.items():
        say(f"row {row}: radius {before:.6g} -> {after:.6g}")


@command()
def checkout(
    directory: Annotated[Path, typer.Argument(help="A codebook that attach(path=) edits.")],
    to: Annotated[int, typer.Argument(metavar="VERSION", help="As `log` lists them.")],
    as_json: Json = False,
) -> None:
    """Go back to an earlier version, in a new version that can itself be taken back."""
    figures = _change(directory, lambda offline: offline.checkout(to))
    said = f"version {figures['version']} decides as version {to}: {figures['keys']} keys"
    _answer(figures, said, as_json)


@command()
def compact(
    directory: Annotated[Path, typer.Argument(help="A codebook that attach(path=) edits.")],
    as_json: Json = False,
) -> None:
    """Make the newest version the base; earlier versions go, every edit stays."""
    figures = _change(directory, Offline.compact)
    said = f"version {figures['version']} is the base of {directory}: {figures['keys']} keys"
    _answer(figures, said, as_json)


def _change(directory: Path, way: Callable[[Offline], None]) -> dict[str, int]:
    """Change a codebook without its model; return its version and the number of its keys."""
    try:
        with closing(Offline(directory)) as offline:
            way(offline)
            return {"version": offline.book.version, "keys": len(offline.book)}
    except (OSError, ValueError) as error:
        _fail(str(error))


@command("export")
def export_(
    directory: Annotated[Path, typer.Argument(help="A saved codebook.")],
    file: Annotated[Path, typer.Argument(help="One file that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Write a codebook and its edits to one file, to be carried elsewhere."""
    _carry(archive.pack, directory, file, as_json)


@command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that `export` wrote.")],
    directory: Annotated[Path, typer.Argument(help="Absent or empty.")],
    as_json: Json = False,
) -> None:
    """Make a directory of a file that was exported, once all of it was tested."""
    _carry(archive.unpack, file, directory, as_json)


def _carry(way: Callable[[Path, Path], int], source: Path, target: Path, as_json: bool) -> None:
    try:
        edits = way(source, target)
    except (OSError, ValueError) as error:
        _fail(str(error))
    figures = {"edits": edits, "out": str(target)}
    _answer(figures, f"{edits} edits in {target}", as_json)


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
        _fail("choose --quick or --rows; for more, in the source tree, run `make bench`")
    try:
        figures = (
            large.run(_count(rows), folder, as_json) if rows else quick_bench.run(as_json=as_json)
        )
    except OSError as error:
        _fail(str(error))
    if as_json:
        say_json(figures)
    if not figures["passed"]:
        raise typer.Exit(FAILED)


@command()
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

    try:
        given = FilesOfRows(shards, radius)
        book = gf.build(directory, given.blocks, rows=given.rows, threads=threads)
    except (OSError, ValueError, TypeError) as error:
        _fail(str(error))
    figures = {"keys": len(book), "key_dim": book.key_dim, "value_dim": book.value_dim}
    if as_json:
        say_json(figures | {"out": str(directory)})
        return
    say(f"{len(book):,} keys [D = {book.key_dim}] in {directory}")


@command()
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
    verification = replays.verify(history, book, saved.settings.rules(book.dtype))
    if as_json:
        figures = {
            "ok": verification.ok,
            "fires": len(verification.fires),
            "superseded": {str(old): new for old, new in verification.superseded.items()},
            "broken": verification.broken,
        }
        say_json(figures)
    else:
        say(
            f"{len(verification.fires)} edits fire, {len(verification.superseded)} are superseded, "
            f"{len(verification.broken)} are broken"
        )
        for old, new in verification.superseded.items():
            say(f"edit {old} is superseded by edit {new}")
    if not verification.ok:
        say(f"broken: edits {verification.broken}", err=True)
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
        say_json(figures | {"made_again": report.made_again})
    elif report.was_sound:
        say(f"{directory} is sound; nothing was changed")
    else:
        say(f"{directory} is sound again; as it was it lies in {report.kept}")
        for each in report.made_again:
            say(f"made again: {each}")
        if dropped:
            numbers = ["" if one["number"] is None else one["number"] for one in dropped]
            rows = [(one["what"], at, one["why"]) for one, at in zip(dropped, numbers, strict=True)]
            table(("dropped", "number", "why"), rows)
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
        say_json({"ok": True, "keys": len(book)})
    else:
        say(f"{len(book):,} keys and their values are as they were saved")


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


def _edit_table(edits: Iterable[Edit], hits: Mapping[int, int]) -> None:
    columns = ("edit", "outcome", "row", "radius", "distance", "loss", "right", "hits", "text")
    rows = [
        (
            edit.id,
            edit.outcome,
            edit.row,
            f"{edit.radius:.4g}",
            f"{edit.distance:.4g}",
            f"{edit.loss:.3g}",
            "yes" if edit.correct else "no",
            hits.get(edit.row, 0),
            "" if edit.text is None else f"{edit.text[0]} -> {edit.text[1]}",
        )
        for edit in edits
    ]
    table(columns, rows)


def _read_edits(
    path: Path, refused: list[_Refused] | None = None, strict: bool = False
) -> list[Record]:
    """Return the edits of a file, and say what is wrong with its other records.

    refused: takes up those; strict: end the command where there are any, not only where there is
    nothing else.
    """
    try:
        found = [(record, _odd_edit(record)) for record in textfiles.read(path)]
    except (OSError, ValueError) as error:
        _fail(f"cannot read the edits: {error}")
    odd = [_Refused(record, f"{path}, {record.place} {why}") for record, why in found if why]
    _tell(odd)
    if not found:
        _fail(f"{path} holds no edits")
    if odd and (strict or len(odd) == len(found)):
        _fail("nothing was edited")
    if refused is not None:
        refused.extend(odd)
    return [record for record, why in found if not why]


def _odd_edit(record: Record) -> str:
    """Return why a record is no edit, as it follows its place; "" where it is one."""
    if record.wrong:
        return record.wrong
    # Records of one table have all of its fields: those that say nothing are left empty.
    if record.get("joint", "") is None:
        del record["joint"]
    for name, other in (("messages", "prompt"), ("prompt", "messages")):
        if record.get(name, 0) in (None, "", []) and other in record:
            del record[name]
    if "target" not in record:
        return f"must be an object with a prompt and a target, got {sorted(record)}"
    if "prompt" not in record and "messages" not in record:
        return f"must have a prompt or messages, got {sorted(record)}"
    if not isinstance(record.get("joint", ""), str):
        return f"must have a text as its joint, got {textfiles.brief(record['joint'])}"
    if not isinstance(record.get("messages", []), list):
        return f"must have a list as its messages, got {textfiles.brief(record['messages'])}"
    try:
        prompts.one_prompt(record["messages"] if "messages" in record else record["prompt"])
        target = prompts.one_target(record["target"])
    except (ValueError, TypeError) as error:
        return f"has no edit: {error}"
    if target is None or not str(target).strip():
        return f"has no target: it must be a text or a number, got {target!r}"
    prompt = record.get("prompt", "messages")
    return "" if str(prompt).strip() else f"has no prompt: got {prompt!r}"


def _require_writable(out: Path) -> None:
    """Find out before the work whether its end can be kept."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        _fail(f"{out} cannot be written: {place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        _fail(f"{out} cannot be written: nobody but its owner may write to {place}")


def _load(name: str) -> tuple[Any, Any]:
    """Return a transformers model, of the class its config names, and its tokenizer."""
    errors.require("editing a model", "transformers")
    import transformers

    try:
        # A stranger's directory may hold code: it is refused rather than asked about.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if named is None:
            fallback = transformers.AutoModelForCausalLM
            named = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else fallback
        return named.from_pretrained(name).eval(), tokenizer
    except ImportError:
        raise
    except Exception as error:  # readers of its files have errors of their own kinds
        _fail(f"cannot load the model {name!r}: {' '.join(str(error).split())}")


def _answer(figures: Mapping[str, Any], said: str, as_json: bool) -> None:
    if as_json:
        say_json(figures)
    else:
        say(said)


def _fail(message: str, code: int = FAILED) -> NoReturn:
    say(f"error: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line."""
    guard()
    try:
        app()
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
