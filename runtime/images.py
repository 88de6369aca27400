"""Finding and decoding photographs."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..batch import Photograph
from ..errors import ImageError
from ..frame import Frame

SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS = tuple(sorted(set(SUFFIXES.values())))
"""The only decoders that untrusted files may reach."""
MOST_PIXELS = 89_478_485
"""The limit at which Pillow begins to warn of decompression bombs: 256 MB as RGB."""
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def find_images(folder: Path, *, leave_out: Path | None = None) -> list[str]:
    """Names of the images below ``folder`` (or of the one file), sorted; hidden files and folders are left out.

    Args:
        leave_out: a folder that is not entered: the label store, whose labels are no photographs.

    Raises:
        ImageError: no such folder, no image in it, or a sub-folder that cannot be read.
    """
    if folder.is_file():
        return [folder.name]
    if not folder.is_dir():
        raise ImageError(
            f"{folder}: expected a folder of images, found nothing", hint="wsss label IMAGES takes a folder or an image"
        )
    try:
        names = sorted(_walk(folder, "", leave_out.resolve() if leave_out else None))
    except OSError as error:
        raise ImageError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if not names:
        raise ImageError(
            f"{folder}: no images in it", hint=f"files ending in {' '.join(SUFFIXES)} are taken, also in sub-folders"
        )
    return names


def _walk(folder: Path, prefix: str, leave_out: Path | None) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if Path(entry.path).resolve() == leave_out:
                continue
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", leave_out)
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield prefix + entry.name


def label_names(names: list[str]) -> dict[str, str]:
    """Where each image's label goes: ``a/dog.jpg`` to ``a/dog.png``; where two images would meet, ``a/dog.jpg.png``."""
    plain = {name: str(PurePosixPath(name).with_suffix(".png")) for name in names}
    count = Counter(target.lower() for target in plain.values())
    long = {name for name in names if count[plain[name].lower()] > 1}
    # `a.jpg.png` is the label of a.jpg beside a.webp, and would be that of a photograph a.jpg.png too.
    while True:
        taken = {f"{name}.png".lower() for name in long}
        met = {name for name in names if plain[name].lower() in taken} - long
        if not met:
            break
        long |= met
    return {name: f"{name}.png" if name in long else plain[name] for name in names}


def read_photograph(folder: Path, name: str) -> Photograph:
    """Decodes one image.

    EXIF rotation is applied; grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is laid over white;
    of an animation the first frame counts.

    Raises:
        ImageError: unreadable, of a format not in ``FORMATS``, truncated, or a decompression bomb.
    """
    path = folder / name if folder.is_dir() else folder
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:  # Pillow itself refuses twice as many only
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MOST_PIXELS:,} are decoded")
            pixels = _rgb(image)
    except UnidentifiedImageError:  # its own words hold a memory address
        raise ImageError(f"{name}: not a readable image: none of {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: not a readable image: {error or type(error).__name__}") from None
    return Photograph(name=name, pixels=pixels, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _rgb(image: Image.Image) -> np.ndarray:
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("I;16", "I;16B", "I;16L", "I"):
        wide = np.asarray(turned).astype(np.int64)
        return np.repeat(np.clip(wide >> 8, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        white = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(white, turned)
    return np.array(turned.convert("RGB"))


def on_canvas(pixels: np.ndarray, frame: Frame, filter: str) -> np.ndarray:
    """A photograph resized into its frame, top left on a black canvas: (H, W, 3) uint8.

    PIL's antialiased resize, as the references of CLIP, Grounding-DINO and SAM use on their images.
    """
    height, width = frame.valid
    if (height, width) != pixels.shape[:2]:
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), _FILTERS[filter]))
    if frame.valid == frame.canvas:
        return pixels
    canvas = np.zeros((*frame.canvas, 3), np.uint8)
    canvas[:height, :width] = pixels
    return canvas
