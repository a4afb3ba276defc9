"""Rendering of the page: templates that are given facts, and nothing in them that can run.

What is printed goes through `_printed` (an end, nothing hidden) and Jinja's escaping. The page has
no script, loads nothing, and says so to the browser: its policy allows the one style sheet in it,
by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace_fast import errors
from grace_fast.tools.report.texts import inert, number, share

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
except ModuleNotFoundError as error:
    raise errors.missing("a codebook's page", error.name or "jinja2", "report") from error

TEMPLATES = Path(__file__).parent


def render(facts: Mapping[str, Any]) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "brief": lambda value: number(value, digits=3),
        "count": lambda value: f"{value:,}",
        "s": lambda value: "" if value == 1 else "s",
        "share": share,
    }
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    # The style sheet is ours; as markup it is put in as it is.
    return environment.get_template("page.html").render(
        facts, style=Markup(style), policy=Markup(policy)
    )


def _printed(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        return number(value)
    return inert(value) if isinstance(value, str) else value
