"""Make the tables of the README and the documentation from the result files.

    python -m wsss.benchmarks.studies.tables [--check]

It also writes ``export/proven.json``, the figures of `wsss models`.
A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. This script rewrites it, so that no number is typed by hand.
A test compares the pages with the result files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...export.catalog import PROVEN
from .harness import RESULTS, study_parser

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Row = Sequence[object]


def result(name: str) -> Any:
    """The content of a study's result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Row, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def quality() -> str:
    """The chain of small models on drawn scenes."""
    found = result("mini-quality")
    loss, alone = found["share of the loss"], found["alone against a batch of 8"]
    names = {"chain": "the whole chain", "true labels": "with true labels", "true boxes": "with true boxes"}
    rows = [[names.get(key, key), f"{found[key]['miou']:.3f}"] for key in ("chain", "without the CLIP gate", *list(names)[1:])]
    rows += [[f"lost by {stage}", f"{share:.3f}"] for stage, share in loss.items()]
    rows.append(["label F1 of the chain", f"{found['chain']['f1']:.3f}"])
    rows.append(["scenes whose label changes in a batch of eight", f"{alone['images_that_differ']} of {alone['images']}"])
    return table([f"{found['scenes']} drawn scenes", "mIoU"], rows)


def parity() -> str:
    """FP32 graphs at full size against the official implementations."""
    rows: list[Row] = []
    for row in sorted(result("clip-official"), key=lambda row: -row["photographs"]):
        count = f"{row['photographs']} photographs, {row['prompts']} prompts"
        rows.append([f"CLIP {row['variant']}", "open_clip, one at a time", count, f"cosine 1 - {1 - _worst_cosine(row):.0e}"])
    dino = result("grounding-dino-official")
    far = dino["parity"]
    difference = f"logits {far['logits']:.1e} (of up to {far['largest_logit']:.0f}), boxes {far['boxes']:.0e}"
    rows.append(["Grounding-DINO Swin-T", "groundingdino-py, one at a time", f"{dino['photographs']} photographs", difference])
    sams = [("SAM ViT-B", "`SamPredictor`", result("sam-official")["summary"])]
    for name, found in result("sam2-official").items():
        variant, precision = name.split()
        if precision == "fp32":
            sams.append((variant.replace("sam2.1_", "SAM 2.1 "), "`Sam2Processor`, `Sam2Model`", found["summary"]))
    for name, official, sam in sams:
        share = f"{sam['share_of_pixels_that_differ']:.0e} of the pixels, worst mask IoU {sam['worst_iou']:.5f}"
        rows.append([name, official, f"{sam['photographs']} photographs, {sam['boxes']} boxes", share])
    for key, found in result("sam3-official").items():
        variant, side, precision = key.split()
        if precision == "fp32":
            far, count = found["summary"], f"{found['summary']['photographs']} photographs, {found['summary']['phrases']} phrases"
            difference = f"logits {far['logits']:.1e}, boxes {far['boxes']:.0e}, worst mask IoU {far['worst_iou']:.5f}"
            rows.append(
                [f"{variant.replace('sam3', 'SAM 3')} at {side} px", "`Sam3Model`, one phrase at a time", count, difference]
            )
    return table(["FP32 graphs", "compared with", "on", "largest difference"], rows)


def _worst_cosine(row: Any) -> float:
    return min(float(value) for key, value in _flat(row).items() if "cosine" in key)


