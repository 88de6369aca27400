"""Decoding photographs: the labeling run and the trainer see the same pixels."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import io
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, _imaging, features

from .batch import Photograph
from .errors import ImageError
from .reading.documents import read_regular


def _optional_suffixes() -> dict[str, str]:
    """Endings of the formats that only some installations decode: AVIF by Pillow itself, HEIC by pillow-heif."""
    found = {".avif": "AVIF"} if features.check("avif") else {}
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return found
    return {**found, ".heic": "HEIF", ".heif": "HEIF"}


USUAL_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
"""Endings that every version and installation takes; the names of labels depend on these alone."""
SUFFIXES = {**USUAL_SUFFIXES, ".jfif": "JPEG", ".jpe": "JPEG", **_optional_suffixes()}
"""Endings, in lower case, of the files that are taken from a folder."""
FORMATS = tuple(sorted(set(SUFFIXES.values())))
"""The only decoders that untrusted files may reach."""
MAX_PIXELS = 178_956_970
"""512 MB as RGB: where Pillow itself begins to refuse."""
MAX_BYTES = 1 << 30
"""Of a file: as many as ``MAX_PIXELS`` take with 16 bits a channel, uncompressed."""
_BAND = 512
"""Rows that are made RGB at a time."""
LEAST_RANGE = 16
"""Of 256 levels: a photograph that spans fewer shows next to nothing. 12 bits in a file of 16 become 16 levels."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # Pillow's, at half of our limit
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # damaged metadata, which labels do not depend on

_damage = threading.local()
"""``found``: did libtiff report an error in the image that this thread decodes?"""


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
def _note_damage(module: bytes | None, template: bytes, values: int) -> None:
    _damage.found = True


def _silence_libtiff() -> None:
    """Keeps libtiff from writing to stderr; its errors are noted, since it decodes some damaged files in spite of them."""
    try:
        library = ctypes.CDLL(_imaging.__file__)  # symbols of the libraries it is linked to are found through it
        library.TIFFSetErrorHandler(_note_damage)
        library.TIFFSetWarningHandler(None)
    except (AttributeError, OSError):  # linked statically, as in Pillow's wheels for Windows
        return


_silence_libtiff()


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
    data, status = read_regular(
        path_of(folder, name),
        where=name,
        hint="check the path and its permissions; an image must be a file of its own",
        error=ImageError,
        max_bytes=MAX_BYTES,
    )
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

    EXIF rotation is applied; gray, palette, CMYK and 16-bit images become 8-bit RGB; transparency is laid over white;
    of an animation the first frame counts.

    Args:
        shorter_side_px: for thumbnails: a JPEG may come at 1/2, 1/4 or 1/8 of its size, which is several times as fast, as
            long as its shorter side keeps this many pixels.

    Raises:
        ImageError: of a format not in ``FORMATS``, truncated, or more than ``MAX_PIXELS`` (a decompression bomb).
    """
    name = file.name
    again = "copy it again from where it came, or leave it out"
    if not file.data:
        raise ImageError(f"{name}: not a readable image: the file is empty", hint=again)
    _damage.found = False
    try:
        with Image.open(io.BytesIO(file.data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"{name}: expected at most {MAX_PIXELS:,} pixels, got {image.width} x {image.height}", hint="make it smaller"
                )
            if image.mode == "F":
                raise ImageError(
                    f"{name}: expected 8 or 16 bits a channel, got floating-point pixels, which have no fixed range",
                    hint="convert it to 8 bits a channel",
                )
            if shorter_side_px:
                image.draft(None, (shorter_side_px, shorter_side_px))
            orientation = _orientation(image)  # before the image is turned, which removes the tag
            pixels = _rgb(image)
        if _damage.found:
            raise ValueError("damaged")
    except ImageError:
        raise
    except UnidentifiedImageError:  # its own words hold a memory address
        raise ImageError(
            f"{name}: not a readable image: none of {', '.join(FORMATS)}",
            hint=f"convert it to JPEG or PNG; if it is one, {again}",
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name}: expected at most {MAX_PIXELS:,} pixels, got a decompression bomb", hint="make it smaller"
        ) from None
    except MemoryError:
        raise ImageError(f"{name}: this machine lacks the memory to decode it", hint="make it smaller") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything: struct.error, IndexError, ...
        reason = "its TIFF data are damaged" if _damage.found else error or type(error).__name__
        raise ImageError(f"{name}: not a readable image: {reason}", hint=again) from None
    return Photograph(
        name=name,
        pixels=pixels,
        orientation=orientation,
        size_bytes=len(file.data),
        mtime_ns=file.mtime_ns,
        etag=file.etag,
        sha256=file.sha256,
        warning=_warning(pixels),
    )


def read_photograph(folder: Path, name: str) -> Photograph:
    """Reads and decodes one image. Raises ImageError as `read_file` and `decode` do."""
    return decode(read_file(folder, name))


def _warning(pixels: np.ndarray) -> str:
    """Why a photograph may not show what it should, or an empty string."""
    for part in (pixels[::16, ::16], pixels):  # a few pixels settle it for nearly all photographs
        low, high = int(part.min()), int(part.max())
        if high - low >= LEAST_RANGE:
            return ""
    return (
        f"next to no range: all values lie in {low}..{high} of 0..255; is it blank, transparent, or of 12 bits in a file of 16?"
    )


def _orientation(image: Image.Image) -> int:
    """By which of EXIF's eight orientations `ImageOps.exif_transpose` turns an image."""
    image.load()  # a PNG may say it after its pixels
    value = image.getexif().get(ExifTags.Base.Orientation)
    return next((number for number in range(2, 9) if value == number), 1)


def _rgb(image: Image.Image) -> np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        high = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(high[:, :, None], 3, axis=2)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _BAND):  # each step makes a copy
        band = image.crop((0, top, image.width, min(top + _BAND, image.height)))
        if band.has_transparency_data:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        pixels[top : top + _BAND] = np.asarray(band.convert("RGB"))
    return pixels
