"""Files of weights from strangers: whole ones are read, damaged ones are named, and none takes more memory than its size."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wsss.errors import WeightsError
from wsss.reading import checkpoints
from wsss.reading.checkpoints import read_checkpoint

torch = pytest.importorskip("torch")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A state dict of two tensors, as torch.save writes it."""
    torch.save({"state_dict": {"a": torch.arange(4.0), "b": torch.ones(3, 2)}, "epoch": 3}, tmp_path / "whole.pth")
    return tmp_path / "whole.pth"


def rewritten(whole: Path, change: Callable[[str, bytes], bytes] = lambda name, data: data, **options: Any) -> Path:
    """The same archive with its entries changed."""
    path = whole.with_name("changed.pth")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", **options) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return path


def test_both_formats_are_read(whole: Path, tmp_path: Path) -> None:
    found = read_checkpoint(whole)
    assert found["state_dict"]["a"].tolist() == [0, 1, 2, 3] and found["epoch"] == 3
    torch.save({"a": torch.arange(4.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pth")["a"].tolist() == [0, 1, 2, 3]
    from safetensors.torch import save_file

    save_file({"a": torch.arange(4.0)}, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2, 3]
    assert read_checkpoint(rewritten(whole))["state_dict"]["b"].tolist() == [[1, 1]] * 3


def test_one_changed_byte_of_the_values_is_noticed(whole: Path) -> None:
    """PyTorch itself reads it as another number."""
    data = bytearray(whole.read_bytes())
    data[bytes(data).index(struct.pack("<4f", 0, 1, 2, 3)) + 5] ^= 64
    whole.write_bytes(data)
    assert torch.load(whole, weights_only=True)["state_dict"]["a"].tolist() != [0, 1, 2, 3]
    with pytest.raises(WeightsError, match=r"whole\.pth: not a readable file of weights: the checksum of whole/data/0 in it"):
        read_checkpoint(whole)


def test_a_compressed_archive_is_refused(whole: Path) -> None:
    """Mapped into memory, its compressed bytes would be the weights; and a few of them may stand for gigabytes."""
    path = rewritten(whole, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"whole/data\.pkl in it is compressed"):
        read_checkpoint(path)


def test_entries_that_share_their_bytes_are_refused(whole: Path) -> None:
    """Two names of the directory lead to the same values: an archive larger than its file, without compression."""
    values = bytes(1 << 16)
    path = rewritten(whole, lambda name, data: values if name.endswith("data/0") else data)
    with zipfile.ZipFile(path, "a") as archive:
        entry = next(each for each in archive.infolist() if each.filename.endswith("data/0"))
        archive.filelist += [entry]
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match="unpacks to more than its own size"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: {"a": torch.zeros(1).expand(1 << 40)}, r"a tensor of shape \(1099511627776,\) in it has only 4 bytes"),
        (lambda: {"a": torch.zeros(1).expand(4)}, r"a tensor of shape \(4,\) in it has only 4 bytes"),
        (lambda: {"a": [torch.zeros(2, device="meta")]}, "without values"),
        (lambda: {"a": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (1 << 30, 9))}, "is sparse"),
        (lambda: [torch.zeros(2)], "expected tensors by name, got list"),
    ],
)
def test_tensors_that_are_larger_than_their_values(make: Callable[[], Any], said: str, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=said):
        read_checkpoint(tmp_path / "a.pth")


def test_memory_that_a_pickle_asks_for(whole: Path) -> None:
    """``torch.Tensor(10**9)``: 36 bytes that ask for 4 GB."""
    code = b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatTensor\n\x8a\x05\x00\xca\x9a\x3b\x00\x85Rs."
    path = rewritten(whole, lambda name, data: code if name.endswith("data.pkl") else data)
    with pytest.raises(WeightsError, match=r"changed\.pth: "):
        read_checkpoint(path)