def _flat(value: Any, name: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {key: leaf for name_, each in value.items() for key, leaf in _flat(each, f"{name}.{name_}").items()}
    return {name: value} if isinstance(value, (int, float)) else {}


def half() -> str:
    """FP16 against the same FP32 reference."""
    half, mini, faults = result("half-precision"), result("mini-half"), result("precision-faults")["faults"]
    clip, encoder, decoder = (half[f"{name} fp16"]["worst"] for name in ("clip/image", "sam/encoder", "sam/decoder"))
    dino = half["grounding-dino/image-800x1344 fp16"]
    most = max(fault["share_of_multiply_adds"] for fault in faults.values())
    repaired = sum(all(isinstance(error, float) for error in fault["after"].values()) for fault in faults.values())
    rows = [
        ["chain of small models", f"mean mask IoU {mini['mask_iou_mean']:.4f}, mIoU {-mini['miou_loss']:+.5f}"],
        ["CLIP ViT-B-16", f"embedding {clip['embedding']:.1e}"],
        ["SAM ViT-B", f"embedding {encoder['embedding']:.1e}, mask logits {decoder['logits']:.1e}"],
        [
            "Grounding-DINO Swin-T",
            f"scores {dino['worst']['logits']:.4f}, boxes of the 100 best queries {dino['worst']['boxes']:.1e} from IoU 1",
        ],
        ["work that stays in FP32", f"{dino['float32_share']:.1%} of Grounding-DINO's multiply-adds"],
        ["planted precision faults", f"{repaired} of {len(faults)} repaired, at most {most:.2%} of the multiply-adds in FP32"],
    ]
    return table(["FP16, ONNX Runtime on the CPU", "largest relative difference"], rows)


def engines() -> str:
    """Builds of TensorRT-RTX engines."""
    rows: list[Row] = []
    for model, built in result("engine-builds").items():
        seconds = ", ".join(f"{name.split('/')[1]} {engine['seconds']:.1f} s" for name, engine in built["engines"].items())
        rows.append([model, seconds, f"{built['peak_memory_gb']:.1f} GB"])
    return table([f"FP16, {built['cores']} CPU cores", "build time", "peak memory"], rows)


def compiled() -> str:
    """What TensorRT-RTX compiles the graphs to."""
    found = result("compiled-graphs")
    before = found.pop("before")
    rows: list[Row] = []
    for name, now in found.items():
        times = [before[name], now] if name in before else [now]
        per = "a box" if now["rows"] == 64 else "an image"
        rows.append(
            [
                name.replace(":", ""),
                _changes(f"{each['fused_attentions']} / {each['softmaxes_alone']}" for each in times),
                _changes(str(each["kernels"]) for each in times),
                _changes(str(each["gemm"]) for each in times),
                f"{_changes(format(each['gigabytes'], '.2f') for each in times)} GB {per}",
                f"{_changes(format(each['ms_of_bytes'], '.2f') for each in times)} ms",
                f"{_changes(format(each['ms_of_products'], '.2f') for each in times)} ms",
            ]
        )
    head = [
        "FP16",
        "attentions fused, softmaxes alone",
        "kernels",
        "of them gemm",
        "memory traffic",
        "bound by memory",
        "by products",
    ]
    return table(head, rows)


def _changes(values: Iterable[str]) -> str:
    """Values before and now, once where they are equal."""
    return ", now ".join(dict.fromkeys(values))


def chain_bounds() -> str:
    """The least time of the chain on an H200: of each graph the longer of memory traffic and products, added up."""
    now = result("compiled-graphs")
    rows: list[Row] = []
    for canvas in ("1024x1024", "800x1088"):
        for sam in ("vit_b", "vit_h"):
            cells: list[str] = []
            for graphs in (now["before"], now):
                parts = [
                    (5, "clip ViT-B-16: image"),
                    (1, f"grounding-dino swin_t: image-{canvas}"),
                    (1, f"sam {sam}: encoder"),
                    (10, f"sam {sam}: decoder"),
                ]
                if any(name not in graphs for _, name in parts):
                    cells.append("")
                    continue
                bounds = [count * max(graphs[name]["ms_of_bytes"], graphs[name]["ms_of_products"]) for count, name in parts]
                cells.append(f"{sum(bounds):.2f} ms, {1e3 / sum(bounds):.0f} images/s")
            rows.append([f"SAM {sam}, Grounding-DINO at {canvas.replace('x', ' x ')}", *cells])
    return table(["CLIP ViT-B-16 with 5 views, Grounding-DINO Swin-T, SAM with 10 boxes", "before", "now"], rows)


def accumulation() -> str:
    """Sums in FP16, simulated."""
    found = result("fp16-accumulation")
    rows: list[Row] = []
    for length, errors in found.pop("lengths").items():
        if int(length) in (16, 128, 768, 4096):
            rows.append([f"a product of {length} terms", f"{errors['rounding']:.1e}", f"{errors['sums_in_fp16']:.1e}", ""])
    for name, errors in found.items():
        for output, allowed in errors["allowed"].items():
            sums = [f"{errors[f'sums in {kind}'][output]:.1e}" for kind in ("fp32", "fp16")]
            rows.append([f"{name}, {output}", *sums, f"{allowed:.1e}"])
    return table(["FP16, simulated", "error with sums in FP32", "with sums in FP16", "allowed"], rows)


def sampling() -> str:
    """Grounding-DINO's forms of deformable attention."""
    forms = result("sampling-forms")["forms"]
    base = forms["grid-sample"]["p50_ms"]
    rows = [
        [f"`{name}`", f"{form['build_s']:.0f} s", *(f"{form['p50_ms'][size] / base[size]:.2f}" for size in base)]
        for name, form in forms.items()
    ]
    return table(["`--sampling`", "TensorRT-RTX build", *(f"CPU time at batch {size}" for size in base)], rows)


def stage_two() -> str:
    """Training on pseudo-labels, and the exported segmenters."""
    two, pairs, exported, whole = (
        result(name) for name in ("stage-two", "voc-pairs-training", "segmenter-export", "segmenter-photographs")
    )
    losses = f"loss {pairs['first_loss']:.1f} to {pairs['last_loss']:.1f}"
    real = f"{losses}; mIoU {pairs['miou_on_training_images']:.3f} on these same images"
    rows: list[Row] = [
        [f"trained on the truth of {two['images']:,} drawn scenes", f"mIoU {two['trained on truth']['miou']:.3f}"],
        ["trained on the chain's pseudo-labels of the same scenes", _seeds(two["trained on pseudo"])],
        ["the same, weighted by the rank of the store's confidence", _seeds(two["trained on pseudo, by rank"])],
        ["the chain itself", f"mIoU {two['chain']['miou']:.3f}"],
        [
            f"{pairs['pairs']} real VOC photographs, {pairs['steps']} steps from random weights",
            real,
        ],
    ]
    for network in ("deeplabv3plus/resnet50", "segformer/b0"):
        each = exported[network]
        shares = (
            f"FP32 {each['fp32']['worst_row']:.4%}, FP16 {each['fp16']['worst_row']:.2%} of the pixels equal in the worst row"
        )
        rows.append([f"{network} exported at 512 x 512", shares])
    for network in ("deeplabv3plus/mobilenet_v2", "segformer/b0"):
        each = whole[network]
        canvases, tiles = each["default canvases"], each["one crop, in tiles"]
        share = f"{canvases['pixels_as_validation']:.2%} of the pixels as in validation on {canvases['canvases']} canvases"
        tiled = f"{tiles['pixels_as_validation']:.0%} in tiles of the crop"
        rows.append([f"{network} exported for {each['photographs']} photographs of any size", f"{share}, {tiled}"])
    return table(["stage two", "measured"], rows)


def _seeds(runs: Any) -> str:
    return f"mIoU {runs['miou']:.3f} ({', '.join(f'{score:.3f}' for score in runs['seeds'])})"


def confidence_weights() -> str:
    """Ways of weighting the loss by the store's confidence, beside no weights."""
    found = result("confidence-weights")
    cells = {cell: each for cell, each in found.items() if isinstance(each, dict)}
    known = ("none", "rank in the class", "relative to the class's mean", "scores")
    names = [name for name in known if any(name in each for each in cells.values())]
    rows: list[Row] = []
    for cell, each in cells.items():
        shown = []
        for name in names[1:]:
            pairs = zip(each[name]["miou"], each["none"]["miou"], strict=True) if name in each else ()
            gain = [with_it - without for with_it, without in pairs]
            shown.append(f"{sum(gain) / len(gain):+.3f} ({min(gain):+.3f} to {max(gain):+.3f})" if gain else "")
        rows.append([cell, f"{each['none']['mean']:.3f}", *shown])
    return table(["labels", "no weights", *(f"by {name}" for name in names[1:])], rows)


def pixel_confidence() -> str:
    """Margins and the trainer's confidence, beside the default margin without confidence."""
    found = result("pixel-confidence")
    base = found["mIoU"]["margin 0.1"]["off"]
    rows: list[Row] = []
    for margin, ways in found["mIoU"].items():
        gains = {way: [one - other for one, other in zip(scores, base, strict=False)] for way, scores in ways.items()}
        shown = [f"{sum(gain) / len(gain):+.4f} ({min(gain):+.4f} to {max(gain):+.4f})" for gain in gains.values()]
        rows.append([margin, *shown])
    seeds = f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}, {found['images']} labeled scenes, {found['steps']} steps"
    return table([seeds, *(f"confidence {way}" for way in found["mIoU"]["margin 0.1"])], rows)


