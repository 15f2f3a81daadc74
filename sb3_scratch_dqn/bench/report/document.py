"""A document with two renderings: Markdown with separate picture files, and one HTML page."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sb3_scratch_dqn.bench.speed.timing import table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #eee; text-align: left; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
code, pre { background: #f5f5f5; border-radius: 3px; } code { padding: 0 .25rem; }
pre { padding: .75rem; overflow-x: auto; }
"""


@dataclass
class Document:
    """A sequence of parts, each rendered as Markdown and as HTML. Texts may contain `code` and **bold**.

    :param title: the title of the page
    """

    title: str
    pictures: dict[str, bytes] = field(default_factory=dict)
    _markdown: list[str] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Add the heading of a section."""
        self._add(f"## {text}", f"<h2>{_inline(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._add(text, f"<p>{_inline(text)}</p>")

    def items(self, texts: Sequence[str]) -> None:
        """Add a bullet list, or nothing if there are no texts."""
        if not texts:
            return
        items = "".join(f"<li>{_inline(text)}</li>\n" for text in texts)
        self._add("\n".join(f"- {text}" for text in texts), f"<ul>\n{items}</ul>")

    def code(self, text: str) -> None:
        """Add shell commands."""
        self._add(f"```sh\n{text}\n```", f"<pre>{html.escape(text)}</pre>")

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Add a table."""

        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>\n"

        body = "".join(row(cells, "td") for cells in rows)
        self._add(table(header, rows), f"<table>\n<thead>{row(header, 'th')}</thead>\n<tbody>{body}</tbody>\n</table>")

    def picture(self, name: str, png: bytes, caption: str) -> None:
        """Add a picture.

        :param name: the name of its file, without a suffix
        :param png: the content of the file
        :param caption: its caption and alternative text
        """
        self.pictures[f"{name}.png"] = png
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        alt = html.escape(caption, quote=True)
        self._add(
            f"![{caption}]({name}.png)\n\n*{caption}*",
            f'<figure><img src="{source}" alt="{alt}"><figcaption>{_inline(caption)}</figcaption></figure>',
        )

    def _add(self, markdown: str, as_html: str) -> None:
        self._markdown.append(markdown)
        self._html.append(as_html)

    def markdown(self) -> str:
        """Render the document as Markdown."""
        return "\n\n".join([f"# {self.title}", *self._markdown]) + "\n"

    def html(self) -> str:
        """Render the document as one HTML page with embedded pictures."""
        body = "\n".join(self._html)
        title = html.escape(self.title)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )

    def save(self, folder: Path, picture_names: re.Pattern[str]) -> None:
        """Write ``report.md``, its pictures, and ``report.html``.

        :param folder: the output folder; created if it does not exist
        :param picture_names: matches the names of all pictures that a report can have; matching files in the folder
            that this document does not have are removed
        """
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.png"):
            if picture_names.fullmatch(path.name) and path.name not in self.pictures:
                path.unlink()
        for name, png in self.pictures.items():
            (folder / name).write_bytes(png)
        (folder / "report.md").write_text(self.markdown())
        (folder / "report.html").write_text(self.html())


def _inline(text: str) -> str:
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)
