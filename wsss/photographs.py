"""Decode photographs, with the same pixels for labeling and for training."""

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

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, _imaging, features

from .batch import Photograph
from .errors import ImageError
from .pixels.direct_jpeg import decode_rgbx
from .reading.documents import read_regular


def _optional_suffixes() -> dict[str, str]:
    """Suffixes of formats that only some installations decode: AVIF by Pillow, HEIC by pillow-heif."""
    found = {".avif": "AVIF"} if features.check("avif") else {}
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return found
    return {**found, ".heic": "HEIF", ".heif": "HEIF"}


USUAL_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
"""Suffixes that every version and installation supports; only these decide the names of labels."""
SUFFIXES = {**USUAL_SUFFIXES, ".jfif": "JPEG", ".jpe": "JPEG", **_optional_suffixes()}
"""Suffixes, in lower case, of the files that a folder's listing includes."""
FORMATS = tuple(sorted(set(SUFFIXES.values())))
"""The only decoders that are used on untrusted files."""
MAX_PIXELS = 178_956_970
"""512 MB as RGB: the limit at which Pillow refuses too."""
MAX_BYTES = 1 << 30
"""Size of a file: ``MAX_PIXELS`` with 16 bits per channel, uncompressed."""
_BAND = 512
"""Rows that are converted to RGB at a time."""
LEAST_RANGE = 16
"""Fewest of 256 levels that a photograph should span. 12-bit data in a 16-bit file spans only 16."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # Pillow's, at half of our limit
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # damaged metadata, which does not affect labels

_damage = threading.local()
"""``found``: whether libtiff reported an error for the image that this thread is decoding."""


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
def _note_damage(module: bytes | None, template: bytes, values: int) -> None:
    _damage.found = True


def _silence_libtiff() -> None:
    """Keep libtiff from writing to stderr. Its errors are recorded, since it decodes some damaged files regardless."""
    try:
        library = ctypes.CDLL(_imaging.__file__)  # also finds the symbols of libraries it is linked to
        library.TIFFSetErrorHandler(_note_damage)
        library.TIFFSetWarningHandler(None)
    except (AttributeError, OSError):  # linked statically, as in Pillow's wheels for Windows
        return


_silence_libtiff()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """The bytes of an image file, not decoded, and what identifies them."""

    name: str
    data: bytes
    mtime_ns: int = 0
    etag: str = ""
    """In an object store, instead of ``mtime_ns``."""
    sha256: str


def read_file(folder: Path, name: str) -> ImageFile:
    """Read the bytes of an image of a folder, or of ``folder`` itself if that is a file.

    Raises:
        ImageError: missing, unreadable, not a regular file, or too large.
    """
    data, status = read_regular(
        path_of(folder, name),
        where=name,
        hint="check the path and its permissions; an image must be a regular file",
        error=ImageError,
        max_bytes=MAX_BYTES,
    )
    return ImageFile(name=name, data=data, mtime_ns=status.st_mtime_ns, sha256=hashlib.sha256(data).hexdigest())


def stamp_of(folder: Path, name: str) -> Mapping[str, int]:
    """Metadata that changes with the image: ``bytes`` and ``mtime_ns``. Does not read the file. Raises OSError: it is missing."""
    status = path_of(folder, name).stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def path_of(folder: Path, name: str) -> Path:
    """The path of an image by its name."""
    return folder / name if os.path.isdir(folder) else folder  # unlike Path.is_dir, False for a name too long


def count_pixels(file: ImageFile) -> int:
    """Height x width in the file's header; 0 if it cannot be read, for which `decode` raises."""
    try:
        with Image.open(io.BytesIO(file.data), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # as in `decode`
        return 0


def decode(file: ImageFile, *, shorter_side_px: int | None = None) -> Photograph:
    """Decode an image.

    EXIF rotation is applied; gray, palette, CMYK and 16-bit images become 8-bit RGB; transparent images are put on white; only
    the first frame of an animation is used.

    Args:
        shorter_side_px: for thumbnails: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is several times as fast,
            as long as its shorter side has at least this many pixels.

    Raises:
        ImageError: a format not in ``FORMATS``, a damaged file, or more than ``MAX_PIXELS`` (a decompression bomb).
    """
    name = file.name
    again = "copy it again from its source, or leave it out"
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
                    f"{name}: expected 8 or 16 bits per channel, got floating-point pixels, which have no fixed range",
                    hint="convert it to 8 bits per channel",
                )
            direct = None
            if shorter_side_px:
                image.draft(None, (shorter_side_px, shorter_side_px))
            elif image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                direct = decode_rgbx(file.data, (image.height, image.width))
            if direct is None:
                image.load()  # a PNG may have its metadata after the pixels
            orientation = _orientation(image)  # before the rotation is applied, which removes the tag
            pixels = _rgb(image) if direct is None else _rotated(direct, orientation)[..., :3]
        if _damage.found:
            raise ValueError("damaged")
    except ImageError:
        raise
    except UnidentifiedImageError:  # Pillow's message contains a memory address
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
    except Exception as error:  # Pillow's decoders may raise any exception
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


