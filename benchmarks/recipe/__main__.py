"""The paper's experiment by one command, from a data folder and exported models to a table beside published results.

    python -m wsss.benchmarks.recipe voc --data VOCdevkit/VOC2012 --bundle bundle --out runs/voc
    python -m wsss.benchmarks.recipe coco --data COCO --train-list train.txt --val-list val.txt --bundle bundle --out runs/coco
    python -m wsss.benchmarks.recipe drawn --out runs/drawn      # the same on drawn scenes with the small models, a minute

Labels the training images from the class list alone (or also from their true image labels, with ``--labels``), scores the
pseudo-labels, trains a segmenter on them, predicts the images of val and scores the predictions. Each step continues where it was
stopped, and finished steps are not repeated. True label maps are used for scores alone, except those of ``--tune``. To train on
several GPUs, run ``torchrun ... wsss train OUT/labels --images OUT/photographs/trainaug --out OUT/segmenter --preset ...`` when
the labels are complete; the recipe continues from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...classes import parse_classes
from ...errors import UsageError, WsssError
from ...extras import needs
from ...files import write_atomically
from ...runtime.bundles import find_bundle
from ...runtime.chain import Chain
from ...runtime.run.label_folder import Summary, label_folder
from ...store.local import make_folder
from ...train.apply.inference import Inference
from ...train.args import Config, config_from, read_config, typed
from ...train.evaluate.crf import SAID_SOFT, check_crf
from ...train.evaluate.files import find_label_maps, pair_up
from ...train.evaluate.report import Scores, scores_from_counts
from ...train.evaluate.run import count_pairs
from ...train.presets import preset
from ..steps import log
from .data import DataSet, Split, coco, link_photographs, voc
from .table import Result, Row, as_text
from .tuning import names_of, rules_for, without

if TYPE_CHECKING:
    from ...train.checkpoint import RunRecord
    from ...train.loop import Result as Trained
    from ...train.loop import Status

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of multi-scale testing, with mirror images: DeepLabV3 (arXiv:1706.05587, section 4.1)."""
PRESETS = {"voc": "deeplabv2-voc", "coco": "deeplabv2-coco", "drawn": "mini"}
"""Training presets of the segmenter that most papers report."""
SETTINGS = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run."""

    data: DataSet
    out: Path
    config: Config
    classes: str
    bundle: str = "bundle"
    engine: str = "auto"
    device: str = "auto"
    batch: int = 8
    labels: Path | None = None
    """True image labels that replace CLIP's: the usual setting of the field, but not the paper's."""
    tune: int = 0
    """Number of training images whose true label maps the chain's rules are tuned on, 0: the bundle's rules."""
    scales: tuple[float, ...] = SCALES
    """Scales of the second scoring on val; the first uses the original scale alone."""
    flip: bool = True
    crf: bool = False
    """Also score the segmenter with its averaged probabilities refined by a DenseCRF. Pseudo-labels have no probabilities."""
    log: Callable[[str], None] = field(default=lambda line: None, repr=False)


def run(recipe: Recipe) -> Result:
    """Run every step that is not finished, and return the scores of all.

    Raises:
        WsssError: a step fails; or ``out`` holds a run with other lists or classes.
    """
    with needs("train"):
        from ...train.apply.label_photographs import label_photographs
        from ...train.apply.predictor import Predictor
        from ...train.checkpoint import read_record
        from ...train.loop import train
    _begin(recipe)
    if recipe.crf:
        check_crf()
    data, out, log = recipe.data, recipe.out, recipe.log
    photographs = link_photographs(data.training, out / "photographs" / data.training.name)
    val = link_photographs(data.val, out / "photographs" / "val")

    opened = partial(
        Chain.open,
        recipe.bundle,
        classes=parse_classes(recipe.classes),
        engine=recipe.engine,
        device=recipe.device,
        labels=recipe.labels,
    )
    labeler = opened()
    if recipe.tune:
        rules = rules_for(labeler, data, recipe.tune, out, log)
        labeler = opened(rules=rules)
    settings = labeler.settings
    _label(recipe, labeler, photographs, out / "labels")
    del labeler  # frees the memory of its engines for the training
    scored = without(data, names_of(data, recipe.tune), out / "lists").scored if recipe.tune else data.scored
    rows = [_scored(recipe, out / "labels", split, "pseudo-labels") for split in scored]

    trained = train(
        out / "labels", photographs, out / "segmenter", recipe.config, log=log, watch=lambda status: log(_status_line(status))
    )
    record = read_record(out / "segmenter")
    names = sorted(path.name for path in val.iterdir())
    for inference in _inferences(recipe):
        copies = f"{' '.join(f'{scale:g}' for scale in inference.scales)}{' mirrored' if inference.flip else ''}"
        store = out / f"val-{copies.replace(' ', '-')}{'-crf' if inference.crf else ''}"
        predictor = Predictor(out / "segmenter", inference, precision=recipe.config.optimizer.precision)
        done = label_photographs(predictor, val, names, store, log=log, progress=_reported(recipe, store))
        log(f"{store.name}: {done.labeled} labeled, {done.skipped} done before, {done.failed} failed")
        what = f"segmenter, scale {copies}{', DenseCRF' if inference.crf else ''}"
        rows.append(_scored(recipe, store, data.val, what, crf=inference.crf))
    result = Result(
        dataset=data.name,
        rows=tuple(rows),
        deviation=data.deviation(),
        told=_told(recipe),
        network=f"{record.architecture} {record.encoder}",
        facts=(*_facts(recipe, settings), *_training_facts(trained, record)),
        crf=SAID_SOFT if recipe.crf else None,
    )
    write_atomically(out / "result.json", (json.dumps(dataclasses.asdict(result), indent=1) + "\n").encode())
    write_atomically(out / "table.txt", (as_text(result) + "\n").encode())
    return result


def _told(recipe: Recipe) -> str:
    """The supervision of the chain."""
    told = ["image labels"] if recipe.labels else []
    told += [f"{recipe.tune} label maps (rules)"] if recipe.tune else []
    return " and ".join(told) or "nothing"


def _begin(recipe: Recipe) -> None:
    """Make the folder, or check that it belongs to this run; stores and trainings check their own settings."""
    settings = {"data set": recipe.data.name, "names in the lists": recipe.data.digest(), "classes": recipe.classes}
    if recipe.tune:
        names_of(recipe.data, recipe.tune)
    path = recipe.out / SETTINGS
    try:
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            for key, value in settings.items():
                if before.get(key) != value:
                    raise WsssError(
                        f"--out {recipe.out}: was started with other {key}: {str(before.get(key))[:40]}, now {str(value)[:40]}",
                        hint="give a new --out: a run cannot change its data or classes",
                    )
            return
        if recipe.out.is_dir() and any(recipe.out.iterdir()):
            raise WsssError(
                f"--out {recipe.out}: the folder is not empty and holds no run of the recipe", hint="give a new or empty folder"
            )
        make_folder(recipe.out)
        write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())
    except OSError as error:
        raise WsssError(
            f"--out {recipe.out}: cannot be written: {error.strerror}", hint="give a folder you may write to"
        ) from None
    except ValueError as error:
        raise WsssError(f"{path}: damaged: {error}", hint="give a new --out") from None


def _label(recipe: Recipe, labeler: Chain, photographs: Path, store: Path) -> None:
    """Label photographs into a new or existing store."""
    reported = 0.0

    def progress(summary: Summary) -> None:
        nonlocal reported
        if summary.seconds - reported >= 30:
            reported = summary.seconds
            done = summary.skipped + summary.labelled + summary.failed
            recipe.log(f"{store.name}: {done}/{summary.images} images, {summary.failed} failed")

    summary = label_folder(labeler, photographs, store, batch=recipe.batch, progress=progress, warn=recipe.log)
    recipe.log(f"{store.name}: {summary.labelled} labeled, {summary.skipped} done before, {summary.failed} failed")


def _inferences(recipe: Recipe) -> list[Inference]:
    """The test-time settings of the scorings on val: one scale, then the recipe's, each also with the CRF if requested."""
    plain = dict.fromkeys((Inference(), Inference(scales=recipe.scales, flip=recipe.flip)))
    return [dataclasses.replace(each, crf=crf) for each in plain for crf in ((False, True) if recipe.crf else (False,))]


