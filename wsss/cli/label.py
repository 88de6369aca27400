"""``wsss label``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import UsageError, WsssError, WsssWarning
from ..extras import needs
from ..object_storage import is_url
from ..progress import end_progress, progress_line
from .common import BundleFlag, Engine, clock, log
from .events import Events, Level, set_level

if TYPE_CHECKING:
    from ..object_storage import RemoteFolder
    from ..runtime.chain import Chain
    from ..runtime.run.label_folder import Executor, Summary
    from ..runtime.run.sources import Source

EPILOG = """--labels: {"a/dog.jpg": ["dog"]}

--boxes: {"a/dog.jpg": [{"label": "dog", "xyxy": [48, 240, 195, 371], "score": 0.9}]} in pixels of the photograph; a COCO file
(images, annotations, categories); a folder of VOC XML files, or of YOLO labels with classes.txt or data.yaml beside them; a
label store. docs/boxes.md shows each."""


def label(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Folders of images (with sub-folders) and images; or a video (pip install 'wsss[video]'), a list (LIST.txt: "
            "a path or URL per line), or s3://, gs:// etc. (pip install 'wsss[remote]').",
        ),
    ],
    out: Annotated[
        str, typer.Option(help="Label store to write or continue: a folder, or s3://, gs:// etc. With --stage: a JSON file.")
    ],
    classes: Annotated[str | None, typer.Option(help='voc, coco, mini, a file, or names: "dog, potted plant".')] = None,
    bundle: BundleFlag = "bundle",
    model: Annotated[
        Literal["chain", "sam3", "segmenter"],
        typer.Option(
            help="chain: CLIP, Grounding-DINO and SAM; of a bundle without the last two, sam3. sam3: CLIP, if the bundle has it, "
            "and SAM 3. segmenter: the bundle's trained segmenter, with its own classes."
        ),
    ] = "chain",
    engine: Annotated[
        Engine,
        typer.Option(
            help="What runs the graphs. auto: TensorRT if the bundle has engines for this machine; on a CPU OpenVINO if it was "
            "compared with PyTorch, and faster; otherwise ort."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    devices: Annotated[
        str | None, typer.Option(help="Several devices, one worker process each: 0,1 (GPUs), or cpu,cpu. Replaces --device.")
    ] = None,
    on: Annotated[Literal["ray"] | None, typer.Option("--on", help="Run on a Ray cluster (pip install 'wsss[ray]').")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster. Default: RAY_ADDRESS, or this machine's, or a new one on it.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Labelers on the cluster. Default: one per GPU, or one per core without GPUs.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per batch. Default: what the engines were built for.")] = None,
    unverified: Annotated[
        bool,
        typer.Option(
            "--unverified", help="Use TensorRT engines, or OpenVINO, without a comparison with PyTorch; the store records it."
        ),
    ] = False,
    labels: Annotated[str | None, typer.Option(help="JSON file of the classes of each image; replaces CLIP.")] = None,
    boxes: Annotated[
        str | None,
        typer.Option(help="VOC XML or YOLO folder, COCO or plain JSON, or a label store; replaces CLIP and Grounding-DINO."),
    ] = None,
    ignore_unknown: Annotated[
        bool,
        typer.Option(
            "--ignore-unknown", help="Skip, and count, entries of --labels and --boxes whose class is not in --classes."
        ),
    ] = False,
    gate: Annotated[bool, typer.Option(help="Let CLIP decide which classes to detect.")] = True,
    tag_threshold: Annotated[
        float | None, typer.Option(help="Lowest CLIP probability of a class. Default: the bundle's.")
    ] = None,
    tag_thresholds: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Thresholds of single classes, in place of --tag-threshold: JSON or TOML."),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(metavar="K", help="CLIP sees 1 x 1, 2 x 2, ..., K x K overlapping views. Default: the bundle's."),
    ] = None,
    score_rule: Annotated[
        Literal["max", "mean"] | None,
        typer.Option(help="A box's score: the largest of its phrase's token scores, or their mean. Default: the bundle's."),
    ] = None,
    box_threshold: Annotated[
        float | None, typer.Option(help="Lowest score of a box. Default: the bundle's for the score rule.")
    ] = None,
    nms: Annotated[float, typer.Option(help="IoU above which boxes of one class are one object.")] = 0.5,
    nms_across: Annotated[float, typer.Option(help="IoU above which boxes of two classes are one object.")] = 0.8,
    enclosing: Annotated[
        bool,
        typer.Option(help="Keep boxes that hold two better boxes of their class, or the whole photograph beside a better one."),
    ] = True,
    tiles: Annotated[
        int, typer.Option(metavar="K", help="Detect in K x K overlapping tiles too, for small objects: K x K + 1 times the work.")
    ] = 1,
    margin: Annotated[
        float, typer.Option(help="Pixels are void where another class comes within this share of the best one.")
    ] = 0.1,
    quality_exponent: Annotated[
        float, typer.Option(help="Exponent of the predicted IoU in a mask's value; 0: only the box's score counts.")
    ] = 1.0,
    multimask: Annotated[
        bool,
        typer.Option("--multimask", help="Take the best of SAM's three masks of a box, by predicted IoU, in place of its one."),
    ] = False,
    min_region: Annotated[
        int, typer.Option(metavar="PIXELS", help="Fill holes of masks and remove parts below this many pixels; 0: none.")
    ] = 0,
    stability_exponent: Annotated[
        float, typer.Option(help="Exponent of a mask's stability score in its value; 0: it does not count.")
    ] = 0.0,
    stage: Annotated[
        Literal["tag", "detect"] | None,
        typer.Option(help="Only the classes (tag) or boxes (detect) of each image, as --labels and --boxes take them."),
    ] = None,
    coco: Annotated[bool, typer.Option("--coco", help="With --stage detect: boxes as a COCO file.")] = False,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Only every N-th frame of a video, or image by name.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images by name, for a try.")] = None,
    exclude: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Leave out the images that this file rejects: decisions of a report, or a list."),
    ] = None,
    redo: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only the images that this file rejects, for a new store with other settings."),
    ] = None,
    masks: Annotated[
        bool, typer.Option(help="Keep SAM's mask of each box in the label files: the objects that wsss convert writes.")
    ] = True,
    confidence: Annotated[
        bool,
        typer.Option("--confidence", help="Write the confidence of each pixel too, for wsss train --set loss.confidence=pixel."),
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again the images that failed before.")] = False,
    shard: Annotated[
        str | None, typer.Option(help="I/N, I from 0 to N - 1: label one of N parts of the images; N runs may share a store.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print events as JSON, one per line; the last one is the summary.")
    ] = False,
    log_level: Annotated[
        Level | None, typer.Option(help="Lowest level to log. Default: info if stderr is a terminal, otherwise warning.")
    ] = None,
) -> None:
    """Label a folder of images. Run it again to continue where it stopped."""
    set_level(log_level)
    events = Events(json_output)
    warnings.simplefilter("ignore", WsssWarning)  # Chain.open warns of what this command logs
    if classes is None and model != "segmenter":
        raise UsageError("--classes is missing", hint='for example: --classes voc, or --classes "dog, potted plant"')
    share = parse_shard(shard)
    check_cluster(on, device, devices, ray_address, workers)
    from ..classes import parse_classes
    from ..runtime.chain import Chain, Rules, doubtful_classes
    from ..runtime.given.stages import Given
    from ..runtime.given.thresholds import read_thresholds
    from ..runtime.run.label_folder import label_folder
    from ..runtime.run.listing import check_images
    from ..runtime.run.sources import Chosen, source_of, store_of
    from ..runtime.run.workers import Workers

    store = store_of(out)
    source = frames_of(images[0], store, every, limit) if len(images) == 1 else None
    if source is not None:
        every, limit = 1, None
    source = source or source_of(*images)
    if every > 1 or limit or exclude or redo:
        leave_out, only = (rejected_of(path, flag, source) for path, flag in ((exclude, "--exclude"), (redo, "--redo")))
        source = Chosen(source, leave_out or frozenset(), only, every, limit)
    check_images(source.listing(store))  # before the engines are loaded, which takes a while
    rules = Rules(
        tag_threshold=tag_threshold,
        tag_thresholds=read_thresholds(tag_thresholds) if tag_thresholds else None,
        views=views,
        score_rule=score_rule,
        box_threshold=box_threshold,
        nms=nms,
        nms_across=nms_across,
        enclosing=enclosing,
        tiles=tiles,
        margin=margin,
        quality_exponent=quality_exponent,
        multimask=multimask,
        min_region=min_region,
        stability_exponent=stability_exponent,
        gate=gate,
    )
    if stage is None and coco:
        raise UsageError("--coco is for --stage detect", hint="wsss convert --to coco writes a label store as COCO")
    if stage is not None:
        for flag, value in (("--devices", devices), ("--on", on), ("--shard", shard), ("--retry-failed", retry_failed)):
            if value:
                raise UsageError(f"{flag} cannot be used with --stage", hint="--limit and --exclude choose images")
        if coco and stage == "tag":
            raise UsageError("--coco is for --stage detect", hint="--stage tag writes names of classes")
        if not isinstance(store, Path) or store.is_dir():
            raise UsageError(f"--out {out}: --stage writes a JSON file", hint=f"--out {stage}.json")
        chain = Chain.open(
            bundle,
            classes=classes,
            model=model,
            engine=engine,
            device=device,
            unverified=unverified,
            labels=labels,
            boxes=boxes,
            ignore_unknown=ignore_unknown,
            rules=rules,
            until=stage,
        )
        for message in doubtful_classes(chain.classes, chain.settings):
            events.warn(message)
        _write_stage(chain, source, store, stage, coco, batch, events)
        return
    places = parse_devices(devices) if devices else [device]
    openers = [
        (
            place,
            partial(
                Chain.open,
                bundle,
                classes=classes,
                model=model,
                engine=engine,
                device=place,
                unverified=unverified,
                labels=labels,
                boxes=boxes,
                ignore_unknown=ignore_unknown,
                rules=rules,
                masks=masks,
                confidence=confidence,
            ),
        )
        for place in places
    ]
    try:
        with contextlib.ExitStack() as stack:
            executor: Chain | Executor
            given = None
            if (labels or boxes) and classes and (on or len(openers) > 1) and model != "segmenter":
                # Before the labelers open it: images whose files change in between are labeled again by the next run.
                given = Given.open(parse_classes(classes), labels, boxes, ignore_unknown=ignore_unknown)
            if on == "ray":
                with needs("ray"):
                    from ..runtime.ray.executor import RayExecutor
                gpu = None if device == "auto" else device == "cuda"
                how = RayExecutor(openers[0][1], address=ray_address, workers=workers, gpu=gpu, batch=batch, log=log)
                executor = stack.enter_context(how)
            else:
                executor = stack.enter_context(Workers(openers, batch=batch)) if len(openers) > 1 else openers[0][1]()
            used, count = executor.settings["engine"], len(executor.classes.names)
            log(f"engine {used}, {count} classes")
            events.write("started", images=images[0] if len(images) == 1 else images, store=out, engine=used, classes=count)
            for message in doubtful_classes(executor.classes, executor.settings):
                events.warn(message)
            stop = stack.enter_context(stop_on_signals())
            summary = label_folder(
                executor,
                source,
                store,
                batch=batch,
                retry_failed=retry_failed,
                shard=share,
                given=given,
                stop=stop,
                progress=events.progress,
                failed=events.failed,
                warn=events.warn,
            )
    except WsssError as error:
        events.write("error", message=error.message, hint=error.hint)
        raise
    except KeyboardInterrupt:
        end_progress()
        log(f"interrupted; {out} is intact. Run the same command to continue.", logging.WARNING)
        raise SystemExit(130) from None
    end_progress()
    _report_summary(summary, out, events)
    if summary.stopped:
        log(f"stopped; {out} is intact. Run the same command to continue.", logging.WARNING)
        raise SystemExit(130)
    if summary.failed or summary.folders_failed:
        log(
            "hint: failures are listed above; the same command labels images that were fixed since, "
            "--retry-failed tries all of them again",
            logging.WARNING,
        )
        raise SystemExit(1)
    if summary.failed_before:
        log(
            f"images that failed in an earlier run and have no label: {summary.failed_before}\n\n"
            "hint: --retry-failed tries all of them again",
            logging.WARNING,
        )
        raise SystemExit(1)


def _write_stage(
    chain: Chain, source: Source, out: Path, stage: Literal["tag", "detect"], coco: bool, batch: int | None, events: Events
) -> None:
    from ..runtime.run.stages import write_stage

    log(f"engine {chain.settings['engine']}, {len(chain.classes.names)} classes")
    done = write_stage(
        chain,
        source,
        out,
        stage,
        form="coco" if coco else "json",
        batch=batch,
        progress=lambda summary: progress_line(f"{summary.images} images  {summary.failed} failed"),
        failed=events.failed,
    )
    end_progress()
    boxes = f" ({done.boxes} boxes)" if stage == "detect" else ""
    typer.echo(f"{out}: {done.images} images{boxes}, {done.failed} failed")
    if done.failed:
        raise SystemExit(1)


def frames_of(image: str, store: Path | RemoteFolder, every: int, limit: int | None) -> Source | None:
    """The frames of a video, which are written to a folder beside the store, ``STORE.frames``; None for anything else.

    Raises:
        UsageError: the store is not on this machine.
    """
    from ..runtime.run.sources import LocalImages, local_path
    from ..runtime.run.video import extract_frames, is_video

    if is_url(image) or not is_video(local_path(image)):
        return None
    if not isinstance(store, Path):
        raise UsageError(f"--out {store}: the frames of a video need a folder of this machine", hint="--out store")
    folder = store.with_name(f"{store.resolve().name}.frames")
    with needs("video"):
        count = extract_frames(
            local_path(image),
            folder,
            every=every,
            limit=limit,
            progress=lambda frames: progress_line(f"{frames} frames"),
        )
    end_progress()
    log(f"{count} frames in {folder}")
    return LocalImages(folder)


def rejected_of(path: str | None, flag: str, source: Source) -> frozenset[str] | None:
    """The names of the images that a file rejects, and a warning of those that ``source`` does not have; None without a file.

    Raises:
        UsageError: ``source`` has none of them.
    """
    if path is None:
        return None
    from ..store.decisions import read_rejected

    names = frozenset(read_rejected(path, flag=flag))
    unknown = sorted(names - {image.name for image in source.listing() if image.name in names})
    if len(unknown) == len(names):
        raise UsageError(
            f"{flag} {path}: {source} has none of its images, for example {unknown[0]}",
            hint="names are paths below the folder that is labeled, or lines of the list",
        )
    if unknown:
        log(f"{flag} {path}: {len(unknown)} of its {len(names)} images are not there, for example {unknown[0]}", logging.WARNING)
    return names


def parse_devices(text: str) -> list[str]:
    """Parse ``0,1`` into cuda:0 and cuda:1; ``cpu`` and ``cuda:2`` stay. Raises UsageError for anything else."""
    devices = [device.strip() for device in text.split(",")]
    for device in devices:
        if not (device == "cpu" or device.removeprefix("cuda:").isdecimal()):
            raise UsageError(
                f"--devices: expected numbers of GPUs or cpu, got {device!r}", hint="--devices 0,1 or --devices cpu,cpu"
            )
    return [f"cuda:{device}" if device.isdecimal() else device for device in devices]


def check_cluster(on: str | None, device: str, devices: str | None, ray_address: str | None, workers: int | None) -> None:
    """Raises UsageError for flags that contradict ``--on``: on a cluster, the cluster chooses the devices."""
    if on is None:
        for flag, value in (("--ray-address", ray_address), ("--workers", workers)):
            if value is not None:
                raise UsageError(f"{flag} is for --on ray", hint="several devices of this machine: --devices 0,1")
        return
    if devices is not None:
        raise UsageError("--devices is for this machine, --on ray for a cluster", hint="--on ray --workers 8")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {device}: expected auto, cpu or cuda with --on ray", hint="Ray gives each labeler a GPU of its own"
        )


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Parse ``2/8`` into (2, 8). Raises UsageError unless 0 <= I < N."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UsageError(f"--shard: expected I/N with I from 0 to N - 1, got {text!r}", hint="--shard 0/4 is the first of four")
    return int(number), int(count)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C, or a scheduler's SIGTERM, sets; the second one ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, _: object) -> None:
        if stop.is_set():
            os._exit(128 + number)  # the store is intact at any moment
        stop.set()
        log("stopping after the current batches; press Ctrl-C again to stop now", logging.WARNING)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_summary(summary: Summary, out: str, events: Events) -> None:
    from ..runtime.run.listing import describe_left_out

    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary.stage_seconds.items())
    padding = "" if summary.padding is None else f"; {summary.padding:.0%} of the detector's canvases were padding"
    log(f"{stages}; engines {summary.engine_seconds:.1f} s{padding}", logging.DEBUG)
    if events.json_output:
        events.write("finished", store=out, **dataclasses.asdict(summary))
        return
    rate = summary.labelled / summary.seconds if summary.seconds else 0.0
    folders = f" and {summary.folders_failed} sub-folders" if summary.folders_failed else ""
    notes = [
        summary.describe_empty(),
        f"{summary.warned} with next to no range" if summary.warned else "",
        f"left out: {describe_left_out(summary.left_out)}" if summary.left_out else "",
    ]
    before = f" ({summary.failed_before} of them failed: --retry-failed)" if summary.failed_before else ""
    typer.echo(
        f"{out}: {summary.labelled} labeled ({summary.boxes} boxes), {summary.skipped} already done{before}, "
        f"{summary.failed} failed{folders}, "
        f"{clock(summary.seconds)}, {rate:.1f} images/s" + "".join(f"; {note}" for note in notes if note)
    )
