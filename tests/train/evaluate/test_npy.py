"""The field's cls_labels.npy is read as data: every writer's spelling is understood, and nothing in it is ever called."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss.errors import WsssError
from wsss.train.evaluate import npy as evaluate_pickle
from wsss.train.evaluate.npy import read_label_dictionary

DATA = Path(os.environ.get("WSSS_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
FIELD = DATA / "wsss_lists" / "voc12" / "cls_labels.npy"


def npy(path: Path, pickled: bytes, descr: str = "|O", shape: tuple[int, ...] = ()) -> Path:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    path.write_bytes(header.getvalue() + pickled)
    return path


def boxed(value: object) -> np.ndarray:
    array = np.empty((), object)
    array[()] = value
    return array


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["?", "<i8", ">i4", "<f4", ">f8", "f2", "u1"])
@pytest.mark.parametrize("key", [str, int, np.int32, np.int64])
def test_what_numpy_writes_is_read(tmp_path: Path, protocol: int, dtype: str, key: Any) -> None:
    rng = np.random.default_rng(0)
    labels = {key(2007000000 + each): (rng.random(20) < 0.2).astype(dtype) for each in range(3)}
    path = npy(tmp_path / "a.npy", pickle.dumps(boxed(labels), protocol=protocol))
    found = read_label_dictionary(path)
    assert list(found) == [each if key is str else int(each) for each in labels]
    assert all(type(each) in (str, int) for each in found)
    for name, vector in found.items():
        assert np.array_equal(vector, labels[key(name)])


@pytest.mark.parametrize("protocol", [2, 4])
def test_more_than_a_batch_of_items(tmp_path: Path, protocol: int) -> None:
    labels = {str(number): np.eye(20)[number % 20] for number in range(2500)}  # pickle writes items by the thousand
    found = read_label_dictionary(npy(tmp_path / "a.npy", pickle.dumps(boxed(labels), protocol=protocol)))
    assert np.array_equal(np.stack(list(found.values())), np.stack(list(labels.values())))


def test_np_save_itself(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", boxed({"a": np.ones(3)}))
    assert read_label_dictionary(tmp_path / "a.npy")["a"].tolist() == [1, 1, 1]


class Evil:
    """Pickles as a call."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.told = call, arguments

    def __reduce__(self) -> Any:
        return self.told


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_a_command_is_refused(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    for value in (Evil(os.system, f"touch {mark}"), {"a": Evil(os.system, f"touch {mark}")}):
        path = npy(tmp_path / "a.npy", pickle.dumps(boxed(value), protocol=protocol))
        with pytest.raises(WsssError, match=r"a\.npy: expected a dict of image ids to label vectors, got .+") as caught:
            read_label_dictionary(path)
        assert "JSON" in caught.value.hint
    assert not mark.exists()


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"\x80\x04cos\nsystem\n.", "needs 'os.system'"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "needs 'builtins.eval'"),
        (b"\x80\x04cnumpy\nndarray\n)R.", "calls ndarray"),
        (b"\x80\x04cnumpy\ndtype\nX\x02\x00\x00\x00i4X\x02\x00\x00\x00i4\x86R)R.", "calls something other than a function"),
        (b"\x80\x04cnumpy\nndarray\n}b.", "builds something other than vectors"),
        (b"\x80\x04cnumpy\nndarray\n)\x81.", "opcode NEWOBJ"),
        (b"(cnumpy\nndarray\no.", "opcode OBJ"),
        (b"(inumpy\nndarray\n.", "opcode INST"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x04Pid\n.", "opcode PERSID"),
        (b"\x80\x04K\x01.", "something else"),
        (b"\x80\x04].", "something else"),
        (b"\x80\x04", "got "),
        (b"", "got "),
        (b"\x80\x04t.", "got "),
        (b"\x80\x04j\xff\xff\xff\xff.", "got 4294967295"),
        (b"\x80\x04}(NNu.", "key that is not an image id: NoneType"),
        (b"\x80\x04}(\x8a\x09" + b"\xff" * 8 + b"\x7fNu.", "key that is not an image id: int"),
    ],
)
def test_pickles_made_by_hand(tmp_path: Path, pickled: bytes, said: str) -> None:
    with pytest.raises(WsssError, match=said):
        read_label_dictionary(npy(tmp_path / "a.npy", pickled))


