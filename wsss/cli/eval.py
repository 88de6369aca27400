"""``wsss eval``."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import WsssError
from .common import JsonFlag, ask, end_progress, log

if TYPE_CHECKING:
    from ..train.evaluate.files import LabelMaps

_NAMED = 10
"""Missing predictions named on the terminal; --json names all."""


def eval(
    predicted: Annotated[
        str | None, typer.Argument(metavar="PRED", help="Label store, folder of label PNGs, or folder in VOC's layout.")
    ] = None,
    truth: Annotated[
        str | None, typer.Argument(metavar="TRUTH", help="The true label maps, in a folder of the same kinds.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="voc, coco, mini, a file, or names; default: those of the label store PRED.")
    ] = None,
    names: Annotated[
        str | None,
        typer.Option("--list", metavar="FILE", help="Score these images only: one name a line, as VOC's and COCO's lists."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="True image labels: JSON, image ids with class ids, or cls_labels.npy; default: from the true label maps."
        ),
    ] = None,
    crf: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="Refine PRED by a DenseCRF with these photographs first; the output says so."),
    ] = None,
    png: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the confusion matrix.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Score label maps against the truth: one confusion matrix of all images, at their own size."""
    for flag, value in (("PRED", predicted), ("TRUTH", truth)):
        if value is None:
            ask(flag, "wsss eval store VOC2012 --classes voc --list train.txt")
    assert predicted is not None and truth is not None
    from ..train.evaluate.checks import check_truth, warnings_of
    from ..train.evaluate.crf import SAID, check_crf, find_photographs
    from ..train.evaluate.files import find_label_maps, pair_up
    from ..train.evaluate.labels import read_image_labels
    from ..train.evaluate.picture import write_confusion
    from ..train.evaluate.report import scores_from_counts, table
    from ..train.evaluate.run import count_pairs

    found, true = find_label_maps(Path(predicted)), find_label_maps(Path(truth))
    listed = _class_names(classes, found, true)
    if labels and found.classes is None:
        raise WsssError(f"--labels {labels}: {found.folder} is no label store, it has no scores of image labels to compare with")
    if png and not Path(png).parent.is_dir():
        raise WsssError(f"--png {png}: there is no folder {Path(png).parent}", hint="make it first: nothing was scored yet")
    pairs = pair_up(found, true, Path(names) if names else None)
    present = read_image_labels(Path(labels), listed, pairs.names) if labels else None
    if crf:
        check_crf()
    photographs = find_photographs(Path(crf), pairs.names) if crf else None
    start = time.perf_counter()
    try:
        counts = count_pairs(
            pairs,
            listed,
            photographs=photographs,
            workers=workers,
            progress=lambda done: _show(done, len(pairs.names)),
        )
    except KeyboardInterrupt:
        end_progress()
        log("interrupted; nothing was written")
        raise SystemExit(130) from None
    said = None if found.classes is None else [found.scores.get(name or "", {}) for name in pairs.matched]
    scores = scores_from_counts(counts, listed, said, present)
    end_progress()
    check_truth(counts.matrix, counts.facts, true.inside)
    warnings = [*pairs.warnings, *warnings_of(counts.matrix, counts.facts, counts.pixels, listed)]
    for warning in warnings:
        log(f"warning: {warning}", logging.WARNING)
    if pairs.missing:
        more = f" and {len(pairs.missing) - _NAMED} more" if len(pairs.missing) > _NAMED else ""
        log(
            f"{len(pairs.missing)} of {len(pairs.names)} predictions are missing and count as errors: "
            f"{', '.join(pairs.missing[:_NAMED])}{more}"
        )
    if pairs.unused:
        log(f"{pairs.unused} other predictions are {'not in the list' if names else f'without a truth in {true.inside}'}")
    if png:
        write_confusion(counts.matrix, listed, Path(png))
    if json_output:
        about = {
            "predicted": str(found.inside),
            "truth": str(true.inside),
            "list": names,
            "crf": SAID if crf else None,
            "images": len(pairs.names),
            "missing": pairs.missing,
            "unused_predictions": pairs.unused,
            "warnings": warnings,
            "seconds": round(time.perf_counter() - start, 2),
        }
        typer.echo(json.dumps({**about, **scores}, ensure_ascii=False, allow_nan=False))
        return
    refined = f", refined by {SAID}" if crf else ""
    typer.echo(f"{found.inside} against {true.inside}: {len(pairs.names)} images{refined}\n\n{table(scores)}")


def _class_names(classes: str | None, predicted: LabelMaps, truth: LabelMaps) -> tuple[str, ...]:
    """The run's class names; a label store says what its labels mean, and is believed."""
    from ..classes import cleaned, parse_classes

    if classes is None and predicted.classes is None:
        ask("--classes", f"wsss eval {predicted.folder} {truth.folder} --classes voc")
    listed = parse_classes(classes).names if classes is not None else predicted.classes or ()
    for maps in (predicted, truth):
        if maps.classes is not None and list(map(cleaned, maps.classes)) != list(map(cleaned, listed)):
            given = f"--classes {classes}" if classes is not None else f"{predicted.folder}"
            raise WsssError(
                f"{maps.folder}: a label store of the classes {_short(maps.classes)}, {given} means {_short(listed)}",
                hint="labels are compared by their number: give the list that the store was made with, in its order",
            )
    return predicted.classes or listed  # the manifest's spelling


def _short(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done}/{total} label maps", end="", file=sys.stderr, flush=True)
