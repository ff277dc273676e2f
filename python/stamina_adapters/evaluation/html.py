# SPDX-License-Identifier: Apache-2.0
"""Parts of the self-contained pages that the commands write."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

STYLE = """
:root{--ink:#1d2026;--soft:#667;--line:#e2e5ea;--paper:#fff;--card:#f6f7f9;--yes:#1d8a4e;--no:#c0392b}
@media(prefers-color-scheme:dark){:root{--ink:#e9ebef;--soft:#a0a7b4;--line:#343a45;--paper:#16181d;
--card:#1f232b;--yes:#4cc38a;--no:#ff7b6b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:40px 24px;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}
h1{font-size:30px;margin:0 0 6px}h2{font-size:20px;margin:44px 0 12px}p{margin:0 0 12px}
.soft{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:26px 0}
.card{background:var(--card);border-radius:12px;padding:16px 18px}
.card b{display:block;font-size:28px;line-height:1.2}.card span{color:var(--soft);font-size:14px}
img{width:100%;border-radius:12px;border:1px solid var(--line);background:#fff}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:8px 10px;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);font-size:14px}th:first-child,td:first-child{text-align:left}
tr:last-child td{font-weight:600}
.scroll{overflow-x:auto}
.bar{display:grid;grid-template-columns:190px 1fr 48px;gap:12px;align-items:center;font-size:14px;
margin:5px 0}
.track{background:var(--card);border-radius:6px;height:14px;overflow:hidden}
.fill{height:14px;border-radius:6px;background:#3b6fd4}
.fill.eager{background:#9aa3b2}
ul{list-style:none;padding:0;margin:0}li{padding:5px 0}
.yes{color:var(--yes)}.no{color:var(--no)}.yes,.no{font-weight:700;display:inline-block;width:36px}
svg{width:100%;height:auto;background:var(--card);border-radius:12px}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.key{font-size:14px;margin-right:16px;white-space:nowrap}
.dot{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
"""


def picture(image: Image.Image, alt: str) -> str:
    """A picture, embedded as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return png(buffer.getvalue(), alt)


def png(data: bytes, alt: str) -> str:
    """A PNG file's bytes as a picture of the page."""
    text = base64.b64encode(data).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{text}">'


def card(value: str, text: str) -> str:
    """A figure in large type over what it is."""
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>'


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are figures."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
