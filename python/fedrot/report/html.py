"""Self-contained HTML pages: text, tables and embedded pictures, for light and dark."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from html import escape
from typing import Protocol

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f6f8fa; --ink: #1f2328; --soft: #59636e;
  --line: #d8dee4; --accent: #0072b2; --note: #fff8e6; --note-line: #e0b94f; }
@media (prefers-color-scheme: dark) { :root { --paper: #161b22; --page: #0d1117; --ink: #e6edf3;
  --soft: #9aa4b2; --line: #2d333b; --accent: #56b4e9; --note: #2b2414; --note-line: #8a6d1f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.lead { color: var(--soft); margin: 0 0 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--paper); font-size: .92rem;
  border: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .65rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.words1 :is(th, td):nth-child(-n+1), .words2 :is(th, td):nth-child(-n+2),
.words9 :is(th, td) { text-align: left; white-space: normal; }
tr:last-child td { border-bottom: 0; }
figure { margin: 1rem 0; padding: .75rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .5rem; }
.note { background: var(--note); border-left: 4px solid var(--note-line); padding: .6rem .9rem;
  margin: 1rem 0; border-radius: 4px; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
details summary { cursor: pointer; color: var(--accent); margin: 1rem 0; }
"""


class Picture(Protocol):
    """Draws itself as PNG for a page, ``"light"`` or ``"dark"``."""

    def __call__(self, *, theme: str) -> bytes: ...


Pictures = dict[str, tuple[Picture, str]]  # file name -> (picture, caption)


def drawn_once(pictures: Pictures) -> Pictures:
    """The same pictures, which keep what they have drawn: a light one is a file and on the page."""
    return {name: (functools.cache(draw), caption) for name, (draw, caption) in pictures.items()}


def page(title: str, lead: str, *parts: str) -> str:
    """A whole document. ``parts`` are HTML, ``title`` and ``lead`` plain text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph that must not be overlooked."""
    return f'<p class="note">{escape(text)}</p>'


def code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def details(summary: str, *parts: str) -> str:
    """Folded away until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 9) -> str:
    """Cells are plain text. ``words``: how many columns (1, 2 or all 9) are words, not numbers."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if header else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="words{words}">{head}<tbody>{body}</tbody></table></div>'
    )


def figure(picture: Picture, caption: str) -> str:
    """A picture in the colours of the reader's page, embedded."""
    light, dark = (base64.b64encode(picture(theme=theme)).decode() for theme in ("light", "dark"))
    return (
        '<figure><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}"><img alt="{escape(caption)}" '
        f'src="data:image/png;base64,{light}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
