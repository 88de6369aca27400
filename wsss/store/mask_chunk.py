"""SAM's mask of each box, in a chunk of the label's PNG.

A label and its masks are thus one file: they are written, read, copied and deleted together. The chunk ``maSK`` stands between
the pixels and the end of the file. Its name says (PNG specification, section 5.4) that readers which do not know it may ignore
it, and that programs which change the pixels must not copy it. It has, compressed by zlib, one line for each box, in the order
of the manifest line: COCO's compressed counts (`wsss.rle`) of the mask at the photograph's size.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

NAME = b"maSK"
MAX_MASK, MAX_MASKS = 1 << 22, 1 << 24
"""Characters of a mask, and of all masks of an image. One hundred masks of a photograph of 12 Mpx take 600,000."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = 12
"""Bytes of the last chunk, IEND."""


def with_masks(png: bytes, counts: Sequence[str]) -> bytes:
    """The PNG file with the compressed counts of one mask or more.

    Raises:
        ValueError: they are longer than a reader accepts.
    """
    text = "\n".join(counts).encode("ascii")
    if len(text) > MAX_MASKS or max(map(len, counts)) > MAX_MASK:
        raise ValueError(f"the masks are too ragged: at most {MAX_MASKS:,} characters are kept, got {len(text):,}")
    data = zlib.compress(text)
    chunk = len(data).to_bytes(4) + NAME + data + zlib.crc32(NAME + data).to_bytes(4)
    return png[:-_END] + chunk + png[-_END:]


def masks_in(png: bytes, boxes: int) -> list[str] | None:
    """The compressed counts of the masks in a PNG file, one for each box, not checked yet; None if it has no masks.

    Raises:
        ValueError: the chunk is damaged, longer than this version writes, or has another number of masks.
    """
    found = [data for name, data in _chunks(png) if name == NAME]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError("the masks occur twice")
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(found[0], MAX_MASKS + 1)
    except zlib.error:
        raise ValueError("the masks are damaged") from None
    if len(text) > MAX_MASKS or not decompressor.eof or decompressor.unused_data:
        raise ValueError("the masks are damaged or too long")
    lines = text.decode("ascii", "replace").split("\n")
    if len(lines) != boxes:
        raise ValueError(f"expected one mask for each of the {boxes} boxes, got {len(lines)}")
    if max(map(len, lines)) > MAX_MASK:
        raise ValueError("a mask is too long")
    return lines


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the chunks after the signature. Raises ValueError."""
    if not png.startswith(_SIGNATURE):
        raise ValueError("no PNG")
    view, start = memoryview(png), len(_SIGNATURE)
    while start + _END <= len(png):
        stop = start + 8 + int.from_bytes(view[start : start + 4])
        name = bytes(view[start + 4 : start + 8])
        if name == NAME:
            if zlib.crc32(view[start + 4 : stop]) != int.from_bytes(view[stop : stop + 4]):
                raise ValueError("the masks are damaged")
            yield name, bytes(view[start + 8 : stop])
        start = stop + 4