def test_a_long_pickle_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoints, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(WeightsError, match=r"data\.pkl in it has \d+ bytes, at most 100 are read"):
        read_checkpoint(whole)
    torch.save({"a": torch.zeros(4)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"old\.pth: not a readable file of weights: "):
        read_checkpoint(tmp_path / "old.pth")


def test_the_pickle_of_the_values_in_the_older_format_is_limited_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three short pickles come first: a magic number, the version and the machine."""
    torch.save({"a" * 4000: torch.arange(4.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(checkpoints, "MAX_PICKLE_BYTES", 4500)
    assert read_checkpoint(tmp_path / "old.pth")["a" * 4000].tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(checkpoints, "MAX_PICKLE_BYTES", 3000)
    with pytest.raises(WeightsError, match=r"old\.pth: not a readable file of weights: "):
        read_checkpoint(tmp_path / "old.pth")


def test_values_of_several_names_count_once(tmp_path: Path) -> None:
    tied = torch.arange(10_000.0)
    torch.save({str(number): tied.view(100, 100) for number in range(9)}, tmp_path / "tied.pth")
    assert read_checkpoint(tmp_path / "tied.pth")["8"].tolist() == tied.view(100, 100).tolist()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickled_code_ran",)


def test_pytorchs_advice_to_run_the_pickle_is_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, old in (("new.pth", True), ("old.pth", False)):
        torch.save({"a": torch.zeros(2), "b": Evil()}, name, _use_new_zipfile_serialization=old)
    Path("plain.pth").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    with zipfile.ZipFile("script.pth", "w") as archive:  # as torch.jit.save writes it
        archive.writestr("script/constants.pkl", pickle.dumps((), protocol=2))
    for name in ("new.pth", "old.pth", "plain.pth", "script.pth"):
        with pytest.raises(WeightsError, match=rf"--init {name}: holds more than tensors: ") as caught:
            read_checkpoint(Path(name), where=f"--init {name}")
        assert "as safetensors" in caught.value.hint
        assert not any(word in str(caught.value) for word in ("weights_only", "safe_globals", "False"))
    assert not Path("pickled_code_ran").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"its header claims 0 bytes, the file has 0"),
        (b"\xff" * 8 + b"{}", r"its header claims 18,446,744,073,709,551,615 bytes, the file has 10"),
        (struct.pack("<Q", 4) + b"{]  ", "not a readable file of weights"),
        (struct.pack("<Q", 1 << 25) + b" " * (1 << 25), "expected a header of at most 16,777,216 bytes, got 33,554,432"),
    ],
)
def test_headers_of_safetensors(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=said):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "about",
    [
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        },
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 24]}},
        {"a": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}},
        {"a": {"dtype": "F32", "shape": [-6], "data_offsets": [0, 24]}},
    ],
    ids=["overlap", "declared", "overflow", "hole", "negative"],
)
def test_safetensors_that_contradict_themselves(about: dict[str, Any], tmp_path: Path) -> None:
    header = json.dumps(about).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(WeightsError, match=r"a\.safetensors: not a readable file of weights: "):
        read_checkpoint(tmp_path / "a.safetensors")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("pipe.pth", "."):
        with pytest.raises(WeightsError, match="expected a regular file of weights"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(WeightsError, match=r"none\.pth: cannot be read: No such file"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("old", [True, False], ids=["old", "archive"])
def test_damage_of_any_kind_is_an_error_or_changes_nothing(old: bool, whole: Path) -> None:
    """Cuts, flipped and repeated bytes: what is read is what was written. The older format has no checksum for its values."""
    buffer = io.BytesIO()
    torch.save(torch.load(whole, weights_only=True), buffer, _use_new_zipfile_serialization=not old)
    good, chance, accepted = buffer.getvalue(), random.Random(0), 0
    for number in range(300):
        data = bytearray(good)
        place = chance.randrange(len(data))
        if number % 3 == 0:
            del data[place:]
        elif number % 3 == 1:
            data[place] ^= 1 << chance.randrange(8)
        else:
            data[place:place] = data[place : place + chance.randrange(1, 40)]
        whole.write_bytes(data)
        try:
            found = read_checkpoint(whole)
        except WeightsError as error:
            assert error.hint
            continue
        accepted += 1
        if not old:
            weights = found.get("state_dict", {})
            assert {name: value.tolist() for name, value in weights.items()} == {"a": [0, 1, 2, 3], "b": [[1, 1]] * 3}
    assert accepted < 150
