"""Tokenizes class phrases and prompts for the text graphs.

Two texts with the same tokens are the same text to a model. Classes that a model cannot tell apart, or cannot read, are refused
here: otherwise every box would go to the first of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ..classes import ClassList, cleaned
from ..errors import BundleError, ClassError
from ..spec import Model

_log = logging.getLogger("wsss")


def open_tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of an exported model. Raises BundleError when the model has none or the file is damaged."""
    name = model.manifest.tokenizer
    again = f"wsss export --model {model.manifest.family} --bundle {model.folder.parent}"
    if name is None:
        raise BundleError(f"{model.folder}: the manifest names no tokenizer", hint=again)
    path = Path(model.folder, name)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: not a tokenizer: {error}", hint=again) from None


def tokenize_phrases(tokenizer: Tokenizer, classes: ClassList, budget: int) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Token ids of each class's detector phrases, and of the negatives, without special tokens.

    Negatives that the tokenizer cannot read are left out with a warning: CLIP reads them.

    Args:
        budget: most tokens of a phrase, and of all negatives with their dots beside it.

    Raises:
        ClassError: a word that the tokenizer does not know, a phrase without tokens or with too many, two classes whose
            phrases have the same tokens, or negatives that leave no room for a class.
    """
    tokenizer.no_truncation()
    ids_of: list[list[list[int]]] = []
    for name, phrases in zip(classes.names, classes.phrases, strict=True):
        ids_of.append([])
        for phrase in phrases:
            ids, unknown = _ids_of(tokenizer, phrase)
            if not ids:
                raise ClassError(
                    f"{classes.where}: {name!r} holds nothing that the detector's tokenizer can read", hint=_english(name)
                )
            if unknown:
                raise ClassError(
                    f"{classes.where}: {name!r}: the detector's tokenizer does not know {unknown!r}: to it, all such words "
                    "are the same",
                    hint=_english(name),
                )
            if len(ids) > budget:
                raise ClassError(
                    f"{classes.where}: a name takes {len(ids) + 1} tokens, a caption holds {budget + 1}: {name[:60]!r}",
                    hint="shorten the longest class name",
                )
            ids_of[-1].append(ids)
    read = {name: _ids_of(tokenizer, cleaned(name)) for name in classes.negatives}
    for name, (ids, unknown) in read.items():
        if unknown or not ids:
            _log.warning("only CLIP reads the negative %r: the detector's tokenizer does not know %r", name, unknown or name)
    negatives = {name: ids for name, (ids, unknown) in read.items() if ids and not unknown}
    names = [*(f"the class {name!r}" for name in classes.names), *(f"the negative {name!r}" for name in negatives)]
    _check_distinct(names, [*ids_of, *([ids] for ids in negatives.values())], "the detector", classes.where)
    beside = sum(len(ids) + 1 for ids in negatives.values())
    longest = max(len(ids) for phrases in ids_of for ids in phrases)
    if beside and longest + beside > budget:
        raise ClassError(
            f"{classes.where}: the negatives take {beside} tokens of every caption, which holds {budget + 1}; the longest class "
            f"takes {longest + 1}",
            hint="leave out some of the lines that begin with an exclamation mark",
        )
    return ids_of, list(negatives.values())


def _ids_of(tokenizer: Tokenizer, phrase: str) -> tuple[list[int], str]:
    """Token ids of a phrase without special tokens, and a word of it that the tokenizer does not know; empty if it knows all."""
    encoding = tokenizer.encode(phrase, add_special_tokens=False)
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown not in encoding.tokens:
        return encoding.ids, ""
    start, stop = encoding.offsets[encoding.tokens.index(unknown)]
    return encoding.ids, phrase[start:stop]


def tokenize_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[str]],
    templates: Sequence[str],
    length: int,
    end: int,
    names: Sequence[str],
    where: str,
    *,
    reader: str = "CLIP",
) -> list[list[list[int]]]:
    """Token ids of every template of each row's prompts, with special tokens. Logs a warning about sentences that are cut.

    Args:
        length: most tokens of a sentence. end: the token that ends a sentence that is cut.
        names: what messages call each row; rows without a name may equal others. where: what they call the class list.
        reader: what they call the model.

    Raises:
        ClassError: two named rows have a sentence of the same tokens.
    """
    tokenizer.no_truncation()
    ids_of: list[list[list[int]]] = []
    cut: list[str] = []
    for row in prompts:
        ids_of.append([])
        for sentence in (template.format(prompt) for prompt in row for template in templates):
            ids = tokenizer.encode(sentence).ids
            if len(ids) > length:
                cut.append(sentence)
                ids = [*ids[: length - 1], end]
            ids_of[-1].append(ids)
    if cut:
        _log.warning("%s reads only %d tokens and cuts the end of %d prompts, for example %r", reader, length, len(cut), cut[0])
    _check_distinct(names, ids_of, reader, where)
    return ids_of


def _check_distinct(names: Sequence[str], ids: Sequence[Sequence[Sequence[int]]], model: str, where: str) -> None:
    owner: dict[tuple[int, ...], int] = {}
    for row, (name, sentences) in enumerate(zip(names, ids, strict=False)):
        for sentence in sentences if name else ():
            first = owner.setdefault(tuple(sentence), row)
            if first != row:
                raise ClassError(
                    f"{where}: {names[first]} and {name} have the same tokens in {model}'s tokenizer, which cannot "
                    "tell them apart",
                    hint="give one of them another wording, or leave it out",
                )


def _english(name: str) -> str:
    example = json.dumps({name[:40]: {"prompts": ["cat"], "phrases": ["cat"]}}, ensure_ascii=False)
    return f"write it in English; a JSON file of classes can keep the name, for example {example}"
