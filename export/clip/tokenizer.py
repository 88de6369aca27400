"""Conversion of open_clip's tokenizers to `tokenizers` files, so that the runtime needs neither torch nor open_clip.

The ids equal open_clip's for text in any script. Of open_clip's cleaning with ftfy, the conversion includes composed accents
(NFC), straight quotes and the removal of control characters. It does not include, because that would need ftfy in the base
install, the repair of mojibake, HTML entities, full-width letters and ligatures, nor a capital final sigma. The marks
``<start_of_text>`` and ``<end_of_text>`` inside a text are ordinary letters, so that a class name cannot end its prompt.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from ...errors import WeightsError

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

CHECKED_TEXTS = (
    "",
    "a clean origami person with clothes.",
    "A Photo of the potted-plant,  isn't it? #3 & 127 (x2)",
    "\tcafé naïve 犬と猫 собака 🐕\n",
    "traffic_light " * 100,
)
"""Texts for which a converted tokenizer must give open_clip's ids before it is used."""

# open_clip/tokenizer.py, SimpleTokenizer.pat: contractions, words, single digits, runs of other signs.
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPACES = Regex(r"\s+")
_CONTROLS = Regex("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")  # ftfy.fixes.remove_control_chars
_QUOTES = ((Regex("[\u02bc\u2018-\u201b]"), "'"), (Regex("[\u201c-\u201f]"), '"'))


def tokenizer_from_open_clip(official: SimpleTokenizer | HFTokenizer, *, where: str) -> Tokenizer:
    """Convert a tokenizer of ``open_clip.get_tokenizer`` to `tokenizers`.

    Returns:
        A tokenizer whose ``encode(text).ids`` has exactly the context length: start, pieces, end, padding; a longer
        text is cut and keeps its end.

    Raises:
        WeightsError: the tokenizer has no fast form, or its fast form gives other ids.
    """
    from open_clip.tokenizer import SimpleTokenizer

    fast = _from_simple(official) if isinstance(official, SimpleTokenizer) else _from_hugging_face(official, where=where)
    for text in CHECKED_TEXTS:
        expected, got = official([text])[0].tolist(), fast.encode(text).ids
        if expected != got:
            raise WeightsError(
                f"{where}: its tokenizer cannot be converted: {text[:40]!r} gives {got[:8]}, in open_clip {expected[:8]}",
                hint="use a variant with CLIP's own tokenizer, for example ViT-B-16",
            )
    return fast


def special_ids(official: SimpleTokenizer | HFTokenizer) -> dict[str, int]:
    """Token ids ``pad``, ``start`` and ``end``; -1 where a tokenizer has no such token (T5 has no start)."""
    from open_clip.tokenizer import SimpleTokenizer

    if isinstance(official, SimpleTokenizer):
        return {"pad": 0, "start": official.sot_token_id, "end": official.eot_token_id}
    inner = official.tokenizer
    start = inner.bos_token_id if inner.bos_token_id is not None else inner.cls_token_id
    end = inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id
    ids = {"pad": inner.pad_token_id, "start": start, "end": end}
    return {name: -1 if value is None else int(value) for name, value in ids.items()}


def _from_simple(official: SimpleTokenizer) -> Tokenizer:
    if official.reduction_fn is not None:
        raise WeightsError("this variant shortens long prompts at random (reduction_mask); only truncation can be exported")
    ids: dict[str, int] = official.encoder
    merges = sorted(official.bpe_ranks, key=official.bpe_ranks.__getitem__)
    names = {number: piece for piece, number in ids.items()}
    start, end = names[official.sot_token_id], names[official.eot_token_id]

    fast = Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>", unk_token=end))
    fast.normalizer = _cleaning(official.clean_fn)
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, official.sot_token_id), (end, official.eot_token_id)]
    )
    fast.enable_truncation(official.context_length)
    fast.enable_padding(length=official.context_length, pad_id=0, pad_token=names[0])
    return fast


def _from_hugging_face(official: HFTokenizer, *, where: str) -> Tokenizer:
    inner: Any = getattr(official, "tokenizer", None)
    if inner is None or not inner.is_fast or official.tokenizer_mode:
        raise WeightsError(
            f"{where}: its tokenizer {type(inner).__name__} has no fast form that runs without torch",
            hint="use a variant with CLIP's own tokenizer, for example ViT-B-16",
        )
    fast = Tokenizer.from_str(inner.backend_tokenizer.to_str())
    existing = [] if fast.normalizer is None else [fast.normalizer]
    fast.normalizer = normalizers.Sequence([_cleaning(official.clean_fn), *existing])
    pad = inner.pad_token or "[PAD]"
    if official.strip_sep_token:  # open_clip replaces [SEP] by 0 after truncation, which equals ending with token 0
        zero = inner.convert_ids_to_tokens(0)
        fast.post_processor = processors.TemplateProcessing(
            single=f"{inner.cls_token} $A {zero}", special_tokens=[(inner.cls_token, inner.cls_token_id), (zero, 0)]
        )
    fast.enable_truncation(official.context_length, direction=inner.truncation_side)
    fast.enable_padding(length=official.context_length, pad_id=inner.pad_token_id, pad_token=pad, direction=inner.padding_side)
    return fast


def _cleaning(clean: Any) -> normalizers.Normalizer:
    """open_clip's ``clean_fn`` (lower, whitespace, canonicalize) as a normalizer."""
    from open_clip import tokenizer as official

    steps: list[normalizers.Normalizer] = [normalizers.Replace(pattern, sign) for pattern, sign in _QUOTES]
    steps += [normalizers.Replace(_CONTROLS, ""), normalizers.NFC()]
    if clean is official._clean_canonicalize:
        steps.append(normalizers.Replace("_", " "))
        escaped = "".join(f"\\{sign}" for sign in string.punctuation)
        steps.append(normalizers.Replace(Regex(f"[{escaped}]"), ""))
    steps += [normalizers.Replace(_SPACES, " "), normalizers.Strip()]
    if clean is not official._clean_whitespace:
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps)