def _reported(recipe: Recipe, store: Path) -> Callable[[int, int], None]:
    """A progress callback that logs every 30 seconds."""
    reported = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= 30:
            reported = time.monotonic()
            recipe.log(f"{store.name}: {done}/{of} images")

    return progress


def _scored(recipe: Recipe, store: Path, split: Split, what: str, *, crf: bool = False) -> Row:
    """The scores of a store on a split. ``crf``: its labels are from a CRF."""
    scores, missing = _scores(recipe, store, split)
    recipe.log(f"{what} on {split.name}: mIoU {scores['miou']}")
    return Row(what=what, split=split.name, images=len(split.images), missing=missing, crf=crf, scores=scores)


def _scores(recipe: Recipe, store: Path, split: Split) -> tuple[Scores, int]:
    """Scores of a store and the number of missing images; they are kept until labels, list or truth change."""
    kept = recipe.out / "scores" / f"{store.name}-{split.name}.json"
    key = _key(store, split)
    if kept.is_file():
        stored = json.loads(kept.read_text(encoding="utf-8"))
        if stored["key"] == key:
            scores: Scores = stored["scores"]
            return scores, stored["missing"]
    found, true = find_label_maps(store), find_label_maps(split.truth)
    pairs = pair_up(found, true, split.list)
    classes = found.classes or ()
    counts = count_pairs(pairs, classes)
    scores = scores_from_counts(counts, classes, [found.scores.get(name or "", {}) for name in pairs.matched])
    make_folder(kept.parent)
    write_atomically(kept, (json.dumps({"key": key, "scores": scores, "missing": len(pairs.missing)}) + "\n").encode())
    return scores, len(pairs.missing)


