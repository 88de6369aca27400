"""``wsss eval``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UsageError, WsssError
from ..extras import needs
from ..progress import end_progress
from .common import JsonFlag, counter, images_folder, log

if TYPE_CHECKING:
    from ..train.apply.inference import Inference
    from ..train.apply.predictor import Predictor
    from ..train.evaluate.files import LabelMaps, Pairs

_NAMED = 10
"""Missing predictions named on the terminal; --json names all."""


def eval(
    predicted: Annotated[
        str,
        typer.Argument(
            metavar="PRED",
            help="Label store, folder of label PNGs, or folder in VOC's layout. With --run: the folder of the photographs.",
        ),
    ],
    truth: Annotated[str, typer.Argument(metavar="TRUTH", help="True label maps, in any of these forms.")],
    classes: Annotated[
        str | None, typer.Option(help="voc, coco, mini, a file, or names. Default: those of the label store PRED, or of --run.")
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
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="RUN", help="Score this trained run: it predicts the photographs PRED at their own size."),
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="With --run: average the probabilities over these scales. Default: 1."),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="With --run: also average over mirrored photographs.")] = False,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="With --run: slide a window of this side over the photograph, not all of it at once."
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Distance between windows. Default: two thirds of --window.")
    ] = None,
    save: Annotated[str | None, typer.Option(metavar="FOLDER", help="With --run: keep the predicted label maps.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="With --run: where to predict.")] = "auto",
    crf: Annotated[
        bool,
        typer.Option(
            "--crf",
            help="Refine by a DenseCRF first: the probabilities of --run, or the labels of PRED; the output says so.",
        ),
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Photographs for --crf. Default: where the label store PRED was made from."),
    ] = None,
    png: Annotated[str | None, typer.Option(metavar="FILE", help="Plot the confusion matrix.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. Default: one per core.")] = None,
    json_output: JsonFlag = False,
) -> None:
    """Score label maps, or a trained run, against true label maps.

    All images, at their own size, are counted into one confusion matrix.
    """
    from ..train.apply.inference import Inference, parse_scales
    from ..train.evaluate.checks import check_truth, warnings_of
    from ..train.evaluate.crf import SAID, SAID_SOFT, check_crf
    from ..train.evaluate.files import find_label_maps, pair_up
    from ..train.evaluate.labels import read_image_labels
    from ..train.evaluate.photographs import find_photographs
    from ..train.evaluate.picture import write_confusion
    from ..train.evaluate.report import scores_from_counts, table
    from ..train.evaluate.run import count_pairs

    given = {"--scales": scales, "--flip": flip, "--window": window, "--stride": stride, "--save": save}
    _check_flags(run, given, labels, images, crf)
    inference = Inference(scales=parse_scales(scales), flip=flip, window=window or 0, stride=stride or 0, crf=crf)
    if crf:
        check_crf()
    true = find_label_maps(Path(truth))
    if png and not Path(png).parent.is_dir():
        raise WsssError(f"--png {png}: there is no folder {Path(png).parent}", hint="create it first: nothing was scored yet")
    start = time.perf_counter()
    photographs = present = predicted_labels = None
    with contextlib.ExitStack() as stack:
        if run is not None:
            listed, pairs, inside = _predicted(run, predicted, true, names, classes, inference, save, device, workers, stack)
        else:
            found = find_label_maps(Path(predicted))
            listed, inside = _class_names(classes, found, true), found.inside
            if labels and found.classes is None:
                raise WsssError(
                    f"--labels {labels}: {found.folder} is not a label store, so it has no scores of image labels",
                    hint="give the store as PRED",
                )
            if labels and not found.scores:
                raise WsssError(
                    f"--labels {labels}: {found.folder} was made from boxes, so it has no scores of image labels",
                    hint="omit --labels",
                )
            pairs = pair_up(found, true, Path(names) if names else None)
            present = read_image_labels(Path(labels), listed, pairs.names) if labels else None
            if crf:
                photographs = find_photographs(_photographs(found, images), pairs.names)
            if found.scores:
                predicted_labels = [found.scores.get(name or "", {}) for name in pairs.matched]
        show = counter("label maps")
        with _interruptible():
            counts = count_pairs(
                pairs, listed, photographs=photographs, workers=workers, progress=lambda done: show(done, len(pairs.names))
            )
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
    said = (SAID_SOFT if run else SAID) if crf else None
    if json_output:
        about = {
            "predicted": str(inside),
            "truth": str(true.inside),
            "list": names,
            "run": run,
            "inference": dataclasses.asdict(inference) if run else None,
            "crf": said,
            "images": len(pairs.names),
            "missing": pairs.missing,
            "unused_predictions": pairs.unused,
            "warnings": warnings,
            "seconds": round(time.perf_counter() - start, 2),
        }
        typer.echo(json.dumps({**about, **scores}, ensure_ascii=False, allow_nan=False))
        return
    by = f"{run} on {inside}" if run else f"{inside}"
    how = f", {inference}" if run else ""
    refined = f", refined by {said}" if said else ""
    typer.echo(f"{by} against {true.inside}: {len(pairs.names)} images{how}{refined}\n\n{table(scores)}")


def _check_flags(run: str | None, given: Mapping[str, object], labels: str | None, images: str | None, crf: bool) -> None:
    """Raises UsageError for flags without the flag that they belong to."""
    if run is None:
        for flag, value in given.items():
            if value:
                raise UsageError(f"{flag} is for --run, which predicts the photographs", hint="wsss eval photos truth --run run")
    elif labels:
        raise UsageError("--labels cannot be used with --run, which gives no image labels", hint="leave out --labels")
    if images and (run or not crf):
        hint = "with --run, PRED is the folder of the photographs" if run else "add --crf, or leave out --images"
        raise UsageError("--images gives the photographs for --crf on label maps", hint=hint)


def _predicted(
    run: str,
    images: str,
    true: LabelMaps,
    names: str | None,
    classes: str | None,
    inference: Inference,
    save: str | None,
    device: Literal["auto", "cpu", "cuda"],
    workers: int | None,
    stack: contextlib.ExitStack,
) -> tuple[tuple[str, ...], Pairs, Path]:
    """The classes of a run, its predictions paired with the true label maps, and the folder of the photographs."""
    from ..train.evaluate.files import Pairs, read_list
    from ..train.evaluate.photographs import find_photographs, folder_of_photographs

    if save and Path(save).exists() and not (Path(save).is_dir() and not any(Path(save).iterdir())):
        raise WsssError(f"--save {save}: expected a new or empty folder", hint="give another folder, or empty it")
    listed = read_list(Path(names), true) if names else tuple(true.paths)
    found = find_photographs(Path(images), [true.images.get(name, name) for name in listed], "PRED")
    with needs("train"):
        from ..train.apply.label_photographs import predict_into
        from ..train.apply.predictor import Predictor
    predictor = Predictor(Path(run), inference, device=device, workers=workers)
    class_names = _run_classes(run, predictor, classes, true)
    folder = Path(save) if save else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wsss-eval-")))
    truth = tuple(true.paths[name] for name in listed)
    with _interruptible(f"{save} has a part of the label maps" if save else "nothing was written"):
        paths = predict_into(predictor, found, truth, listed, folder, counter("photographs"))
    end_progress()
    pairs = Pairs(names=listed, truth=truth, predicted=paths, matched=listed, missing=(), unused=0)
    return class_names, pairs, folder_of_photographs(Path(images))


def _run_classes(run: str, predictor: Predictor, classes: str | None, true: LabelMaps) -> tuple[str, ...]:
    """The classes of a run. Raises WsssError where ``--classes`` or a true label store contradicts them."""
    from ..classes import check_label_map, cleaned, parse_classes

    known = predictor.record.classes
    others = [(f"--classes {classes}", check_label_map(parse_classes(classes)).names)] if classes is not None else []
    others += [(str(true.folder), true.classes)] if true.classes is not None else []
    for where, names in others:
        if list(map(cleaned, names)) != list(map(cleaned, known)):
            raise WsssError(
                f"{where}: means the classes {_short(names)}, the run {run} was trained for {_short(known)}",
                hint="labels are compared by their number: the true label maps must number the run's classes in its order",
            )
    return known


def _photographs(found: LabelMaps, images: str | None) -> Path:
    """The photographs of label maps, for the CRF."""
    if images is None and found.classes is None:
        raise UsageError("--crf needs the photographs", hint=f"--images FOLDER: {found.folder} does not say where they are")
    return images_folder(str(found.folder), images)


@contextlib.contextmanager
def _interruptible(left: str = "nothing was written") -> Iterator[None]:
    """End with exit code 130 at an interrupt. ``left``: what it left behind."""
    try:
        yield
    except KeyboardInterrupt:
        end_progress()
        log(f"interrupted; {left}")
        raise SystemExit(130) from None


def _class_names(classes: str | None, predicted: LabelMaps, truth: LabelMaps) -> tuple[str, ...]:
    """Class names by ``--classes`` or the label store. Raises WsssError where they contradict each other."""
    from ..classes import check_label_map, cleaned, parse_classes

    if classes is None and predicted.classes is None:
        hint = f"for example: wsss eval {predicted.folder} {truth.folder} --classes voc"
        raise UsageError(f"--classes is missing: {predicted.folder} is not a label store", hint=hint)
    listed = check_label_map(parse_classes(classes)).names if classes is not None else predicted.classes or ()
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