def mask_options() -> str:
    """Options of SAM's masks: what they gain, and their cost beside the decoder's."""
    found, cost = result("mask-options")["gains"], result("mask-options")["milliseconds of a box"]
    decoder, twice = cost["decoder"], cost["official decoder, mask prompt"] / cost["official decoder"]
    of_name = {
        "best of three": cost["decoder, best of three"] - decoder,
        "regions": cost["regions"],
        "second pass": twice * decoder,
        "stability": cost["stability score"],
    }
    rows: list[Row] = [[f"defaults: mIoU {found['miou']:.3f}", "", f"{decoder:.0f} ms"]]
    for name, each in found["options"].items():
        of_box = next(value for start, value in of_name.items() if name.startswith(start))
        interval = f"{each['gain']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f})"
        rows.append([name, interval, f"{of_box:+.1f} ms" if abs(of_box) >= 0.05 else "none"])
    return table([f"{found['scenes']} hard scenes", "mIoU gained", "cost"], rows)


def training_speed() -> str:
    """Images that a core prepares, and a step beside a plain loop."""
    found = result("training-speed")
    rows: list[Row] = [
        [f"`{name}`: images prepared a second and core", f"{rate:.0f}"]
        for name, rate in found["images a second and core"].items()
    ]
    rows += [
        [f"{name}: CPU seconds of a plain step / ours", f"{each['median']:.2f} ({each['lowest']:.2f} to {each['highest']:.2f})"]
        for name, each in found["CPU seconds of a plain step / ours"].items()
    ]
    return table([f"{found['photographs']} VOC photographs", "measured"], rows)


