"""Tokenizers and class phrases: what turns words into the tensors of the text graphs."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ..errors import BundleError
from ..spec import Model


def open_tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of an exported model. Raises BundleError when the model has none or the file is damaged."""
    name = model.manifest.tokenizer
    again = f"wsss export --model {model.manifest.family} --bundle {model.folder.parent}"
    if name is None:
        raise BundleError(f"{model.folder}: the manifest names no tokenizer", hint=again)
    path = Path(model.folder, name)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{path}: not a tokenizer: {error}", hint=again) from None
