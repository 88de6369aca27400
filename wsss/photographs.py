"""Decoding photographs: the labelling run and the trainer see the same pixels."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .batch import Photograph
from .errors import ImageError

SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS = tuple(sorted(set(SUFFIXES.values())))
"""The only decoders that untrusted files may reach."""
MOST_PIXELS = 178_956_970
"""512 MB as RGB: where Pillow itself begins to refuse."""
MOST_BYTES = 1 << 30
"""Of a file: as many as ``MOST_PIXELS`` take with 16 bits a channel, uncompressed."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # Pillow's, at half of our limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """A file's bytes, not decoded yet, and what identifies them."""

    name: str
    data: bytes
    mtime_ns: int = 0
    etag: str = ""
    """In an object store, in place of the time of change."""
    sha256: str


class Place(Protocol):
    """Where photographs are that are not one local folder. May be pickled; any number of threads and processes read from it."""

    def read(self, name: str) -> ImageFile:
        """The bytes of one image. Raises ImageError as `read_file` does."""
        ...

    def stamp(self, name: str) -> Mapping[str, int | str]:
        """As `stamp_of`. Raises OSError or ImageError."""
        ...


def read_file(folder: Path | Place, name: str) -> ImageFile:
    """The bytes of one image of a folder, or of ``folder`` itself where that is a file.

    Raises:
        ImageError: it is not there, cannot be read, is no regular file (a pipe would never end), or is too long.
    """
    if not isinstance(folder, Path):
        return folder.read(name)
    path = path_of(folder, name)
    try:
        # O_NONBLOCK: a pipe without a writer. Windows has only O_BINARY, POSIX only the other.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{name}: not a file that holds an image")
            if status.st_size > MOST_BYTES:
                raise ImageError(f"{name}: {status.st_size:,} bytes, at most {MOST_BYTES:,} are read")
            data = file.read()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name with a zero byte in it
        raise ImageError(f"{name!r}: cannot be read: {error}") from None
    return ImageFile(name=name, data=data, mtime_ns=status.st_mtime_ns, sha256=hashlib.sha256(data).hexdigest())


def stamp_of(folder: Path | Place, name: str) -> Mapping[str, int | str]:
    """What tells, without reading it, that an image is as it was: ``bytes`` and ``mtime_ns`` or ``etag``.

    Raises:
        OSError or ImageError: it is not there.
    """
    if not isinstance(folder, Path):
        return folder.stamp(name)
    status = path_of(folder, name).stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def path_of(folder: Path, name: str) -> Path:
    """Where the image of this name is."""
    return folder / name if os.path.isdir(folder) else folder  # unlike Path's, false for a name too long


def count_pixels(file: ImageFile) -> int:
    """Height x width as the file's header says, 0 where it cannot be read: `decode` will say why."""
    try:
        with Image.open(io.BytesIO(file.data), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # as in `decode`
        return 0


def decode(file: ImageFile, *, shorter_side_px: int | None = None) -> Photograph:
    """Decodes one image.

    EXIF rotation is applied; grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is laid over white;
    of an animation the first frame counts.

    Args:
        shorter_side_px: for thumbnails: a JPEG may come at 1/2, 1/4 or 1/8 of its size, which is several times as fast, as
            long as its shorter side keeps this many pixels.

    Raises:
        ImageError: of a format not in ``FORMATS``, truncated, or more than ``MOST_PIXELS`` (a decompression bomb).
    """
    name = file.name
    try:
        with Image.open(io.BytesIO(file.data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MOST_PIXELS:,} are decoded")
            if shorter_side_px:
                image.draft(None, (shorter_side_px, shorter_side_px))
            pixels = _rgb(image)
    except UnidentifiedImageError:  # its own words hold a memory address
        raise ImageError(f"{name}: not a readable image: none of {', '.join(FORMATS)}") from None
    except MemoryError:
        raise ImageError(f"{name}: this machine lacks the memory to decode it") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything: struct.error, IndexError, ...
        raise ImageError(f"{name}: not a readable image: {error or type(error).__name__}") from None
    return Photograph(
        name=name, pixels=pixels, size_bytes=len(file.data), mtime_ns=file.mtime_ns, etag=file.etag, sha256=file.sha256
    )


def read_photograph(folder: Path, name: str) -> Photograph:
    """Reads and decodes one image. Raises ImageError as `read_file` and `decode` do."""
    return decode(read_file(folder, name))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no fixed range")
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("I;16", "I;16B", "I;16L", "I"):
        wide = np.asarray(turned).astype(np.int64)
        return np.repeat(np.clip(wide >> 8, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        white = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(white, turned)
    return np.array(turned.convert("RGB"))
