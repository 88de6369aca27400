"""Whether the report puts the worst labels first: ``python -m wsss.benchmarks.studies.quality.doubt_ranking``.

Drawn scenes have exact truth. An image's error is 1 - the mean IoU of the classes that are in the truth or in the label map. The
order by doubt (`runtime/report/doubt.py`), and by each part of doubt alone, is compared with the order by error. The weights
were chosen on 120 other scenes, those of ``wsss demo --count 120``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....batch import VOID
from ....mini.scenes import write_scenes
from ....runtime.chain import Chain
from ....runtime.report.doubt import WEIGHTS, doubt, floors_of
from ....runtime.run.label_folder import label_folder
from ....store.local import read_label, read_records, read_run
from ..harness import RESULTS, about, study_parser, write_result

RESULT = RESULTS / "doubt-ranking.json"
SEED = 3_000_000
Floats = npt.NDArray[np.float64]


def measure(count: int, folder: Path) -> dict[str, Any]:
    """Measure how well doubt orders ``count`` held-out scenes, drawn and labeled below ``folder``."""
    write_scenes(folder, count, seed=SEED)
    store = folder / "store"
    label_folder(Chain.open("mini", classes="mini", engine="ort"), folder / "images", store)
    records = [record for record in read_records(store) if "error" not in record]
    floors = floors_of(read_run(store), records)
    error = np.array([_error(folder, record["label"]) for record in records])
    doubts = [doubt(record, floors) for record in records]
    return {
        "images": len(records),
        "weights": WEIGHTS,
        "mean error": round(float(error.mean()), 4),
        "rank correlation": {
            part: _rank_correlation(np.array([getattr(one, part) for one in doubts]), error) for part in ("total", *WEIGHTS)
        },
        "worst quarter found in the first quarter": _found(np.array([one.total for one in doubts]), error),
    }


def _error(folder: Path, label: str) -> float:
    truth, predicted = read_label(folder / "truth" / Path(label).name), read_label(folder / "store" / "labels" / label)
    ious = []
    for label_value in np.setdiff1d(np.union1d(truth, predicted), [0, VOID]):
        is_true, is_predicted = truth == label_value, predicted == label_value
        union = (is_true | is_predicted) & (truth != VOID)
        if union.any():
            ious.append((is_true & is_predicted).sum() / union.sum())
    return 1 - float(np.mean(ious)) if ious else 0.0


def _rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's; equal values share the mean of their ranks."""
    return round(float(np.corrcoef(_ranks(a), _ranks(b))[0, 1]), 3)


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _found(score: Floats, error: Floats) -> float:
    """Share of the quarter with the largest errors that is in the quarter with the largest scores."""
    quarter = max(1, len(error) // 4)
    first, worst = (set(np.argsort(-values, kind="stable")[:quarter].tolist()) for values in (score, error))
    return round(len(first & worst) / quarter, 3)


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("--count", type=int, default=120)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {**about(), **measure(arguments.count, Path(folder))}
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