PIECES = ("read", "decode", "views", "detector", "sam", "png")
"""Pieces of the host's work for a photograph, in `results/host-path.json`."""


def host() -> str:
    """The host's work around the engines."""
    path, huge, photos, page, scores = (
        result(name) for name in ("host-path", "huge-image", "real-photos", "report-page", "eval-speed")
    )
    graph, views = result("resize-graph"), result("large-views")["4000 x 3000"]
    compared = {name: graph[name]["photographs"] for name in ("clip", "grounding-dino", "sam")}
    exact = f"largest difference {views['worst']}"
    cost = scores["cost, val"][0]
    chain = sum(photos["seconds_per_image"].values())
    each = (
        f"{chain:.0f} s a photograph ({photos['images_timed']} timed of {photos['images']}; "
        f"{photos['boxes'] / photos['labelled']:.0f} boxes each), peak {photos['peak_memory_gb']:.0f} GB"
    )
    rows = [
        [
            "host work a VOC photograph, one core",
            f"{path['cpu']['cpu_ms']:.0f} ms ({path['cpu']['ratio']:.2f} x decode, resize, encode alone)",
        ],
        *(
            [f"{words}: " + ", ".join(PIECES), f"{pieces['sum']:.0f} ms: " + ", ".join(f"{pieces[name]:.3g}" for name in PIECES)]
            for words, pieces in (("VOC", path["pieces_ms"]["voc"]), ("12 Mpx", path["pieces_ms"]["12_mpx"]))
        ),
        [
            "the same with inputs made on the device: VOC, 12 Mpx",
            ", ".join(f"{path['resized_on_device_ms'][size]:.3g} ms" for size in ("voc", "12_mpx")),
        ],
        [
            f"resizing graph against Pillow, {graph['photographs']} photographs, values equal: views, detector, SAM",
            ", ".join(f"{each['equal']['all']:.3%}" for each in compared.values())
            + f"; largest difference {max(each['worst'] for each in compared.values())} of 255",
        ],
        [
            "CLIP's views of 12 Mpx from means over blocks, against Pillow",
            f"{views['ms']:.0f} instead of {views['pillow_ms']:.0f} ms; {views['within_one']:.2%} within 1 of 255, {exact}",
        ],
        ["two cores against one", f"{path['images_per_second']['scaling']:.2f} x"],
        ["an asynchronous engine of 20 ms a batch", f"run takes {path['engine_bound']['ratio']:.2f} x the engine's time"],
        ["an engine that blocks its caller", f"run takes {path['engine_bound_blocking']['ratio']:.2f} x the engine's time"],
        *([f"memory, {int(count):,} images", f"{mib:.0f} MiB"] for count, mib in path["memory_mib"].items()),
        [
            f"{huge['photograph']['width']:,} x {huge['photograph']['height']:,} pixels, {huge['boxes']} boxes",
            f"peak {huge['peak_mib']:,} MiB",
        ],
        [
            "full-size chain in ONNX Runtime, two cores, random weights",
            each,
        ],
        [f"`wsss eval`, {cost['masks']:,} masks", f"{cost['wall_s']:.0f} s, {cost['memory_mib']} MiB"],
        [f"`wsss report`, {page['images']:,} images", f"first paint {page['first_paint_ms']['median']:.0f} ms"],
    ]
    return table(["two CPU cores", "measured"], rows)


