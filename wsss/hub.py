"""Bundles of the Hugging Face hub, by the name ``hub:OWNER/NAME`` or ``hub:OWNER/NAME@REVISION``.

Only the files of a bundle are downloaded, none of which can hold code, into the hub's usual cache. Opening the bundle compares
them with the hashes of its manifest; the manifest itself is as trustworthy as its owner, and pinned by a commit as REVISION.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import BundleError, UsageError

PREFIX = "hub:"
FILES = ("*/manifest.json", "*/*.onnx", "*/weights.data", "*/tokenizer.json", "*/*.precision.txt", "*/*.plan")
"""Files of a bundle."""
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_on_hub(name: str) -> bool:
    """Whether a name of a bundle is one of the hub."""
    return name.startswith(PREFIX)


def download(name: str) -> Path:
    """Download a bundle, or update it in the cache, and return its folder.

    Args:
        name: ``hub:OWNER/NAME``, with ``@REVISION`` for a branch, a tag or a commit.

    Raises:
        UsageError: not such a name.
        BundleError: there is no such repository or revision, or neither a network nor a copy in the cache.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    wrong = UsageError(f"--bundle {name}: expected hub:OWNER/NAME", hint="hub:OWNER/NAME@COMMIT pins a commit")
    if not _NAME.fullmatch(repository):
        raise wrong
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES), library_name="wsss"))
    except HFValidationError:
        raise wrong from None
    except RepositoryNotFoundError:
        raise BundleError(
            f"--bundle {name}: the hub has no such repository, or it is private",
            hint="check its name; hf auth login for private ones",
        ) from None
    except RevisionNotFoundError:
        raise BundleError(f"--bundle {name}: the repository has no such revision", hint=f"--bundle hub:{repository}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:  # OSError: connections and the disk
        reason = str(error).strip().split("\n")[0]
        raise BundleError(
            f"--bundle {name}: cannot be downloaded, and is not in the cache: {reason}",
            hint="check the network; or copy the bundle and give its folder",
        ) from None