def test_an_array_whose_byte_order_is_not_given_is_little_endian(tmp_path: Path) -> None:
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x02\x85cnumpy\ndtype\nX\x02\x00\x00\x00i4\x85R\x89C\x08"
    path = npy(tmp_path / "a.npy", b"\x80\x03}X\x01\x00\x00\x00a" + array + np.array([1, 0], "<i4").tobytes() + b"tbs.")
    assert read_label_dictionary(path)["a"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "array",
    [np.array([{"a": np.ones(2)}, 1], dtype=object), boxed({"a": [1, 0]}), boxed({"a": np.ones((2, 2))}), boxed([1])],
    ids=["two values", "a list", "a matrix", "no dict"],
)
def test_other_contents_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(WsssError, match="expected a dict of image ids to label vectors"):
        read_label_dictionary(tmp_path / "a.npy")


def test_an_array_of_numbers_and_no_npy_at_all(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 20)))
    with pytest.raises(WsssError, match=r"an array of float64 with shape \(3, 20\), not one dict"):
        read_label_dictionary(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_text("2007_000032 14")
    with pytest.raises(WsssError, match=r"b\.npy: expected a dict .*magic string"):
        read_label_dictionary(tmp_path / "b.npy")
    with pytest.raises(WsssError, match=r"c\.npy: cannot be read: No such file"):
        read_label_dictionary(tmp_path / "c.npy")


def test_a_content_that_is_shorter_than_its_shape_is_refused(tmp_path: Path) -> None:
    pickled = pickle.dumps(boxed({"a": np.ones(20, np.float32)}), protocol=3)
    assert pickled.count(b"C\x50" + np.ones(20, np.float32).tobytes()) == 1
    shorter = pickled.replace(b"C\x50" + np.ones(20, np.float32).tobytes(), b"C\x04" + np.ones(1, np.float32).tobytes())
    with pytest.raises(WsssError, match="builds something other than vectors"):
        read_label_dictionary(npy(tmp_path / "a.npy", shorter))


@pytest.mark.skipif(not FIELD.is_file(), reason=f"{FIELD} is not here")
def test_the_fields_own_file() -> None:
    labels = read_label_dictionary(FIELD)
    assert len(labels) == 12_031
    assert np.flatnonzero(labels[2007000032]).tolist() == [0, 14]  # aeroplane, person
    assert {vector.shape for vector in labels.values()} == {(20,)}


def test_what_never_ends_or_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(WsssError, match=r"pipe\.npy: expected a regular file, got a named pipe"):
        read_label_dictionary(tmp_path / "pipe.npy")
    np.save(tmp_path / "labels.npy", {"a": np.ones(3)}, allow_pickle=True)  # type: ignore[arg-type]
    assert list(read_label_dictionary(tmp_path / "labels.npy")) == ["a"]
    steps = sum(1 for _ in pickletools.genops(pickle.dumps(boxed({"a": np.ones(3)}), protocol=3)))
    npy(tmp_path / "labels.npy", pickle.dumps(boxed({"a": np.ones(3)}), protocol=3))
    monkeypatch.setattr(evaluate_pickle, "MAX_OPCODES", steps)
    assert list(read_label_dictionary(tmp_path / "labels.npy")) == ["a"]
    monkeypatch.setattr(evaluate_pickle, "MAX_OPCODES", steps - 1)
    with pytest.raises(WsssError, match=f"a pickle of more than {steps - 1} steps"):
        read_label_dictionary(tmp_path / "labels.npy")


@pytest.mark.parametrize("header", [b"{'descr': '|O', (", b"{'descr': ((((", b"{'descr' '|O'}", b"\x01", b"(" * 5000, b'"""'])
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    """numpy reads it as Python's text, with Python's own errors."""
    path = tmp_path / "labels.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(WsssError, match="expected a dict of image ids"):
        read_label_dictionary(path)