def replays() -> str:
    """Launches, copies and waits on a simulated GPU, before shapes were padded and results gathered, and now."""
    found = result("graph-replays")
    times = found["before"], found["now"]
    rows: list[Row] = [["calls that replay a CUDA graph", *(f"{100 * each['replayed_of_all']:.1f} %" for each in times)]]
    for name, size in (("voc", "a VOC photograph"), ("12_mpx", "12 Mpx")):
        fused = [each["fuse"][name] for each in times]
        for way, words in (("host_to_device", "to the GPU"), ("device_to_host", "from the GPU")):
            rows.append([f"fusing {size}, copied {words}", *(f"{each[f'bytes_{way}'] / 1000:,.1f} kB" for each in fused)])
        rows.append([f"fusing {size}, waits of the host", *(f"{each['waits']:g}" for each in fused)])
    return table([f"simulated GPU, {found['photographs']['count']} photographs", "before", "now"], rows)


def scale() -> str:
    """The cost of a run in the process that drives it."""
    found = result("run-scale")
    listing = found["listing"]
    rows: list[Row] = [
        ["listing a local folder", f"{listing['listing_us']:.0f} us of CPU an image"],
        ["a resumed run that finds everything done", f"{listing['resumed_run_us']:.0f} us of CPU an image"],
        ["a line of the manifest", f"{listing['line_bytes']:,} bytes"],
    ]
    for each in found["ray"]:
        name = f"driver on Ray, {each['images']:,} images, {each['workers']} labelers that compute nothing"
        cost = f"{each['driver_us']:.0f} us of CPU an image, {each['driver_memory_mb']} MB"
        rows.append([name, f"{cost}, {each['images_per_second']:.0f} images/s"])
    return table(["the process that drives a run", "measured"], rows)


def masks() -> str:
    """What keeping SAM's masks costs an image."""
    rows: list[Row] = [
        [
            f"{size}, {boxes} boxes",
            f"{cost['png_bytes']:,}",
            f"{cost['mask_bytes']:,}",
            f"{cost['line_with_masks_bytes'] - cost['line_bytes']:,}",
            f"{cost['runs_ms'] + cost['rle_ms']:,.1f} ms",
            f"{cost['dense_ms']:,.0f} ms",
            f"{cost['png_ms']:,.0f} ms",
        ]
        for size, costs in result("mask-cost")["costs"].items()
        for boxes, cost in costs.items()
    ]
    head = ["photograph", "label, bytes", "masks, bytes", "in the manifest, bytes", "masks", "by upsampling all", "label's PNG"]
    return table(head, rows)


def objects() -> str:
    """Objects of real photographs, as written now and before."""
    found = result("mask-cost")["pairs"]
    return table(
        [f"{found['photographs']} VOC photographs with truth boxes, {found['objects']} objects", "measured"],
        [
            ["boxes that overlap one of their class", found["overlap_one_of_their_class"]],
            ["worst IoU of an object with the mask that SAM gave its box", f"{found['worst_iou']:.4f}"],
            ["mean IoU where it was cut out of the label map, as before", f"{found['cut_out_mean_iou']:.2f}"],
            ["of these below 0.9", f"{found['cut_out_below_0.9']:.0%}"],
        ],
    )


def peers() -> str:
    """The chain and its peers, stage by stage, and how far their results are from the official ones."""
    found = result("peers")
    rows: list[Row] = []
    for name, each in found["contenders"].items():
        title = peer_titles()[name]
        if "failed" in each:
            rows.append([title, each["failed"], *[""] * 8])
            continue
        far = each["quality"]
        rows.append(
            [
                title,
                *(f"{each['cpu_seconds'][stage]:.2f}" for stage in ("tag", "detect", "segment", "fuse")),
                f"{each['chain_cpu_seconds']['median']:.1f}",
                f"{each['peak_gb']:.1f} GB",
                f"{far['pixels_equal']:.2%}" if far else "",
                f"{far.get('score_difference_on_canvas', far['score_difference']):.1e}" if far else "",
                f"1 - {max(1 - far['clip_cosine'], 0):.0e}" if far else "",
            ]
        )
    head = ["CPU seconds a photograph", "tag", "detect", "segment", "fuse", "chain", "memory"]
    return table([*head, "pixels equal", "score difference", "CLIP cosine"], rows)


