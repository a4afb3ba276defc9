"""File of edits: its records checked, those that are none told by their line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from grace_fast.editor import prompts
from grace_fast.tools import textfiles
from grace_fast.tools.cli.command import fail
from grace_fast.tools.terminal import say
from grace_fast.tools.textfiles import Record


def _tell(refused: Iterable[Record]) -> None:
    for record in refused:
        say(f"error: {record.wrong}", err=True)


def read_edits(
    path: Path, refused: list[Record] | None = None, strict: bool = False
) -> list[Record]:
    """Return the edits of a file, and say what is wrong with its other records.

    refused: takes up those, with what is wrong; strict: end the command where there are any, not
    only where there is nothing else.
    """
    try:
        found = textfiles.read(path)
    except (OSError, ValueError) as error:
        fail(f"cannot read the edits: {error}")
    for record in found:
        if why := _odd_edit(record):
            record.wrong = f"{path}, {record.place} {why}"
    odd = [record for record in found if record.wrong]
    _tell(odd)
    if not found:
        fail(f"{path} holds no edits")
    if odd and (strict or len(odd) == len(found)):
        fail("nothing was edited")
    if refused is not None:
        refused.extend(odd)
    return [record for record in found if not record.wrong]


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
    if why := _odd_paraphrases(record):
        return why
    try:
        prompts.one_prompt(record["messages"] if "messages" in record else record["prompt"])
        target = prompts.one_target(record["target"])
    except (ValueError, TypeError) as error:
        return f"has no edit: {error}"
    if target is None or not str(target).strip():
        return f"has no target: it must be a text or a number, got {target!r}"
    prompt = record.get("prompt", "messages")
    return "" if str(prompt).strip() else f"has no prompt: got {prompt!r}"


def _odd_paraphrases(record: Record) -> str:
    """Make the paraphrases of a record a list, where it has any; return what is wrong with them."""
    found = record.pop("paraphrases", None)
    if found in (None, "", []):
        return ""
    every = [found] if isinstance(found, str) else found  # a cell of CSV
    is_list = isinstance(every, list)
    if not is_list or not all(isinstance(one, str) and one.strip() for one in every):
        return f"must have a list of texts as its paraphrases, got {textfiles.brief(found)}"
    record["paraphrases"] = every
    return ""
