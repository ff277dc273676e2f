# SPDX-License-Identifier: Apache-2.0
"""Pictures side by side, with titles."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_INK, _PAPER = (32, 33, 36), (255, 255, 255)
_GAP, _BLOCK_GAP, _HEADER, _LABEL, _FONT = 4, 22, 40, 150, 17


def image_grid(
    rows: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]],
    titles: Sequence[str],
    cell: int = 112,
) -> Image.Image:
    """A picture table: one row for each concept, one block of columns for each title.

    `rows` holds (label, blocks) with as many blocks as titles; block k has the same number of
    pictures in every row. Pictures are scaled to `cell` x `cell` pixels; of one that is not square,
    the centre is shown, as training and judging see it.

    Raises `ValueError` when the rows do not fit together.
    """
    widths = [len(block) for block in rows[0][1]] if rows else []
    for label, blocks in rows:
        if [len(block) for block in blocks] != widths or len(blocks) != len(titles):
            raise ValueError(
                f"row {label!r} must hold {len(titles)} blocks of {widths} pictures, "
                f"not {[len(block) for block in blocks]}"
            )
    if not rows or not all(widths):
        raise ValueError("rows must hold at least one picture in every block")
    starts = [_LABEL]
    for width in widths:
        starts.append(starts[-1] + width * (cell + _GAP) + _BLOCK_GAP)
    canvas = Image.new(
        "RGB", (starts[-1] - _BLOCK_GAP + _GAP, _HEADER + len(rows) * (cell + _GAP) + _GAP), _PAPER
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT)
    for title, start in zip(titles, starts, strict=False):
        draw.text((start, _HEADER // 2), title, _INK, font, anchor="lm")
    for index, (label, blocks) in enumerate(rows):
        top = _HEADER + index * (cell + _GAP)
        draw.text((_GAP * 3, top + cell // 2), label, _INK, font, anchor="lm")
        for block, start in zip(blocks, starts, strict=False):
            for column, image in enumerate(block):
                rgb = image.convert("RGB")
                tile = ImageOps.fit(rgb, (cell, cell), Image.Resampling.BICUBIC)
                canvas.paste(tile, (start + column * (cell + _GAP), top))
    return canvas
