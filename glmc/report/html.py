"""HTML of a report: escaped text, no script, no external file."""
from collections.abc import Iterable, Sequence
from html import escape

from glmc.report.pictures import SMALL, Picture, data_uri

CSS = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1a1c20; --soft: #5d636d; --grid: #d5d8dd;
  --line: #e6e8eb; --accent: #2f7fc1; }
@media (prefers-color-scheme: dark) { :root { --paper: #131518; --card: #1b1e23; --ink: #e8eaed; --soft: #a0a7b2;
  --grid: #3d434c; --line: #2b3038; --accent: #62a8e0; } }
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
.whole { white-space: nowrap; }
.bar { display: inline-block; height: .5rem; background: var(--accent); border-radius: 3px; margin-right: .5rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 1rem; }
.pictures figure { margin: 0; }
.pictures img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; display: block;
  margin-bottom: 4px; background: var(--line); }
.pictures img.small { image-rendering: pixelated; }
.pictures figcaption { overflow-wrap: anywhere; line-height: 1.3; color: var(--ink); }
"""


def html_document(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """Return a complete HTML document.

    Args:
        title: Heading and window title, as plain text.
        subtitle: Line below the heading, as plain text.
        parts: HTML of the body; empty parts are dropped.
    """
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
            f'<style>{CSS}</style></head>\n<body><main><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>\n'
            + '\n'.join(filter(None, parts)) + '\n</main></body></html>\n')


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


def table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a table, first column left-aligned, numbers right-aligned.

    Args:
        head: Column titles; all empty for a list of names and values.
        rows: Cells; text is escaped unless it is Html.
    """
    titles = ''.join(f'<th>{escape(text)}</th>' for text in head)
    body = ''.join('<tr>' + ''.join(f'<td>{_cell(value)}</td>' for value in row) + '</tr>' for row in rows)
    kind = '' if any(head) else ' class="metadata"'
    return f'<table{kind}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value) -> str:
    if isinstance(value, Html):
        return value
    return escape(f'{value:,}' if isinstance(value, int) else str(value))


def picture_section(title: str, text: str, pictures: Sequence[Picture]) -> str:
    """Return a titled grid of pictures below a line of text; empty without pictures."""
    if not pictures:
        return ''
    return section(title, f'<p>{escape(text)}</p><div class="pictures">{"".join(map(_picture, pictures))}</div>')


def _picture(picture: Picture) -> str:
    images = ''.join(
        f'<img src="{data_uri(image)}" alt="{escape(picture.caption)}"{" class=small" if max(image.size) <= SMALL else ""}>'
        for image in picture.images)
    detail = f'<div class="detail">{escape(picture.detail)}</div>' if picture.detail else ''
    return f'<figure>{images}<figcaption>{escape(picture.caption)}{detail}</figcaption></figure>'