def from_pillow(image: Image.Image, name: str) -> Photograph:
    """A PIL image with the pixels that `decode` gives its file. Raises ImageError as `decode` does; the image stays as it is."""
    try:
        image.load()
        orientation = _orientation(image)
        copy = image.copy()  # `_rgb` rotates in place
        if copy.mode == "F" or 0 in copy.size or copy.width * copy.height > MAX_PIXELS:
            raise ValueError(f"mode {copy.mode}, {copy.width} x {copy.height} pixels")
        pixels = _rgb(copy)
    except Exception as error:  # Pillow's decoders may raise any exception, also of a file that is opened lazily
        raise ImageError(f"{name}: not a readable image: {error or type(error).__name__}") from None
    return Photograph(name=name, pixels=pixels, orientation=orientation, warning=_warning(pixels))


def read_photograph(folder: Path, name: str) -> Photograph:
    """Read and decode an image. Raises ImageError as `read_file` and `decode` do."""
    return decode(read_file(folder, name))


def _warning(pixels: np.ndarray) -> str:
    """A warning if the pixels are almost constant, otherwise empty."""
    for part in (pixels[::16, ::16], pixels):  # for nearly all photographs a few pixels are enough
        low, high = int(part.min()), int(part.max())
        if high - low >= LEAST_RANGE:
            return ""
    return (
        f"next to no range: all values lie in {low}..{high} of 0..255; is it blank, transparent, or 12-bit data in a 16-bit file?"
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that `ImageOps.exif_transpose` applies, 1 to 8, of an image whose metadata are read."""
    value = image.getexif().get(ExifTags.Base.Orientation)
    return next((number for number in range(2, 9) if value == number), 1)


def _rgb(image: Image.Image) -> np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)
    pixels = np.empty((image.height, image.width, 4), np.uint8)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        high = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        pixels[...] = high[:, :, None]
        return pixels[..., :3]
    for top in range(0, image.height, _BAND):  # in bands, because each step makes a copy
        band = image.crop((0, top, image.width, min(top + _BAND, image.height)))
        if band.has_transparency_data:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        pixels[top : top + _BAND] = np.asarray((band if band.mode == "RGB" else band.convert("RGB")).convert("RGBX"))
    return pixels[..., :3]


def _rotated(rgbx: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, 4) uint8 after an EXIF orientation, as `ImageOps.exif_transpose` applies it."""
    if orientation == 1:
        return rgbx
    stored = rgbx.view(np.uint32)[..., 0]
    rotated = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored[::-1].T,
        7: stored[::-1, ::-1].T,
        8: stored[:, ::-1].T,
    }[orientation]
    pixels = np.empty((*rotated.shape, 4), np.uint8)
    pixels.view(np.uint32)[..., 0] = rotated
    return pixels
