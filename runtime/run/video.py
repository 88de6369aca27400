"""Takes the frames of a video as photographs, through PyAV (extra ``video``)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ...errors import ImageError, UsageError
from ...files import write_atomically
from ...reading.documents import read_json

ENDINGS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
DONE = "frames.json"
"""Names the video of a folder of frames; written when all frames are there."""
QUALITY = 95
"""Of the JPEG files."""


def is_video(path: Path) -> bool:
    """Whether a file has the ending of a video."""
    return path.suffix.lower() in ENDINGS and path.is_file()


def extract_frames(
    video: Path, folder: Path, *, every: int = 1, limit: int | None = None, progress: Callable[[int], None] = lambda frames: None
) -> int:
    """Write every N-th frame of a video as a JPEG file that is named by the frame's number, upright.

    Frames that an interrupted call has written are not written again.

    Args:
        folder: of this video's frames only.
        every: N; 1 takes all frames.
        limit: most frames to write; None takes all.
        progress: called with the number of frames so far.

    Returns:
        The number of frames.

    Raises:
        ImageError: not a video, or damaged. UsageError: ``folder`` has other frames.
        ModuleNotFoundError: PyAV is not installed.
    """
    import av

    about = {"video": video.name, "bytes": video.stat().st_size, "every": every, "limit": limit}
    marker = folder / DONE
    if marker.exists():
        known = read_json(marker, hint="give a new --out")
        if not isinstance(known, dict) or {**known, "frames": 0} != {**about, "frames": 0}:
            raise UsageError(
                f"{folder}: has the frames of another video, or with another --every or --limit", hint="give a new --out"
            )
        return int(known["frames"])
    folder.mkdir(parents=True, exist_ok=True)
    count = number = 0
    try:
        with av.open(str(video)) as container:
            if not container.streams.video:
                raise ImageError(f"{video}: has no video stream", hint="give a video, a folder of images, or an image")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                if number % every:
                    continue
                target = folder / f"{number:06}.jpg"
                if not target.exists():
                    image = upright(frame.to_image(), frame.rotation)
                    image.save(data := io.BytesIO(), "JPEG", quality=QUALITY, subsampling=0)
                    write_atomically(target, data.getvalue(), sync=False)
                count += 1
                progress(count)
                if count == limit:
                    break
    except av.error.FFmpegError as error:
        where = f" after frame {number}" if count else ""
        raise ImageError(
            f"{video}: cannot be read as a video{where}: {error.strerror}", hint="check that it plays to its end"
        ) from None
    if not count:
        raise ImageError(f"{video}: has no frame", hint="check that it plays")
    write_atomically(marker, (json.dumps({**about, "frames": count}) + "\n").encode())
    return count


def upright(image: Image.Image, angle: int) -> Image.Image:
    """A frame as it is shown. angle: FFmpeg's rotation of the frame, in degrees counterclockwise, a multiple of 90."""
    return image.rotate(angle, expand=True) if angle % 360 else image
