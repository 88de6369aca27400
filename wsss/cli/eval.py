"""``wsss eval``."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, WsssError
from ..progress import end_progress
from .common import JsonFlag, counter, log

if TYPE_CHECKING:
    from ..train.evaluate.files import LabelMaps

_NAMED = 10
"""Missing predictions named on the terminal; --json names all."""


def eval(
    predicted: Annotated[
        str, typer.Argument(metavar="PRED", help="Label store, folder of label PNGs, or folder in VOC's layout.")
    ],
    truth: Annotated[str, typer.Argument(metavar="TRUTH", help="True label maps, in any of these forms.")],
    classes: Annotated[
        str | None, typer.Option(help="voc, coco, mini, a file, or names. Default: those of the label store PRED.")
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--list", metavar="FILE", help="Score only the images of this list: one name per line, as in VOC's and COCO's."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="True image labels: JSON, image ids with class ids, or cls_labels.npy. Default: from the true label maps."
        ),
    ] = None,
    crf: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="Refine PRED with a DenseCRF on these photographs first; the output says so."),
    ] = None,
    png: Annotated[str | None, typer.Option(metavar="FILE", help="Plot the confusion matrix.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. Default: one per core.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Score label maps against true ones.

    All images, at their own size, are counted into one confusion matrix.
    """
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
        raise WsssError(
            f"--labels {labels}: {found.folder} is not a label store, so it has no scores of image labels",
            hint="give the store as PRED",
        )
    if png and not Path(png).parent.is_dir():
        raise WsssError(f"--png {png}: there is no folder {Path(png).parent}", hint="create it first: nothing was scored yet")
    pairs = pair_up(found, true, Path(names) if names else None)
    present = read_image_labels(Path(labels), listed, pairs.names) if labels else None
    if crf:
        check_crf()
    photographs = find_photographs(Path(crf), pairs.names) if crf else None
    start = time.perf_counter()
    show = counter("label maps")
    try:
        counts = count_pairs(
            pairs, listed, photographs=photographs, workers=workers, progress=lambda done: show(done, len(pairs.names))
        )
    except KeyboardInterrupt:
        end_progress()
        log("interrupted; nothing was written")
        raise SystemExit(130) from None
    predicted_labels = None if found.classes is None else [found.scores.get(name or "", {}) for name in pairs.matched]
    scores = scores_from_counts(counts, listed, predicted_labels, present)
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
        log(
            f"{pairs.unused} other predictions are {'not in the list' if names else f'without a true label map in {true.inside}'}"
        )
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
    """Class names by ``--classes`` or the label store. Raises WsssError where they contradict each other."""
    from ..classes import cleaned, parse_classes

    if classes is None and predicted.classes is None:
        hint = f"for example: wsss eval {predicted.folder} {truth.folder} --classes voc"
        raise UsageError(f"--classes is missing: {predicted.folder} is not a label store", hint=hint)
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
