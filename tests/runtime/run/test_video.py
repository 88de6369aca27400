"""Frames of a video as photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="needs PyAV: pip install 'wsss[video]'")

from wsss.errors import ImageError, UsageError  # noqa: E402
from wsss.runtime.run.video import DONE, extract_frames, is_video, upright  # noqa: E402

COUNT = 12


def gray(number: int) -> int:
    return 20 * number


def write_video(path: Path, *, size: tuple[int, int] = (64, 48), count: int = COUNT) -> Path:
    """A video whose frame i is of one gray, 20 i, with a white corner at the upper left."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for number in range(count):
            pixels = np.full((size[1], size[0], 3), gray(number), np.uint8)
            pixels[:16, :16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("every", "limit", "numbers"), [(1, None, range(12)), (5, None, (0, 5, 10)), (5, 2, (0, 5)), (20, None, (0,))]
)
def test_every_nth_frame_is_a_photograph(video: Path, tmp_path: Path, every: int, limit: int | None, numbers: Any) -> None:
    seen: list[int] = []
    count = extract_frames(video, tmp_path / "frames", every=every, limit=limit, progress=seen.append)
    assert count == len(numbers) and seen == list(range(1, count + 1))
    files = sorted((tmp_path / "frames").glob("*.jpg"))
    assert [path.name for path in files] == [f"{number:06}.jpg" for number in numbers]
    for path, number in zip(files, numbers, strict=True):
        pixels = np.asarray(Image.open(path)).astype(int)
        assert pixels.shape == (48, 64, 3)
        assert abs(pixels[30:, 30:] - gray(number)).mean() < 6, path
        assert pixels[4:12, 4:12].mean() > 200


def test_it_goes_on_where_it_was_stopped_and_is_done_once(video: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frames"

    def stop(frames: int) -> None:
        if frames == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_frames(video, folder, progress=stop)
    assert not (folder / DONE).exists()
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert extract_frames(video, folder) == COUNT
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    seen: list[int] = []
    assert extract_frames(video, folder, progress=seen.append) == COUNT and not seen
    with pytest.raises(UsageError, match="another video, or with another --every"):
        extract_frames(video, folder, every=2)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no video at all", lambda data: data[: len(data) // 3]])
def test_what_is_no_video_is_refused(video: Path, tmp_path: Path, damage: Any) -> None:
    (path := tmp_path / "bad.mp4").write_bytes(damage(video.read_bytes()))
    with pytest.raises(ImageError, match=r"bad\.mp4: ") as found:
        extract_frames(path, tmp_path / "frames")
    assert found.value.hint and not (tmp_path / "frames" / DONE).exists()


def test_frames_are_turned_upright() -> None:
    """FFmpeg's angle is counterclockwise: a frame with 90 is shown after a quarter turn to the left."""
    image = Image.new("RGB", (4, 2))
    image.putpixel((3, 0), (255, 0, 0))
    assert upright(image, 90).size == (2, 4) and upright(image, 90).getpixel((0, 0)) == (255, 0, 0)
    assert upright(image, -90).getpixel((1, 3)) == (255, 0, 0)
    assert upright(image, 180).getpixel((0, 1)) == (255, 0, 0)
    assert upright(image, 0) is image


def test_a_video_is_labeled_from_the_command_line(video: Path, tmp_path: Path, wsss: Any) -> None:
    flags = ("--classes", "mini", "--bundle", "mini", "--out", tmp_path / "store")
    answer = wsss("label", video, "--every", "5", "--limit", "2", *flags)
    assert answer.code == 0, answer
    labels = sorted(path.relative_to(tmp_path / "store").as_posix() for path in (tmp_path / "store").rglob("*.png"))
    assert labels == ["labels/000000.png", "labels/000005.png"]
    assert "2 already done" in wsss("label", video, "--every", "5", "--limit", "2", *flags).out
    assert wsss("report", tmp_path / "store").code == 0, "the store knows where its frames are"
    again = wsss("label", tmp_path / "store.frames", "--every", "2", *flags)
    assert again.code == 0 and "0 labeled (0 boxes), 1 already done" in again.out, "every other image of a folder"
    remote = wsss("label", video, "--classes", "mini", "--out", "s3://bucket/store")
    assert remote.code == 2 and "need a folder of this machine" in remote.err


def test_endings(video: Path, tmp_path: Path) -> None:
    assert is_video(video) and not is_video(tmp_path / "none.mp4") and not is_video(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    assert not is_video(tmp_path / "folder.mp4")