def peers_summary() -> str:
    """The README's table of the chain and its peers."""
    found = result("peers")
    rows: list[Row] = []
    for name, each in found["contenders"].items():
        if "failed" in each:
            continue
        times, empty = each["times_official"], each.get("mostly_empty")
        speed = "1" if name == "official" else f"{times['median']:.2f} ({times['lowest']:.2f} to {times['highest']:.2f})"
        equal = f"{each['quality']['pixels_equal']:.2%}" if each["quality"] else ""
        seconds = f"{each['chain_cpu_seconds']['median']:.1f} s"
        rows.append([peer_titles()[name], seconds, speed, f"{empty['times_official']:.1f}" if empty else "", equal])
    share = 1 - found["mostly_empty"]["with_a_class"] / found["mostly_empty"]["photographs"]
    head = ["the same work, one photograph", "CPU time", "times as fast", f"where {share:.0%} have no class", "pixels equal"]
    return table(head, rows)


def peer_titles() -> dict[str, str]:
    """What the tables call each contender."""
    from ..peers.contenders import CONTENDERS

    return {name: kind.title for name, kind in CONTENDERS.items()}


def summary() -> str:
    """The README's table."""
    quality, sam, dino = result("mini-quality"), result("sam-official")["summary"], result("grounding-dino-official")
    mini = result("mini-half")
    clip = min(map(_worst_cosine, result("clip-official")))
    return table(
        ["what", "measured"],
        [
            [
                f"chain of the embedded models, {quality['scenes']} drawn scenes",
                f"mIoU {quality['chain']['miou']:.3f}, label F1 {quality['chain']['f1']:.3f}",
            ],
            ["CLIP against open_clip", f"cosine 1 - {1 - clip:.0e}"],
            [
                "Grounding-DINO against groundingdino-py",
                f"logits {dino['parity']['logits']:.1e}, boxes {dino['parity']['boxes']:.0e}",
            ],
            ["SAM against `SamPredictor`", f"worst mask IoU {sam['worst_iou']:.5f} over {sam['boxes']} boxes"],
            ["FP16 chain against FP32", f"mean mask IoU {mini['mask_iou_mean']:.4f}"],
        ],
    )


def concept() -> str:
    """Costs of SAM 3 by the number of classes."""
    rows: list[Row] = []
    for key, found in result("sam3-official").items():
        if "classes" not in found:
            continue
        side, work = key.split()[1], found["work"]
        for count, cost in found["classes"].items():
            calls = ", ".join(f"{name} {number}" for name, number in cost["calls"].items() if number)
            seconds = [f"{cost['seconds'][name]:.1f} s" for name in ("vision", "detector")]
            rows.append([count, calls, *seconds, f"{work['vision'] + int(count) * work['detector']:,.0f} GMAC"])
        head = [f"vision, a photograph of {side} px", "detector, the same", "work of a photograph of 1008 px"]
        rows.append(["masks of a class that is there", "", "", "", f"{work['outline']:,.0f} GMAC"])
    return table(["classes", "calls for two photographs", *head], rows)


def export_cost() -> str:
    """CPU time and memory of `wsss export` with random weights."""
    rows: list[Row] = []
    for model, found in result("export-cost").items():
        for name, graph in found["graphs"].items():
            trace, gate = graph["trace"], graph["gate"]
            batches = ", ".join(map(str, graph["batches"]))
            seconds = f"{trace['cpu_seconds']:.0f} s", f"{gate['cpu_seconds']:.0f} s"
            rows.append([f"{model} {name}", *seconds, batches, f"{trace['peak_gb']:.1f} GB", f"{gate['peak_gb']:.1f} GB"])
    return table(["FP32", "tracing, CPU", "gate, CPU", "its batches", "peak memory of tracing", "of the gate"], rows)


def detectors() -> str:
    """MM-Grounding-DINO against transformers' modules, and the costs of its engines."""
    rows: list[Row] = []
    for key, entry in result("mm-grounding-dino").items():
        model, _, graph = key.partition("/")
        worst = entry["worst"]
        if key.endswith("fp32"):
            far = f"logits {worst['logits']:.1e}, boxes {worst['boxes']:.1e}"
        else:
            far = f"scores {worst['logits']:.4f}, boxes of the 100 best queries {worst['boxes']:.1e} from IoU 1"
        rows.append([model, graph, entry["photographs"], far, f"{entry['peak_memory_gb']:.1f} GB"])
    return table(["model", "graph", "photographs", "largest difference", "peak memory"], rows)


