"""The tokenizer without torch against open_clip's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from wsss.classes import parse_classes

open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install 'wsss[export]'")

from wsss.errors import WeightsError  # noqa: E402
from wsss.export.clip.family import BACKGROUNDS, TEMPLATES  # noqa: E402
from wsss.export.clip.tokenizer import special_ids, tokenizer_from_open_clip  # noqa: E402

TRICKY = [
    "",
    "dog",
    "A Photo of a  DOG.",
    "\tdog\r\n cat\u00a0horse\u3000",
    "don't, I'LL, it's 'quoted'",
    "child’s “toy”",
    "3.14 % #4 a/b-c_d {x} it''s ...",
    "½ ② ²",
    "café cafe\u0301 İstanbul straße ñ",
    "犬と猫 собака 狗 한국어 हिन्दी ไทย العربية",
    "🐕 👨‍👩‍👧 ✈️",
    "x" * 500,
    "字" * 300,
    "traffic light " * 60,
    "a\x00b\ufeff\x1cc",
]


@pytest.fixture(scope="module")
def official() -> Any:
    return open_clip.get_tokenizer("ViT-B-16")


@pytest.fixture(scope="module")
def ours(official: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer_from_open_clip(official, where="test").save(str(path))
    return Tokenizer.from_file(str(path))  # as the runtime opens it


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_ids_equal_open_clips(text: str, official: Any, ours: Tokenizer) -> None:
    assert ours.encode(text).ids == official([text])[0].tolist()


def test_every_prompt_of_voc_and_coco_is_equal(official: Any, ours: Tokenizer) -> None:
    names = [name for known in ("voc", "coco") for prompts in parse_classes(known).prompts for name in prompts]
    templates = (*TEMPLATES, *open_clip.OPENAI_IMAGENET_TEMPLATES[:5], *open_clip.SIMPLE_IMAGENET_TEMPLATES)
    forms: list[Callable[[str], str]] = [form if callable(form) else form.format for form in templates]
    texts = [form(name) for name in (*names, *BACKGROUNDS) for form in forms]
    assert [line.ids for line in ours.encode_batch(texts)] == official(texts).tolist()


def test_long_text_is_cut_and_keeps_its_end(official: Any, ours: Tokenizer) -> None:
    ids = ours.encode("dog " * 200).ids
    assert len(ids) == 77
    assert (ids[0], ids[-1]) == (49406, 49407)
    assert special_ids(official) == {"pad": 0, "start": 49406, "end": 49407}


def test_another_context_length_is_kept() -> None:
    short = open_clip.get_tokenizer("ViT-B-16", context_length=16)
    assert len(tokenizer_from_open_clip(short, where="test").encode("dog").ids) == 16


def test_random_shortening_is_refused() -> None:
    with pytest.raises(WeightsError, match="reduction_mask"):
        tokenizer_from_open_clip(open_clip.tokenizer.SimpleTokenizer(reduction_mask="random"), where="test")


def bert(folder: Path) -> str:
    """A WordPiece tokenizer in transformers' format, as CLIPA's; returns its folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,'"]
    words += [f"##{sign}" for sign in "abcdefghijklmnopqrstuvwxyz0123456789"] + ["origami", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return str(folder)


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
@pytest.mark.parametrize("strip_sep_token", [False, True])
def test_tokenizers_of_transformers_are_translated(tmp_path: Path, clean: str, strip_sep_token: bool) -> None:
    official = open_clip.tokenizer.HFTokenizer(bert(tmp_path), context_length=12, clean=clean, strip_sep_token=strip_sep_token)
    fast = tokenizer_from_open_clip(official, where="test")
    for text in (*TRICKY, "A clean_origami dog!"):
        assert fast.encode(text).ids == official([text])[0].tolist(), text
    assert special_ids(official) == {"pad": 0, "start": 2, "end": 3}


def test_the_sides_that_are_cut_and_padded_are_kept(tmp_path: Path) -> None:
    config = Path(bert(tmp_path)) / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncation_side": "left", "padding_side": "left"}))
    official = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=12)
    fast = tokenizer_from_open_clip(official, where="test")
    for text in ("dog", "a b c d e f g h i j k l m n o p"):
        assert fast.encode(text).ids == official([text])[0].tolist(), text
    assert fast.encode("dog").ids[0] == 0


def test_a_token_that_a_tokenizer_lacks_is_minus_one() -> None:
    t5: Any = SimpleNamespace(pad_token_id=0, bos_token_id=None, cls_token_id=None, eos_token_id=1, sep_token_id=None)
    official: Any = SimpleNamespace(tokenizer=t5)
    assert special_ids(official) == {"pad": 0, "start": -1, "end": 1}


def test_a_tokenizer_that_would_differ_is_refused(official: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss.export.clip.tokenizer._PIECES", r"[\p{L}\p{N}]+|[^\s\p{L}\p{N}]+")  # digits no longer single
    with pytest.raises(WeightsError, match="cannot be converted"):
        tokenizer_from_open_clip(official, where="test")
