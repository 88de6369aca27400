"""Quality of the mini detector on held-out scenes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor
from torchvision.ops import box_convert, box_iou, nms

from ..export.mini import grounding_dino_mini_tokenizer
from .detector_data import Captions, draw_pool, encoded_captions, moved, normalized
from .scenes import CLASSES

NMS_IOU, NMS_IOU_ACROSS = 0.6, 0.8
"""IoU from which the less certain of two boxes is removed: within a class, and across classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Scores of the detector on held-out scenes."""

    ap50: float
    """Mean over classes of the average precision at IoU 0.5, with all-point interpolation."""
    ap75: float
    """The same at IoU 0.75."""
    f1: float
    """Best F1 over thresholds, at IoU 0.5, all classes together."""
    threshold: float
    """The threshold of the best F1, on the mean of the sigmoid scores of a class's tokens."""
    iou: float
    """Mean IoU of the boxes matched at that threshold."""
    f1_by_threshold: dict[float, float]


@torch.no_grad()
def detections(
    model: transformers.GroundingDinoForObjectDetection, pixels: Tensor, mask: Tensor, captions: Captions, least: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per image: scores (N,), labels (N,) from 1 and boxes (N, 4) xyxy in 0..1, after NMS per class and across."""
    output = model(pixel_values=pixels, pixel_mask=mask, input_ids=captions.ids, attention_mask=captions.mask)
    scores = output.logits[..., : captions.ids.shape[1]].sigmoid()  # (B, Q, T)
    weights = captions.spans / captions.spans.sum(-1, keepdim=True).clamp(min=1)
    by_class = scores @ weights.transpose(1, 2)  # (B, Q, 13), 0 for a class that is not in the caption
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for row in range(len(by_class)):
        queries, labels = (by_class[row] >= least).nonzero(as_tuple=True)
        score = by_class[row, queries, labels]
        boxes = box_convert(output.pred_boxes[row, queries], "cxcywh", "xyxy")
        keep = nms(boxes + 10 * labels[:, None], score, NMS_IOU)
        keep = keep[nms(boxes[keep], score[keep], NMS_IOU_ACROSS)]
        found.append((score[keep], labels[keep], boxes[keep]))
    return found


def evaluate(model: transformers.GroundingDinoForObjectDetection, count: int, *, first: int = 0) -> Quality:
    """Quality on ``count`` held-out scenes; captions hold the present classes and two absent ones, in class order."""
    device = next(model.parameters()).device
    tokenizer = grounding_dino_mini_tokenizer()
    rng = np.random.default_rng(7)
    model.eval()
    rows: list[
        tuple[float, int, float, float]
    ] = []  # score, label, IoU with its matched object or 0, 1 if it also matches at 0.75
    objects = np.zeros(len(CLASSES) + 1, dtype=int)
    for pool in draw_pool(count, first=first, split="held-out").values():
        for start in range(0, len(pool.labels), 8):
            labels, truth = pool.labels[start : start + 8], box_convert(pool.boxes[start : start + 8], "cxcywh", "xyxy")
            named: list[list[int]] = []
            for row in labels:
                present = np.unique(row[row > 0].numpy())
                absent = np.setdiff1d(np.arange(1, len(CLASSES) + 1), present)
                named.append(sorted([*present.tolist(), *rng.permutation(absent)[:2].tolist()]))
            captions = moved(encoded_captions(named, tokenizer), device)
            valid = pool.valid[start : start + 8].to(device)
            pixels, mask = normalized(pool.pixels[start : start + 8].to(device), valid)
            for row, (score, label, boxes) in enumerate(detections(model, pixels, mask, captions, least=0.02)):
                objects += np.bincount(labels[row][labels[row] > 0].numpy(), minlength=len(objects))
                overlap = box_iou(boxes.cpu(), truth[row])
                overlap[label.cpu()[:, None] != labels[row][None]] = 0
                # VOC protocol: the most certain box of an object is right, later ones are false positives.
                free50, free75 = set(range(5)), set(range(5))
                for place in score.argsort(descending=True).tolist():
                    iou, matched = (float(value) for value in overlap[place].max(0))
                    hit50, hit75 = iou >= 0.5 and matched in free50, iou >= 0.75 and matched in free75
                    free50 -= {matched} if hit50 else set()
                    free75 -= {matched} if hit75 else set()
                    rows.append((float(score[place]), int(label[place]), iou if hit50 else 0.0, float(hit75)))
    rows.sort(reverse=True)
    table = np.array(rows).reshape(-1, 4)
    classes = [label for label in range(1, len(objects)) if objects[label]]
    ap = [
        np.mean([_average_precision(table[table[:, 1] == label][:, column] > 0, objects[label]) for label in classes])
        for column in (2, 3)
    ]
    f1 = {}
    for threshold in np.arange(0.1, 0.81, 0.05):
        kept = table[table[:, 0] >= threshold]
        f1[round(float(threshold), 2)] = round(2 * float((kept[:, 2] > 0).sum()) / (len(kept) + int(objects.sum())), 4)
    threshold = max(f1, key=lambda level: f1[level])
    right = table[(table[:, 0] >= threshold) & (table[:, 2] > 0), 2]
    return Quality(
        ap50=float(ap[0]),
        ap75=float(ap[1]),
        f1=f1[threshold],
        threshold=threshold,
        iou=float(right.mean()) if len(right) else 0.0,
        f1_by_threshold=f1,
    )


def _average_precision(right: np.ndarray, objects: int) -> float:
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(precision[right].sum() / objects)
