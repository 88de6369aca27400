"""Time of each stage and peak memory of the full-size chain on a folder of real photographs.

With random weights the labels are meaningless; the study shows that the chain completes, and its cost. CLIP runs, but its
threshold of 0 lets every class through (``--tag-threshold``), so that every image passes every stage.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from ....engines.ort_library import onnxruntime
from ....runtime.chain import Chain, Rules
from ....runtime.run.label_folder import label_folder
from ....store.local import read_records
from ..harness import RESULTS, about, log, peak_memory_bytes, study_parser, write_result

RESULT = RESULTS / "real-photos.json"


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("images", type=Path)
    parser.add_argument("--bundle", default="bundle")
    parser.add_argument("--classes", default="voc")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tag-threshold", type=float, default=0.0, help="0 lets every class through (default)")
    parser.add_argument("--box-threshold", type=float, help="default: the bundle's")
    parser.add_argument("--store", type=Path, default=Path("build/real-photos"), help="label store; a second run continues it")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this time, when the current batches are done")
    arguments = parser.parse_args()
    rules = Rules(tag_threshold=arguments.tag_threshold, box_threshold=arguments.box_threshold)
    labeler = Chain.open(arguments.bundle, classes=arguments.classes, rules=rules)
    stop = threading.Event()
    clock = threading.Timer(60 * arguments.minutes, stop.set)
    clock.daemon = True
    clock.start()
    label_folder(
        labeler,
        arguments.images,
        arguments.store,
        batch=arguments.batch,
        stop=stop,
        progress=lambda summary: log(str(summary)),
    )
    runs = [json.loads(line) for line in (arguments.store / "history.jsonl").read_text().splitlines()]
    records = [record for record in read_records(arguments.store) if "label" in record]
    timed = sum(run["labelled"] for run in runs)  # the labels of a killed run stay, but its times are lost
    stages = {stage: sum(run["stage_seconds"].get(stage, 0.0) for run in runs) for stage in runs[0]["stage_seconds"]}
    result = {
        **about(),
        "onnxruntime": onnxruntime.__version__,
        "models": labeler.settings["models"],
        "rules": labeler.settings["rules"],
        "batch": arguments.batch,
        "images": runs[-1]["images"],
        "labelled": len(records),
        "failed": runs[-1]["failed"] + runs[-1]["failed_before"],
        "boxes": sum(len(record["boxes"]) for record in records),
        "images_timed": timed,
        "seconds_per_image": {stage: round(taken / max(timed, 1), 3) for stage, taken in stages.items()},
        "peak_memory_gb": round(peak_memory_bytes() / 1e9, 2),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
