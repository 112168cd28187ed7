"""All studies' tables and pictures in one Markdown file and one HTML file that needs no other."""

import base64
import html
import re
from pathlib import Path

from mythos_ds.errors import LabError
from mythos_ds.io import write_atomic

_PICTURE = re.compile(r"!\[[^]]*\]\(([^)]+)\)")
_HEAD = (
    "<!doctype html><meta charset='utf-8'><title>mythos_ds: studies</title><style>body{font:15px sans-serif;"
    "max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;font-size:13px}td,th{border:1px solid "
    "#bbb;padding:.2em .5em;text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}</style>"
)


def write_summary(docs: Path) -> Path:
    """Joins docs/*/results.md to report.md and report.html; returns the latter. Raises LabError where there is none."""
    found = sorted(docs.glob("*/results.md"))
    if not found:
        raise LabError(f"{docs}: no results yet; run a study first, such as: mythos-ds lab khop")
    pages, bodies = ["# Studies", ""], [_HEAD, "<h1>Studies</h1>"]
    for path in found:
        text = path.read_text(encoding="utf-8")
        name = path.parent.name
        pages += [f"## {name}", "", _PICTURE.sub(rf"![]({name}/\1)", text)]
        bodies += [f"<h2>{html.escape(name)}</h2>", _to_html(text, path.parent)]
    write_atomic(docs / "report.md", "\n".join(pages))
    write_atomic(docs / "report.html", "\n".join(bodies))
    return docs / "report.html"


def _to_html(text: str, folder: Path) -> str:
    """The Markdown that write_report writes: bullets, bold lines, tables, pictures."""
    parts: list[str] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([html.escape(cell.strip()) for cell in line.strip("|").split("|")])
            continue
        if rows:
            parts.append(_table([rows[0], *rows[2:]]))
            rows = []
        picture = _PICTURE.match(line)
        if picture:
            data = base64.b64encode((folder / picture[1]).read_bytes()).decode()
            parts.append(f"<p><img alt='{html.escape(picture[1])}' src='data:image/png;base64,{data}'></p>")
        elif line and not line.startswith("<!--"):
            parts.append(f"<p>{html.escape(line.strip('*').strip()).replace('`', '')}</p>")
    return "\n".join(parts)


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><tr>{head}</tr>{body}</table>"
