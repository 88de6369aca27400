"""Every rule between the models' outputs and the label map, on and off, on hard drawn scenes.

The models run once on each set of scenes (`wsss.runtime.tune.evidence`). Settings are then decided from what they found, which
gives the label maps of real runs with the same flags. Differences of mIoU have 95 % intervals of a paired bootstrap over scenes.

- hard scenes of seven kinds, with each rule at other values than the default;
- the same with the detector in tiles, and with fewer and more views for CLIP;
- scenes as the models were trained on: labels where there is no object, and mIoU elsewhere, by tag and box threshold;
- look-alikes, and objects of other classes, that are named as negatives, in CLIP, in the detector, and in both;
- ``wsss tune`` on 20 scenes of another domain, scored on 200 others, three times;
- ``wsss calibrate`` on scenes of that domain, cross-validated.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ....batch import Photograph
from ....classes import ClassList, class_list
from ....mini.hard_scenes import KINDS, LOOK_ALIKES, Kind, draw_hard_scene
from ....mini.scenes import CLASSES, Scene, draw_scene
from ....runtime.chain import Chain, Rules
from ....runtime.detect import box_iou
from ....runtime.tune.calibrate import calibrate_chain
from ....runtime.tune.evidence import Evidence, Grid
from ....runtime.tune.outcomes import Outcomes, difference, miou
from ....runtime.tune.search import candidates, search
from ..harness import RESULTS, about, log, read_result, study_parser, write_result

RESULT = RESULTS / "decision-rules.json"
HARD = ("plain", *(kind for kind in KINDS if kind != "shifted"))
PLAIN = 5_000_000
"""Seed of the first plain scene."""
OPTIONS: dict[str, dict[str, Any]] = {
    "score rule mean": {"score_rule": "mean"},
    "enclosing boxes dropped": {"enclosing": False},
    "NMS 0.4": {"nms": 0.4},
    "NMS 0.6": {"nms": 0.6},
    "NMS 0.7": {"nms": 0.7},
    "NMS across classes 0.6": {"nms_across": 0.6},
    "NMS across classes 0.9": {"nms_across": 0.9},
    "margin 0": {"margin": 0.0},
    "margin 0.3": {"margin": 0.3},
    "predicted IoU left out": {"quality_exponent": 0.0},
    "predicted IoU squared": {"quality_exponent": 2.0},
    "tag threshold 0.3": {"tag_threshold": 0.3},
    "tag threshold 0.8": {"tag_threshold": 0.8},
    "box threshold 0.4": {"box_threshold": 0.4},
    "box threshold 0.6": {"box_threshold": 0.6},
    "box threshold 0.7": {"box_threshold": 0.7},
}
TUNED_ON, SETS, SCORED_ON = 20, 3, 200
RANDOM = 40
"""Random sets of scenes to tune on."""
SORTS = {"plain-empty": True, "plain-objects": False}
"""Scenes as the models were trained on, by whether they have no object."""
LOOKS: dict[str, dict[str, Any]] = {
    "defaults, 14 views": {},
    "2 x 2 tiles": {"tiles": 2},
    "3 x 3 tiles": {"tiles": 3},
    "1 view": {"views": 1},
    "5 views": {"views": 2},
    "30 views": {"views": 4},
}
HIT = 0.5
"""IoU from which a box is one of an object of its class."""


def evidence_of(
    work: Path,
    name: str,
    kinds: Sequence[tuple[str, int]],
    classes: ClassList | str = "mini",
    truth: Callable[[Scene], np.ndarray] = lambda scene: scene.label,
    chain: Chain | None = None,
    grid: Grid | None = None,
) -> Evidence:
    """The evidence about scenes, given by kind and seed; what the models found is kept in the working folder.

    Args:
        chain: None opens the models that come with wsss, with the default rules.
    """
    scenes = {f"{kind}-{seed}.png": (kind, seed) for kind, seed in kinds}

    def read(photo: str) -> Photograph:
        return Photograph(name=photo, pixels=scene_of(*scenes[photo]).pixels)

    chain = chain or Chain.open("mini", classes=classes)
    kept = work / f"{name}.pickle"
    names = [] if kept.is_file() else list(scenes)
    start = time.perf_counter()
    found = Evidence(chain, names, read, lambda photo: truth(scene_of(*scenes[photo])), grid)
    if names:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(pickle.dumps(found.samples))
        log(f"{name}: {len(names)} scenes in {time.perf_counter() - start:.0f} s")
    else:
        found.samples = pickle.loads(kept.read_bytes())  # written above
    return found


def scene_of(kind: str, seed: int) -> Scene:
    """A hard scene, or with the kind ``plain`` one as the models were trained on."""
    if kind == "plain":
        return draw_scene(PLAIN + seed, split="held-out")
    return draw_hard_scene(seed, cast(Kind, kind))


def joined(parts: Sequence[Evidence]) -> Evidence:
    """One evidence of several sets of scenes, of which nothing new will be asked."""
    parts[0].samples = [sample for part in parts for sample in part.samples]
    return parts[0]


def options(work: Path, count: int) -> dict[str, Any]:
    """mIoU of the defaults on hard scenes, and what each other value of a rule gains."""
    parts = [evidence_of(work, kind, [(kind, seed) for seed in range(count)]) for kind in HARD]
    for part in parts:
        part.samples = part.samples[:count]
    evidence = joined(parts)
    outcomes, default = Outcomes(evidence), evidence.rules
    kind_of = np.array([sample.name.rpartition("-")[0] for sample in evidence.samples])
    base = outcomes.matrices(default)
    result: dict[str, Any] = {
        "scenes": len(evidence),
        "rules": {name: getattr(default, name) for name in ("tag_threshold", "score_rule", "box_threshold")},
        "miou": round(outcomes.miou(default), 4),
        "kinds": {kind: round(float(miou(base[kind_of == kind].sum(axis=0))), 4) for kind in HARD if kind != "empty"},
        "empty scenes with a label": round(labeled_share(base[kind_of == "empty"]), 4),
        "options": {},
    }
    for name, changed in OPTIONS.items():
        matrices = outcomes.matrices(replace(default, **changed))
        result["options"][name] = {
            **interval_of(difference(matrices, base)),
            "empty scenes with a label": round(labeled_share(matrices[kind_of == "empty"]), 4),
        }
        log(f"{name:26} {result['options'][name]}")
    return result


def looks(work: Path, count: int) -> dict[str, Any]:
    """What more and fewer looks at a photograph gain on hard scenes, by kind and on all of them."""
    base: dict[str, np.ndarray] = {}
    result: dict[str, Any] = {"scenes": count * len(HARD)}
    for name, changed in LOOKS.items():
        found: dict[str, np.ndarray] = {}
        for kind in HARD:
            kept = f"{kind}-{name}" if changed else kind
            chain = Chain.open("mini", classes="mini", rules=Rules(**changed))
            evidence = evidence_of(work, kept, [(kind, seed) for seed in range(count)], chain=chain)
            evidence.samples = evidence.samples[:count]
            found[kind] = Outcomes(evidence).matrices(evidence.rules)
        base = base or found
        both = [np.concatenate(list(each.values())) for each in (found, base)]
        gains = {kind: interval_of(difference(found[kind], base[kind])) for kind in HARD if kind != "empty"}
        result[name] = {
            "all": {"miou": round(float(miou(both[0].sum(axis=0))), 4), **interval_of(difference(*both))},
            **gains,
            "empty scenes with a label": round(labeled_share(found["empty"]), 4),
        }
        log(f"{name}: {result[name]}")
    return result


def empty(work: Path, count: int) -> dict[str, Any]:
    """Scenes as the models were trained on: those without an object that get a label, and mIoU of the others, by threshold."""
    are_empty = [not len(scene_of("plain", seed).labels) for seed in range(40 * count)]
    seeds = {
        name: [seed for seed, is_empty in enumerate(are_empty) if is_empty is empty][:count] for name, empty in SORTS.items()
    }
    evidence = {name: evidence_of(work, name, [("plain", seed) for seed in each]) for name, each in seeds.items()}
    outcomes, default = {name: Outcomes(each) for name, each in evidence.items()}, evidence["plain-empty"].rules
    result: dict[str, Any] = {"scenes": count, "rules": []}
    tried: list[dict[str, Any]] = [{"tag_threshold": value} for value in (default.tag_threshold, 0.7, 0.8, 0.9, 0.95)]
    for changed in (*tried, *({"box_threshold": value} for value in (0.6, 0.7, 0.8, 0.9))):
        labeled, others = (outcomes[name].matrices(replace(default, **changed)) for name in SORTS)
        row = {"empty scenes with a label": round(labeled_share(labeled), 4), "miou": round(float(miou(others.sum(axis=0))), 4)}
        result["rules"].append({**changed, **row})
        log(f"{result['rules'][-1]}")
    # By what a scene's best box says: the share of the others above all but one in a hundred of the empty ones.
    empties, others = (_best_scores(evidence[name]) for name in SORTS)
    limits = np.quantile(empties, 0.99, axis=0)
    result["kept where 1 % of the empty ones are"] = {
        name: round(float(share), 4)
        for name, share in zip(("tag", "box", "product"), (others > limits).mean(axis=0), strict=True)
    }
    return result


def _best_scores(evidence: Evidence) -> np.ndarray:
    """(N, 3): the best tag of each scene, its best box, and the best product of a box and its tag; 0 without a box."""
    best = np.zeros((len(evidence), 3))
    for number, sample in enumerate(evidence.samples):
        best[number, 0] = sample.score.max()
        if len(boxes := evidence.boxes(number, evidence.rules)):
            best[number, 1:] = boxes.score.max(), (boxes.score * sample.score[boxes.label - 1]).max()
    return best


def negatives(work: Path, count: int) -> dict[str, Any]:
    """Things that are not classes, named as negatives or not: look-alikes, and the objects of half of the classes."""
    seeds = [("look-alikes", seed) for seed in range(count)]
    named = class_list([*CLASSES, *(f"!{name}" for name in LOOK_ALIKES)])
    others = [(kind, 100 + seed) for kind in ("overlap", "border", "crowd") for seed in range(count // 2)]
    half, half_named = class_list(CLASSES[::2]), class_list([*CLASSES[::2], *(f"!{name}" for name in CLASSES[1::2])])
    return {
        "look-alikes": _negatives(
            evidence_of(work, "look-alikes", seeds), evidence_of(work, "negatives", seeds, named), CLASSES, len(LOOK_ALIKES)
        ),
        "objects of half of the classes": _negatives(
            evidence_of(work, "half", others, half, half_of),
            evidence_of(work, "half-negatives", others, half_named, half_of),
            CLASSES[::2],
            len(CLASSES[1::2]),
        ),
    }


def half_of(scene: Scene) -> np.ndarray:
    """The label map of every other class, numbered from 1; the other objects are background."""
    return np.where(scene.label % 2 == 1, (scene.label + 1) // 2, 0).astype(np.uint8)


def _negatives(without: Evidence, named: Evidence, classes: Sequence[str], names: int) -> dict[str, Any]:
    scores = [[sample.score for sample in each.samples] for each in (without, named)]
    base = Outcomes(without).matrices(without.rules)
    result: dict[str, Any] = {"scenes": len(named), "names": names}
    result["not named"] = {**_boxes(without, classes), "miou": round(float(miou(base.sum(axis=0))), 4)}
    # Who decides the tags, and who finds the boxes.
    for name, tags, found in (("in CLIP", 1, without), ("in the detector", 0, named), ("in both", 1, named)):
        for sample, score in zip(found.samples, scores[tags], strict=True):
            sample.score = score
        matrices = Outcomes(found).matrices(found.rules)
        result[f"named {name}"] = {**_boxes(found, classes), **interval_of(difference(matrices, base))}
        log(f"named {name}: {result[f'named {name}']}")
    return result


def _boxes(evidence: Evidence, classes: Sequence[str]) -> dict[str, Any]:
    """Boxes on objects of their class, and false ones, with the defaults."""
    right = false = 0
    for number, sample in enumerate(evidence.samples):
        kind, _, seed = sample.name.removesuffix(".png").rpartition("-")
        scene, found = scene_of(kind, int(seed)), evidence.boxes(number, evidence.rules)
        if not len(found):
            continue
        label = np.array([CLASSES.index(classes[label - 1]) + 1 for label in found.label])
        overlap = box_iou(found.xyxy_image, scene.xyxy_image) * (label[:, None] == scene.labels)
        hits = int((overlap.max(axis=1, initial=0) >= HIT).sum())
        right, false = right + hits, false + len(found) - hits
    return {"boxes on objects": right, "false boxes": false}


def tuning(work: Path) -> dict[str, Any]:
    """Rules tuned on few scenes of another domain, on others; and the time of many settings."""
    count = TUNED_ON * SETS + SCORED_ON
    first = evidence_of(work, "shifted", [("shifted", seed) for seed in range(count)])
    more = [("shifted", seed) for seed in range(count, count + TUNED_ON * SETS)]
    evidence = joined([first, evidence_of(work, "shifted-more", more)])
    outcomes, default = Outcomes(evidence), evidence.rules
    scored = np.arange(TUNED_ON * SETS, count)

    def score(rules: Rules) -> float:
        return float(miou(outcomes.matrices(rules)[scored].sum(axis=0)))

    cpu = time.process_time()
    oracle = best_of(outcomes, scored)
    seconds = time.process_time() - cpu
    result: dict[str, Any] = {
        "scenes": {"tuned on": TUNED_ON, "scored on": SCORED_ON},
        "default": round(score(default), 4),
        "oracle": {"miou": round(score(oracle), 4), **_changed(oracle, default)},
        "sets": [],
        "CPU seconds for 500 settings of 200 scenes": round(seconds / outcomes.settings * 500 * 200 / len(evidence), 1),
    }
    gap = score(oracle) - score(default)
    # The search was designed on the first sets, and on others drawn from the same scenes; the last sets were drawn afterwards.
    starts = [*range(0, TUNED_ON * SETS, TUNED_ON), *range(count, len(evidence), TUNED_ON)]
    for number, start in enumerate(starts, 1):
        own = np.arange(start, start + TUNED_ON)
        rules = search(outcomes, own)
        gain = difference(outcomes.matrices(rules)[scored], outcomes.matrices(default)[scored])
        closed = gain.value / gap if gap else 0.0
        result["sets"].append(
            {"miou": round(score(rules), 4), "of the gap": round(closed, 3), **interval_of(gain), **_changed(rules, default)}
        )
        log(f"tuned on set {number}: {result['sets'][-1]}")
    result["random sets"] = _random_sets(outcomes, RANDOM)
    return result


def _random_sets(outcomes: Outcomes, count: int) -> dict[str, Any]:
    """Rules tuned on random sets of scenes, scored on all others."""
    default, everything = outcomes.evidence.rules, np.arange(len(outcomes.evidence))
    gains, closed = [], []
    for seed in range(count):
        own = np.random.default_rng(seed).choice(everything, TUNED_ON, replace=False)
        others = np.setdiff1d(everything, own)
        base, best, found = (
            float(miou(outcomes.matrices(rules)[others].sum(axis=0)))
            for rules in (default, best_of(outcomes, others), search(outcomes, own))
        )
        gains.append(found - base)
        closed.append((found - base) / (best - base))
    return {
        "sets": count,
        "scored on": len(everything) - TUNED_ON,
        "of the gap, mean": round(float(np.mean(closed)), 3),
        "of the gap, median": round(float(np.median(closed)), 3),
        "worst gain": round(min(gains), 4),
        "worse than the defaults by more than 0.005": sum(gain < -0.005 for gain in gains),
    }


def best_of(outcomes: Outcomes, photographs: np.ndarray) -> Rules:
    """The best tag and box thresholds for some photographs, by their mIoU."""
    tried = candidates(outcomes, outcomes.evidence.rules, ("tag_threshold", "box_threshold"))
    return max(tried, key=lambda rules: float(miou(outcomes.matrices(rules)[photographs].sum(axis=0))))


def calibration(work: Path, count: int) -> dict[str, Any]:
    """Thresholds by class on scenes of another domain, on scenes that were left out."""
    evidence = evidence_of(work, "shifted", [("shifted", seed) for seed in range(TUNED_ON * SETS + SCORED_ON)])
    evidence.samples = evidence.samples[:count]
    found = calibrate_chain(evidence)
    assert found.miou is not None and found.miou_before is not None
    return {
        "scenes": count,
        "recall counts": found.beta,
        "macro F1": [round(found.before["macro_f1"], 4), round(found.after["macro_f1"], 4)],
        "miou": round(found.miou_before, 4),
        **interval_of(found.miou),
    }


def labeled_share(matrices: np.ndarray) -> float:
    """Share of the scenes with a pixel of a class."""
    return float((matrices[:, :, 1:].sum(axis=(1, 2)) > 0).mean())


def interval_of(found: Any) -> dict[str, Any]:
    return {"gain": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def _changed(rules: Rules, default: Rules) -> dict[str, Any]:
    return {"changed": {name: value for name, value in vars(rules).items() if value != getattr(default, name)}}


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT, work="build/decision-rules")
    parser.add_argument("--count", type=int, default=30, help="scenes of each kind")
    parser.add_argument("--parts", nargs="*", default=[], help="only these parts; the others stay as they are in the result file")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "options": lambda: options(arguments.work, arguments.count),
        "looks": lambda: looks(arguments.work, arguments.count),
        "empty": lambda: empty(arguments.work, 100),
        "negatives": lambda: negatives(arguments.work, 200),
        "tune": lambda: tuning(arguments.work),
        "calibrate": lambda: calibration(arguments.work, 60),
    }
    result = {**read_result(arguments.out), **about()}
    for name in arguments.parts or parts:
        result[name] = parts[name]()
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