def _key(store: Path, split: Split) -> str:
    """A hash of the labels (the manifest's lines), the names of the list, and the true label maps (their size and time)."""
    digest = hashlib.sha256((store / "manifest.jsonl").read_bytes())
    for name in split.images:
        status = (split.truth / f"{name}.png").stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    digest.update(f"{split.truth.resolve()}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _facts(recipe: Recipe, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Models, engine and rules that made the pseudo-labels."""
    bundle = find_bundle(recipe.bundle)
    for name in bundle.models():
        if name in settings["models"]:
            manifest = bundle.model(name).manifest
            yield name, f"{manifest.variant}, {manifest.precision}, weights {manifest.weights['source']}"
    yield "engine", settings["engine"]
    yield "rules", ", ".join(f"{key} {'of the bundle' if value is None else value}" for key, value in settings["rules"].items())


def _training_facts(trained: Trained, record: RunRecord) -> Iterator[tuple[str, str]]:
    """The facts of the segmenter's training that papers disclose."""
    from ...train.weights import Initial

    yield "segmenter", f"{record.architecture} {record.encoder}"
    yield "first weights", str(Initial(**record.init))
    yield "schedule", f"{record.steps} steps, crop {record.crop}; {record.source or 'own settings'}"
    kept = "the last" if trained.best_step is None else f"step {trained.best_step}, the best on held-out pseudo-labels"
    yield "trained on", f"pseudo-labels of {trained.images} images; weights: {kept}"


def _status_line(status: Status) -> str:
    minutes = f"{status.seconds_left / 60:.0f} min left"
    return f"step {status.step}/{status.steps}  loss {status.loss:.4f}  rate {status.rate:.2e}  {minutes}"


def draw_voc(folder: Path, *, train: int, aug: int, val: int, seed: int = 7_000_000) -> Path:
    """Write drawn scenes in VOC's layout: ``train`` + ``aug`` images in trainaug, ``val`` in val. Returns the folder."""
    from ...mini.scenes import write_scenes

    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    names_val = [path.stem for path in write_scenes(folder, val, seed=seed + train + aug)]
    names = [
        path.stem for path in write_scenes(folder, train + aug, seed=seed, split="train")
    ]  # last, so that labels.json has these
    for link, target in (("JPEGImages", "images"), ("SegmentationClass", "truth"), ("SegmentationClassAug", "truth")):
        if not (folder / link).exists():
            (folder / link).symlink_to(target)
    for name, listed in (("train", names[:train]), ("trainaug", names), ("val", names_val)):
        (lists / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in listed))
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A WsssError gives one message and exit code 1, or 2 for wrong usage."""
    try:
        options = _parser().parse_args(arguments)
        result = run(_recipe(options))
    except WsssError as error:
        print(f"recipe: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        print("recipe: interrupted; finished steps are kept, and the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    print(json.dumps(dataclasses.asdict(result)) if options.json else as_text(result))


def _recipe(options: argparse.Namespace) -> Recipe:
    out, kind = Path(options.out), str(options.dataset)
    if kind == "coco":
        data = coco(
            options.data,
            train_list=options.train_list,
            val_list=options.val_list,
            truth=Path(options.truth) if options.truth else None,
        )
    elif kind == "drawn":
        train = options.images // 3
        folder = draw_voc(out.with_name(f"{out.name}-voc"), train=train, aug=options.images - train, val=options.images // 2)
        data = dataclasses.replace(voc(folder), name="drawn scenes")
    else:
        data = voc(options.data, trainaug=options.train_on == "trainaug")
    layers: list[Mapping[str, Any]] = [preset(options.preset or PRESETS[kind])]
    layers += [{"optimizer": {"steps": 150}}] if kind == "drawn" else []
    layers += [read_config(Path(options.config))] if options.config else []
    layers += [{"model": {"init": options.init}}] if options.init else []
    layers += [{"optimizer": {"steps": options.steps}}] if options.steps else []
    layers += [typed(setting) for setting in options.set]
    return Recipe(
        data=data,
        out=out,
        config=config_from(*layers),
        classes=options.classes or ("mini" if kind == "drawn" else kind),
        bundle=options.bundle or ("mini" if kind == "drawn" else "bundle"),
        engine=options.engine,
        device=options.device,
        batch=options.batch,
        labels=Path(options.labels) if options.labels else None,
        tune=options.tune,
        scales=tuple(options.scales),
        flip=options.flip,
        crf=options.crf,
        log=log,
    )


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", required=True, help="folder of the run, new or to continue")
    shared.add_argument("--bundle", help="exported models (wsss export --model all); default: bundle")
    shared.add_argument("--classes", help="class list; default: the data set's")
    shared.add_argument("--engine", default="auto", help="auto, ort, trt, trt-rtx or eager")
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N, of the chain")
    shared.add_argument("--batch", type=int, default=8, help="images labeled together")
    shared.add_argument("--labels", help="true image labels (JSON, as for wsss label) instead of CLIP's; the table states it")
    shared.add_argument(
        "--tune",
        type=int,
        default=0,
        metavar="N",
        help="tune the chain's rules on N training images and their label maps, which are not scored then; the table states it",
    )
    shared.add_argument("--preset", help="schedule of the segmenter; default: deeplabv2-voc, deeplabv2-coco")
    shared.add_argument("--config", help="TOML file of training settings")
    shared.add_argument("--init", help="initial weights of the segmenter: none, hub:NAME, a file; default: the preset's")
    shared.add_argument("--steps", type=int, help="training steps")
    shared.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="any other training setting")
    shared.add_argument("--scales", type=float, nargs="+", default=SCALES, help="scales of the second scoring on val")
    shared.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="also use mirror images there")
    shared.add_argument(
        "--crf", action="store_true", help="also score the segmenter's probabilities refined by a DenseCRF: seconds an image"
    )
    shared.add_argument("--json", action="store_true", help="print all scores as JSON")
    parser = argparse.ArgumentParser(
        prog="python -m wsss.benchmarks.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="dataset", required=True)
    of_voc = kinds.add_parser("voc", parents=[shared], help="PASCAL VOC 2012")
    of_voc.add_argument("--data", type=Path, required=True, help="VOCdevkit/VOC2012, with SegmentationClassAug/")
    of_voc.add_argument("--train-on", choices=("trainaug", "train"), default="trainaug")
    of_coco = kinds.add_parser("coco", parents=[shared], help="COCO 2014")
    of_coco.add_argument("--data", type=Path, required=True, help="folder with train2014/ and val2014/")
    of_coco.add_argument("--truth", help="folder with train2014/ and val2014/ of label maps; default: DATA/SegmentationClass")
    of_coco.add_argument("--train-list", type=Path, required=True, help="list of the usual 82,081 names")
    of_coco.add_argument("--val-list", type=Path, required=True, help="list of the usual 40,137 names")
    drawn = kinds.add_parser("drawn", parents=[shared], help="drawn scenes and the small models: a quick check")
    drawn.add_argument("--images", type=int, default=90, help="scenes to label; half as many are scored")
    return parser


if __name__ == "__main__":
    main()
