"""``wsss calibrate``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UsageError
from ...progress import end_progress
from ..common import BundleFlag, Engine, JsonFlag, counter, log
from .labeled import FoldsFlag, ListFlag, PhotosArgument, evidence_of, labeled_photographs

if TYPE_CHECKING:
    from ...classes import ClassList
    from ...runtime.chain import Chain
    from ...runtime.tune.calibrate import Calibrated

BATCH = 8


def calibrate(
    photos: PhotosArgument,
    truth: Annotated[
        str | None, typer.Argument(metavar="[TRUTH]", help="True label maps of some of them, as wsss eval takes them.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help='voc, coco, mini, a file, or names: "dog, potted plant".')] = None,
    labels: Annotated[
        str | None, typer.Option(help="In place of TRUTH, the classes of each photograph: JSON, a list, or cls_labels.npy.")
    ] = None,
    bundle: BundleFlag = "bundle",
    engine: Annotated[Engine, typer.Option(help="What runs the graphs, as for wsss label.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    names: ListFlag = None,
    folds: FoldsFlag = 5,
    out: Annotated[
        str, typer.Option(help="File that gets the thresholds, for wsss label --tag-thresholds.")
    ] = "tag-thresholds.json",
    json_output: JsonFlag = False,
) -> None:
    """Find a CLIP threshold for each class.

    With label maps, by the mIoU of the chain; with image labels, by their F1.
    """
    if classes is None:
        raise UsageError("--classes is missing", hint='for example: --classes voc, or --classes "dog, potted plant"')
    if (truth is None) == (labels is None):
        raise UsageError("expected TRUTH or --labels, one of them", hint="wsss calibrate photos truth, or --labels labels.json")
    from ...classes import parse_classes
    from ...runtime.chain import Chain
    from ...runtime.given.thresholds import write_thresholds
    from ...runtime.tune.calibrate import by_name, calibrate_chain

    known = parse_classes(classes)
    if truth is not None:
        labeled = labeled_photographs(photos, truth, names, known.names)
        chain = Chain.open(bundle, classes=known, engine=engine, device=device)
        count = len(labeled.names)
        result = calibrate_chain(evidence_of(chain, labeled), folds=folds)
    else:
        assert labels is not None
        chain = Chain.open(bundle, classes=known, engine=engine, device=device, until="tag")
        count, result = _by_labels(chain, known, photos, labels, names, folds)
    end_progress()
    thresholds = by_name(known, result.thresholds)
    write_thresholds(out, thresholds)
    if json_output:
        document = {**dataclasses.asdict(result), "thresholds": thresholds, "photographs": count, "written": out}
        typer.echo(json.dumps(document, allow_nan=False, ensure_ascii=False))
        return
    typer.echo(f"{count} photographs; scores on photographs that were left out, with one threshold and with one for each class\n")
    rows = [(name.replace("_", " "), result.before[name], result.after[name]) for name in result.before]
    if result.miou is not None and result.miou_before is not None:
        rows.append(("mIoU of the chain", result.miou_before, result.miou_before + result.miou.value))
    for name, before, after in rows:
        typer.echo(f"{name:18} {before:.4f}   {after:.4f}")
    gain = f"; mIoU {result.miou}" if result.miou is not None else ""
    typer.echo(f"\n{out}: {len(thresholds)} thresholds, {min(thresholds.values()):g} to {max(thresholds.values()):g}{gain}")
    if result.miou is not None and result.miou.value < 0:
        log("warning: the chain is not better with these thresholds on photographs that were left out", 30)


def _by_labels(
    chain: Chain, classes: ClassList, photos: str, labels: str, names: str | None, folds: int
) -> tuple[int, Calibrated]:
    """Calibrate on the photographs of a folder, or of a list, whose classes a file names; and their number."""
    import numpy as np

    from ...photographs import read_photograph
    from ...runtime.tag import Tagger
    from ...runtime.tune.calibrate import calibrate as by_classes
    from ...train.evaluate.files import list_lines, plain_name, possible_names
    from ...train.evaluate.labels import read_image_labels
    from ...train.evaluate.photographs import folder_of_photographs, photographs_by_name

    folder = folder_of_photographs(Path(photos))
    found = photographs_by_name(folder, "PHOTOS")
    listed = sorted({plain_name(path.relative_to(folder).as_posix()) for path in found.values()})
    if names is not None:
        lines = [(line, tuple(possible_names(line))) for _, line in list_lines(Path(names), "--list")]
        if missing := [line for line, each in lines if not any(name in found for name in each)]:
            raise UsageError(f"--list {names}: {photos} has no photograph of {missing[0][:100]}", hint="one name per line")
        listed = [next(name for name in each if name in found) for _, each in lines]
    truth = read_image_labels(Path(labels), classes.names, listed)
    stage, show = chain.tag.stage, counter("photographs")
    assert isinstance(stage, Tagger)
    scores = [np.zeros((0, len(classes)), np.float32)]
    for start in range(0, len(listed), BATCH):
        images = [read_photograph(folder, found[name].relative_to(folder).as_posix()) for name in listed[start : start + BATCH]]
        scores.append(chain.tag.part(stage.scores, images))
        show(min(start + BATCH, len(listed)), len(listed))
    return len(listed), by_classes(np.concatenate(scores), truth, stage.threshold, folds=folds)