def proofs() -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured of each model and variant at full size, for `wsss.export.catalog`."""
    found: dict[str, dict[str, dict[str, Any]]] = {}

    def put(model: str, kind: str, **figures: Any) -> None:
        found.setdefault(model, {}).setdefault(kind, {}).update(figures)

    for row in result("clip-official"):
        put(f"clip {row['variant']}", "fp32", photographs=row["photographs"], cosine=_worst_cosine(row))
    dino, sam = result("grounding-dino-official"), result("sam-official")
    put(f"grounding-dino {dino['variant']}", "fp32", photographs=dino["photographs"], **dino["parity"])
    put(f"sam {sam['variant']}", "fp32", photographs=sam["summary"]["photographs"], mask_iou=sam["summary"]["worst_iou"])
    for key, entry in result("sam2-official").items():
        variant, kind = key.split()
        far = {"photographs": entry["summary"]["photographs"], "mask_iou": entry["summary"]["worst_iou"]}
        put(f"sam {variant}", kind, **far)
    for key, entry in result("sam3-official").items():
        variant, side, kind = key.split()
        far = {name: entry["summary"][name] for name in ("logits", "boxes", "worst_iou")}
        put(f"sam3 {variant}", kind, side_px=int(side), photographs=entry["summary"]["photographs"], **far)
    for name in ("half-precision", "mm-grounding-dino"):
        for key, entry in result(name).items():
            graph, _, kind = key.rpartition("/")[2].partition(" ")
            far = {f"{graph} {output}": value for output, value in entry["worst"].items()}
            put(f"{key.split('/')[0].split()[0]} {entry['variant']}", kind, photographs=entry["photographs"], **far)
    for model, built in result("engine-builds").items():
        seconds = round(sum(engine["seconds"] for engine in built["engines"].values()), 1)
        put(model, "trt-rtx", engines=len(built["engines"]), seconds=seconds, peak_memory_gb=built["peak_memory_gb"])
    order = ("fp32", "fp16", "trt-rtx")
    return {model: {kind: kinds[kind] for kind in order if kind in kinds} for model, kinds in sorted(found.items())}


def decision_rules() -> str:
    """Each rule at another value than the default, on hard scenes."""
    found = result("decision-rules")["options"]
    kinds = ", ".join(f"{kind} {score:.3f}" for kind, score in found["kinds"].items())
    empty = "empty scenes with a label"
    rows: list[Row] = [[f"defaults: mIoU {found['miou']:.3f} ({kinds})", "", f"{found[empty]:.0%}"]]
    rows += [[name, _gain(each), f"{each[empty]:.0%}"] for name, each in found["options"].items()]
    return table([f"{found['scenes']} hard scenes", "mIoU gained", empty], rows)


def looks() -> str:
    """More and fewer looks at a photograph, on hard scenes."""
    found = result("decision-rules")["looks"]
    kinds = ("all", "small", "crowd", "plain")
    empty = "empty scenes with a label"
    rows = [
        [
            name,
            f"{each['all']['miou']:.3f}",
            *(_gain(each[kind]) if not name.startswith("defaults") else "" for kind in kinds),
            f"{each[empty]:.0%}",
        ]
        for name, each in found.items()
        if isinstance(each, dict)
    ]
    return table([f"{found['scenes']} hard scenes", "mIoU", "gained", *(f"on {kind} ones" for kind in kinds[1:]), empty], rows)


def _gain(each: Any) -> str:
    return f"{each['gain']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f})"


def negatives() -> str:
    """What is named as a negative, in CLIP, in the detector, or in both."""
    rows: list[Row] = []
    for what, found in result("decision-rules")["negatives"].items():
        plain = found["not named"]
        rows.append([f"{what} ({found['scenes']} scenes): not named", f"mIoU {plain['miou']:.3f}", *_box_counts(plain)])
        for key in ("named in CLIP", "named in the detector", "named in both"):
            rows.append([f"{found['names']} {key}", _gain(found[key]), *_box_counts(found[key])])
    return table(["negatives", "mIoU gained", "boxes on objects", "false boxes"], rows)


def empty_scenes() -> str:
    """Scenes without an object that get a label, and what it costs to leave them without one."""
    found = result("decision-rules")["empty"]
    empty = "empty scenes with a label"
    rows: list[Row] = [
        [
            " ".join(f"{key.replace('_', ' ')} {each[key]}" for key in each if "threshold" in key),
            f"{each[empty]:.0%}",
            f"{each['miou']:.3f}",
        ]
        for each in found["rules"]
    ]
    return table(
        [f"{found['scenes']} scenes without an object, and as many with some", "labeled ones of the first", "mIoU of the others"],
        rows,
    )


def _box_counts(each: Any) -> tuple[int, int]:
    return each["boxes on objects"], each["false boxes"]


def tuning() -> str:
    """Tuned and calibrated rules on another domain."""
    found = result("decision-rules")
    tuned, calibrated = found["tune"], found["calibrate"]
    rows: list[Row] = [["defaults", f"mIoU {tuned['default']:.3f}", ""]]
    rows.append(["oracle", f"mIoU {tuned['oracle']['miou']:.3f}", _values(tuned["oracle"]["changed"])])
    for number, each in enumerate(tuned["sets"], 1):
        rows.append(
            [
                f"`wsss tune` on set {number}: {each['of the gap']:.0%} of the gap closed",
                f"mIoU {each['miou']:.3f}, {_gain(each)}",
                _values(each["changed"]),
            ]
        )
    mean = sum(each["of the gap"] for each in tuned["sets"]) / len(tuned["sets"])
    rows.append([f"mean of the sets: {mean:.0%} of the gap closed", "", ""])
    random = tuned["random sets"]
    closed = f"{random['of the gap, mean']:.0%} of the gap closed (median {random['of the gap, median']:.0%})"
    worse = f"worst gain {random['worst gain']:+.4f}, {random['worse than the defaults by more than 0.005']} sets below -0.005"
    rows.append([f"{random['sets']} random sets, scored on the {random['scored on']} others: {closed}", worse, ""])
    before, after = calibrated["macro F1"]
    f1 = f"macro F1 {before:.3f} to {after:.3f}"
    rows.append([f"`wsss calibrate`, {calibrated['scenes']} scenes, cross-validated: {f1}", _gain(calibrated), ""])
    scenes, seconds = tuned["scenes"], tuned["CPU seconds for 500 settings of 200 scenes"]
    rows.append(["500 settings on 200 scenes, after the models ran", f"{seconds:.0f} s of CPU time", ""])
    return table([f"tuned on {scenes['tuned on']} scenes, scored on {scenes['scored on']}", "measured", "changed"], rows)


def _values(changed: Any) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changed.items())


def scaling() -> str:
    """The chain's speed over its load."""
    rows: list[Row] = []
    for curve in result("scaling")["curves"]:
        points = curve["points"]
        rates = ", ".join(f"{point['shown']}: {point['per_second']:.3g}" for point in points)
        cpu = ", ".join("-" if point["cpu_seconds"] is None else f"{point['cpu_seconds']:.3g}" for point in points)
        rows.append([curve["what"], rates, cpu])
    return table(["load", "images a second", "CPU seconds an image"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "decision-rules": decision_rules,
    "looks": looks,
    "negatives": negatives,
    "empty-scenes": empty_scenes,
    "tuning": tuning,
    "quality": quality,
    "parity": parity,
    "half-precision": half,
    "detectors": detectors,
    "sam3": concept,
    "export-cost": export_cost,
    "engine-builds": engines,
    "compiled-graphs": compiled,
    "chain-bounds": chain_bounds,
    "fp16-accumulation": accumulation,
    "sampling-forms": sampling,
    "stage-two": stage_two,
    "confidence-weights": confidence_weights,
    "mask-options": mask_options,
    "pixel-confidence": pixel_confidence,
    "training-speed": training_speed,
    "host": host,
    "graph-replays": replays,
    "scale": scale,
    "masks": masks,
    "objects": objects,
    "peers": peers,
    "scaling": scaling,
    "peers-summary": peers_summary,
    "summary": summary,
}


def updated(text: str) -> str:
    """A page with its tables rewritten. Raises KeyError for an unknown table."""
    return _BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


def main() -> None:
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is out of date")
    check = parser.parse_args().check
    stale = []
    pages = {page: updated(page.read_text(encoding="utf-8")) for page in PAGES}
    for page, new in {**pages, PROVEN: json.dumps(proofs(), indent=1) + "\n"}.items():
        if not page.exists() or new != page.read_text(encoding="utf-8"):
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if stale and check:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python -m wsss.benchmarks.studies.tables")


if __name__ == "__main__":
    main()
