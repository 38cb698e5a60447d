"""HTML of a report: escaped text, one script that sorts tables, no external file."""
import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from glmc.report.pictures import SMALL, Picture, data_uri

CSS = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1a1c20; --soft: #5d636d; --grid: #d5d8dd;
  --line: #e6e8eb; --accent: #2f7fc1; --gain: #24784a; --loss: #b93a4b; }
@media (prefers-color-scheme: dark) { :root { --paper: #131518; --card: #1b1e23; --ink: #e8eaed; --soft: #a0a7b2;
  --grid: #3d434c; --line: #2b3038; --accent: #62a8e0; --gain: #6fc797; --loss: #f08a97; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
p { color: var(--soft); margin: .3rem 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(98px, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tiles div, section, .figures figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles div { padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.55rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles span, figcaption, .detail { color: var(--soft); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem;
  margin: 1rem 0; }
.figures figure { margin: 0; padding: 1rem; }
.figures svg { width: 100%; height: auto; display: block; }
.figures svg text { font-family: inherit !important; }
section { padding: 1rem; margin: 1rem 0; overflow-x: auto; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 0 1rem;
  align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th { text-align: left; vertical-align: bottom; color: var(--soft); font-weight: 500; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
td:first-child { min-width: 7.5rem; }
th:not(:first-child), td:not(:first-child) { text-align: right; }
.metadata td:nth-child(2) { text-align: left; font-family: ui-monospace, monospace; font-size: .82rem; }
.metadata td:first-child { min-width: 0; white-space: nowrap; color: var(--soft); vertical-align: top; }
.metadata thead { display: none; }
.causes td:last-child, .causes th:last-child { text-align: left; padding-left: 1.2rem; }
.sortable th[aria-sort] { cursor: pointer; }
th[aria-sort=ascending]::after { content: ' ▲'; }
th[aria-sort=descending]::after { content: ' ▼'; }
summary { cursor: pointer; font-size: 1.1rem; }
.gain { color: var(--gain); }
.loss { color: var(--loss); }
.hover > :hover { stroke: currentColor; stroke-width: 1.5; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { .causes tr { display: grid; grid-template-columns: 1fr auto auto auto; }
  .causes thead { display: none; } .causes td { border: 0; }
  .causes td:last-child { grid-column: 1 / -1; padding: 0 0 .5rem; border-bottom: 1px solid var(--line); } }
.whole { white-space: nowrap; }
.bar { display: inline-block; height: .5rem; background: var(--accent); border-radius: 3px; margin-right: .5rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 1rem; }
.pictures figure { margin: 0; }
.pictures img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; display: block;
  margin-bottom: 4px; background: var(--line); }
.pictures img.small { image-rendering: pixelated; }
.pictures figcaption { overflow-wrap: anywhere; line-height: 1.3; color: var(--ink); }
"""
SORT = """
for (const head of document.querySelectorAll('.sortable th')) {
  const value = row => {
    const text = row.cells[head.cellIndex].textContent.trim();
    const number = text === '' ? NaN : Number(text.replace(/,/g, '').replace('\u2212', '-').replace('+', ''));
    return Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => typeof a !== typeof b ? (typeof a === 'number' ? -1 : 1)
    : typeof a === 'number' ? a - b : a.localeCompare(b);
  const sort = () => {
    const table = head.closest('table'), sign = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    for (const other of table.querySelectorAll('th')) other.setAttribute('aria-sort', 'none');
    head.setAttribute('aria-sort', sign === 1 ? 'ascending' : 'descending');
    table.tBodies[0].append(...Array.from(table.tBodies[0].rows, row => [value(row), row])
      .sort((a, b) => sign * compare(a[0], b[0])).map(pair => pair[1]));
  };
  head.setAttribute('aria-sort', 'none');
  head.tabIndex = 0;
  head.addEventListener('click', sort);
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(); });
}
"""  # without JavaScript the order stays as written
POLICY = ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
          f"{base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()}'")  # nothing is loaded, only SORT runs


def html_document(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """Return a complete HTML document, which loads nothing and runs no script but SORT.

    Args:
        title: Heading and window title, as plain text.
        subtitle: Line below the heading, as plain text.
        parts: HTML of the body; empty parts are dropped.
    """
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>'
            f'<style>{CSS}</style></head>\n<body><main><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>\n'
            + '\n'.join(filter(None, parts)) + f'\n</main><script>{SORT}</script></body></html>\n')


def tiles(numbers: dict[str, str]) -> str:
    """Return a row of large numbers; label -> value."""
    cells = (f'<div><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in numbers.items())
    return f'<div class="tiles">{"".join(cells)}</div>'


def figure(title: str, svg: str) -> str:
    """Return a titled figure."""
    return f'<figure><h2>{escape(title)}</h2>{svg}</figure>'


def columns(*parts: str) -> str:
    """Return parts side by side, or below each other on a narrow screen."""
    return f'<div class="columns">{"".join(parts)}</div>'


def section(title: str, content: str) -> str:
    """Return a titled box; the content is HTML."""
    return f'<section><h2>{escape(title)}</h2>{content}</section>'


class Html(str):
    """HTML that `table` does not escape."""


def bar(percent: float) -> Html:
    """Return a number with a bar of proportional length."""
    return Html(f'<span class="whole"><span class="bar" style="width:{percent * 0.6:.0f}px"></span>{percent:.1f}</span>')


def change(points: float | None) -> Html:
    """Return a signed number, marked as a gain or a loss; a dash for None."""
    if points is None:
        return Html('–')
    kind = 'gain' if points > 0 else 'loss' if points < 0 else ''
    number = f'{points:+.1f}'.replace('-', '\u2212')
    return Html(f'<span class="{kind}">{number}</span>' if kind else '0.0')


def paragraph(text: str) -> str:
    """Return a plain text as a paragraph."""
    return f'<p>{escape(text)}</p>'


def items(texts: Iterable[str]) -> str:
    """Return a list of plain texts."""
    return f'<ul>{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>'


def details(title: str, content: str, is_open: bool) -> str:
    """Return a box that a click on its title opens; the content is HTML."""
    return f'<section><details{" open" if is_open else ""}><summary>{escape(title)}</summary>{content}</details></section>'


def table(head: Sequence[str], rows: Iterable[Sequence], kind: str = '') -> str:
    """Return a table, first column left-aligned, numbers right-aligned.

    Args:
        head: Column titles; all empty for a list of names and values.
        rows: Cells; text is escaped unless it is Html.
        kind: `sortable`, `causes` (text in the last column), or empty.
    """
    titles = ''.join(f'<th>{escape(text)}</th>' for text in head)
    body = ''.join('<tr>' + ''.join(f'<td>{_cell(value)}</td>' for value in row) + '</tr>' for row in rows)
    kind = kind if any(head) else 'metadata'
    return f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value) -> str:
    if isinstance(value, Html):
        return value
    return escape(f'{value:,}' if isinstance(value, int) else str(value))


def picture_section(title: str, text: str, pictures: Sequence[Picture]) -> str:
    """Return a titled grid of pictures below a line of text; empty without pictures."""
    if not pictures:
        return ''
    return section(title, f'{paragraph(text)}<div class="pictures">{"".join(map(_picture, pictures))}</div>')


def _picture(picture: Picture) -> str:
    images = ''.join(
        f'<img src="{data_uri(image)}" alt="{escape(picture.caption)}"{" class=small" if max(image.size) <= SMALL else ""}>'
        for image in picture.images)
    detail = f'<div class="detail">{escape(picture.detail)}</div>' if picture.detail else ''
    return f'<figure>{images}<figcaption>{escape(picture.caption)}{detail}</figcaption></figure>'
