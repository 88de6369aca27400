"""The fusing graph after SAM's decoder: masks of one image to its label map.

SAM's upsampling (side -> canvas, crop the padding, valid -> photograph) is linear along each axis, and so is SAM 2's (side ->
photograph). The host passes it as two matrices (`wsss.frame`), and the graph multiplies: ``rows @ logits @ columns.T``. The masks
then compete for pixels.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...frame import frame_for
from ...spec import AxisRange, Preprocess, TensorSpec
from ..family import Feeds, Graph, InHalf, Tolerance, miscount, share_impossible
from ..precision.lowering import Fp32

VOID = 255
LOGIT_ROUNDING = 2.0**-17
"""Largest difference of two implementations of upsampling, as a share of a mask's largest logit: both round coordinates up to
1,024 and sums in float32. Measured: up to 2**-21.8, and 2**-19.6 on processors without fused multiply-add."""
VALUE_ROUNDING = 4e-6
"""The same for ``score * sigmoid(z)``, as a share of it: a few roundings to 24 bits, and a GPU's exponential."""
PIXELS = AxisRange(1, 500, 16_384)
"""Height (or rows of a chunk) and width of a photograph."""


class Fuse(nn.Module):
    """Masks of one image to a label map; the rule is `vote`.

    A photograph may be fused in chunks of rows: the ``label_map`` is the same except for ties, ``area`` and ``won`` add up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decide = Fp32(_upsample_and_vote, why="decides pixels at the zero crossing")

    def forward(
        self, logits: Tensor, pick: Tensor, score: Tensor, label: Tensor, rows: Tensor, columns: Tensor, margin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fused: tuple[Tensor, Tensor, Tensor, Tensor] = self.decide(logits, pick, score, label, rows, columns, margin)
        return fused


def _upsample_and_vote(
    logits: Tensor, pick: Tensor, score: Tensor, label: Tensor, rows: Tensor, columns: Tensor, margin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = rows @ logits[pick] @ columns.transpose(0, 1)  # (N, H, W)
    return vote(z, score, label, margin)


def vote(z: Tensor, score: Tensor, label: Tensor, margin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign each pixel to a mask.

    Mask i claims a pixel where its logit ``z`` is positive, with value ``score * sigmoid(z)``. The largest value wins, or the
    first of equal values; the runner-up is the best mask of another label.

    Args:
        z: (N, H, W) float32 mask logits at the photograph's size; 0 is the edge.
        score: (N,) float32 in (0, 1].
        label: (N,) int64 from 1.
        margin: (1,) float32, the share of its value by which a winner must lead.

    Returns:
        label_map (H, W) uint8: 0 where no mask claims, 255 where the runner-up is too close, else the winner's label;
        area (N,) int64: pixels inside each outline; won (N,) int64: pixels that got each mask's label;
        confidence (H, W) uint8, 255 is certain: of a label, by how much its value exceeds the runner-up's; of background, by how
        much every mask's ``score * sigmoid(z)`` stays below 1; 0 where the label map is 255.
    """
    claimed = z > 0
    probable = score[:, None, None] * torch.sigmoid(z)
    value = torch.where(claimed, probable, 0.0)
    best, winner = value.max(dim=0)  # (H, W)
    other = label[:, None, None] != label[winner]
    runner_up = torch.where(other, value, 0.0).amax(dim=0)
    contested = (runner_up > 0) & (best - runner_up < margin * best)
    owned = (best > 0) & ~contested
    label_map = torch.where(owned, label[winner], torch.where(contested, VOID, 0)).to(torch.uint8)
    won = (winner == torch.arange(z.shape[0], device=z.device)[:, None, None]) & owned
    sure = torch.where(best > 0, torch.where(contested, 0.0, best - runner_up), 1 - probable.amax(dim=0))
    confidence = (255 * sure + 0.5).to(torch.uint8)
    return label_map, claimed.sum(dim=(1, 2)), won.sum(dim=(1, 2)), confidence


def fuse_graph(preprocess: Preprocess, *, logits_side: int, masks: AxisRange) -> Graph:
    """Graph ``fuse``, see `Fuse`. Reference: the official `upsampled`, then the rule for each pixel over sorted claims."""

    @torch.inference_mode()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        size = len(feeds["rows"]), len(feeds["columns"])
        logits, score, label, margin = feeds["logits"][feeds["pick"]], feeds["score"], feeds["label"], float(feeds["margin"][0])
        z = upsampled(torch.from_numpy(logits), preprocess, size).numpy()
        fused = fused_by_sorting(z, score, label, margin)
        rounding = LOGIT_ROUNDING * np.abs(logits).max(axis=(1, 2))
        return fused | near_ties(z, rounding, score, label, margin, fused["label_map"])

    def sample(picked: int, seed: int) -> Feeds:
        return sample_masks(preprocess, logits_side, masks.max, picked, seed)

    label_map = Tolerance(relative=0, measure=share_impossible, why="except pixels within rounding of the edge or the margin")
    counts = Tolerance(relative=0, measure=miscount, why="such pixels may count or not")
    confidence = Tolerance(relative=0, measure=miscount, why="of any label that such a pixel may have, within one of 255")
    tolerance = {"label_map": label_map, "area": counts, "won": counts, "confidence": confidence}
    return Graph(
        name="fuse",
        module=Fuse(),
        inputs=(
            TensorSpec("logits", ("masks", logits_side, logits_side), "float32"),
            TensorSpec("pick", ("picked",), "int64"),
            TensorSpec("score", ("picked",), "float32"),
            TensorSpec("label", ("picked",), "int64"),
            TensorSpec("rows", ("height", logits_side), "float32"),
            TensorSpec("columns", ("width", logits_side), "float32"),
            TensorSpec("margin", (1,), "float32"),
        ),
        outputs=(
            TensorSpec("label_map", ("height", "width"), "uint8"),
            TensorSpec("area", ("picked",), "int64"),
            TensorSpec("won", ("picked",), "int64"),
            TensorSpec("confidence", ("height", "width"), "uint8"),
        ),
        axes={"masks": masks, "picked": masks, "height": PIXELS, "width": PIXELS},
        row_axis="picked",
        whole=True,
        sample=sample,
        reference=reference,
        tolerance=tolerance,
        # The decoder's masks are float16; the label map is computed from them in float32, like the reference.
        half=InHalf(io=frozenset({"logits"}), tolerance=tolerance),
    )


def upsampled(logits: Tensor, preprocess: Preprocess, size: tuple[int, int]) -> Tensor:
    """Resize mask logits (N, L, L) to a photograph's (height, width), in the two steps of ``Sam.postprocess_masks``, or in the
    one of ``SAM2Transforms.postprocess_masks`` and ``Sam2ImageProcessor.post_process_masks``."""
    if preprocess.resize == "squash":
        return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    frame = frame_for(preprocess, *size)
    z = F.interpolate(logits[None], frame.canvas, mode="bilinear", align_corners=False)
    z = z[..., : frame.valid[0], : frame.valid[1]]
    return F.interpolate(z, size, mode="bilinear", align_corners=False)[0]


def fused_by_sorting(z: np.ndarray, score: np.ndarray, label: np.ndarray, margin: float) -> Feeds:
    """A second implementation of `vote`: sorts the claims per pixel and finds the first of another label."""
    value = np.where(z > 0, score[:, None, None] / (1 + np.exp(-z)), 0).astype(np.float32)
    order = np.argsort(-value, axis=0, kind="stable")  # (N, H, W), the best claim first
    ranked, labels = np.take_along_axis(value, order, 0), label[order]
    runner_up = np.zeros_like(ranked[0])
    for rank in range(len(z) - 1, 0, -1):
        runner_up = np.where(labels[rank] != labels[0], ranked[rank], runner_up)
    contested = (runner_up > 0) & (ranked[0] - runner_up < np.float32(margin) * ranked[0])
    owned = (ranked[0] > 0) & ~contested
    unclaimed = 1 - (score[:, None, None] / (1 + np.exp(-z))).max(axis=0)
    return {
        "label_map": np.where(contested, VOID, np.where(owned, labels[0], 0)).astype(np.uint8),
        "area": (z > 0).sum(axis=(1, 2)),
        "won": np.bincount(order[0][owned], minlength=len(z)),
        "confidence": np.rint(255 * np.select([contested, owned], [0, ranked[0] - runner_up], unclaimed)).astype(np.uint8),
    }


def near_ties(
    z: np.ndarray, rounding: np.ndarray, score: np.ndarray, label: np.ndarray, margin: float, fused: np.ndarray
) -> Feeds:
    """The results that are as correct as ``fused`` if each mask's logits may differ by its ``rounding``; for the gate's measures.

    Args:
        z, score, label: of N masks, as for `vote`.
        rounding: (N,) in the logits' unit.
        fused: (H, W) uint8, the label map without rounding.

    Returns:
        ``label_map.options`` (M, H, W) uint8: ``fused``, and copies of it with other labels where these are possible;
        ``area.range`` and ``won.range`` (2, N) int64, ``confidence.range`` (2, H, W) float64: the lowest and highest values.
    """

    def worth(z: np.ndarray) -> np.ndarray:
        return np.where(z > 0, score[:, None, None] / (1 + np.exp(-z.astype(np.float64))), 0)

    least = worth(z - rounding[:, None, None]) * (1 - VALUE_ROUNDING)  # (N, H, W)
    most = worth(z + rounding[:, None, None]) * (1 + VALUE_ROUNDING)
    names, of_name = np.unique(label, return_inverse=True)
    least_of, most_of = (np.stack([each[of_name == n].max(axis=0) for n in range(len(names))]) for each in (least, most))
    rival_least, rival_most = _largest_of_others(least_of), _largest_of_others(most_of)  # (names, H, W)
    may_own = (most_of > 0) & (rival_least <= (1 - margin) * most_of)
    must_own = rival_most < (1 - margin) * least_of
    # A label's lowest value where a mask may claim it: at the edge a mask's value is 0 or half its score.
    lowest = np.where(most > 0, np.where(least > 0, least, score[:, None, None] / 2), np.inf)
    lowest_of = np.stack([lowest[of_name == n].min(axis=0) for n in range(len(names))])
    lowest_of = np.where(least_of > 0, least_of, lowest_of)
    may_be_contested = np.zeros(fused.shape, bool)
    for best, other in permutations(range(len(names)), 2):
        near = (most_of[other] > (1 - margin) * lowest_of[best]) & (lowest_of[other] <= most_of[best])
        may_be_contested |= near & (most_of[best] >= least_of.max(axis=0))
    options = [fused, np.where(least_of.max(axis=0) == 0, 0, fused), np.where(may_be_contested, VOID, fused)]
    options += [np.where(may_own[n], name, fused) for n, name in enumerate(names)]
    within = [(may_own[n], least_of[n] - rival_most[n], most_of[n] - rival_least[n]) for n in range(len(names))]
    within.append((may_be_contested | (fused == VOID), np.zeros(fused.shape), np.zeros(fused.shape)))
    unclaimed = [1 - (score[:, None, None] / (1 + np.exp(-z - off[:, None, None]))).max(axis=0) for off in (rounding, -rounding)]
    within.append((least_of.max(axis=0) == 0, *unclaimed))
    lowest_sure = np.min([np.where(may, low, 1) for may, low, _ in within], axis=0)
    highest_sure = np.max([np.where(may, high, 0) for may, _, high in within], axis=0)
    may_win = may_own[of_name] & (most > 0) & (most >= least_of[of_name])
    must_win = np.zeros_like(may_win)
    for n in range(len(names)):
        must_win[of_name == n] = must_own[n] & (least[of_name == n] > _largest_of_others(most[of_name == n]))
    return {
        "confidence.range": np.stack([255 * lowest_sure - 0.51, 255 * highest_sure + 0.51]),
        "label_map.options": np.stack(options).astype(np.uint8),
        "area.range": np.stack([(each > 0).sum(axis=(1, 2)) for each in (least, most)]),
        "won.range": np.stack([each.sum(axis=(1, 2)) for each in (must_win, may_win)]),
    }


def _largest_of_others(values: np.ndarray) -> np.ndarray:
    """For each of (N, ...) non-negative values, the largest of the N - 1 others; 0 for N = 1."""
    second, first = np.sort(np.concatenate([np.zeros_like(values[:1]), values]), axis=0)[-2:]
    return np.where(values == first, second, first)


def sample_masks(preprocess: Preprocess, logits_side: int, most: int, picked: int, seed: int) -> Feeds:
    """Feeds of one image with ``picked`` overlapping masks, some of the same label, among masks of other images."""
    rng = np.random.default_rng([seed, picked])
    coarse = torch.from_numpy(rng.normal(-0.3, 1, (min(picked + 2, most), 1, 6, 6))).float()
    fields = F.interpolate(coarse, (logits_side, logits_side), mode="bicubic", align_corners=False)[:, 0]
    noise = torch.from_numpy(rng.normal(0, 0.5, fields.shape)).float()
    side = preprocess.longest_px // (2 if picked <= 16 else 8)  # many masks of a large photograph need gigabytes
    # Half as high as wide, so that it fits the one tile of a TensorRT engine (`to_engine.TILE`).
    height, width = (int(length) | 1 for length in rng.integers((side // 4, side // 2), (side // 2, side)))
    frame = frame_for(preprocess, height, width)
    return {
        "logits": (8 * fields + noise).numpy(),
        "pick": np.sort(rng.permutation(len(coarse))[:picked]).astype(np.int64),
        "score": rng.uniform(0.2, 1, picked).astype(np.float32),
        "label": rng.integers(1, 5, picked),
        "rows": frame.mask_rows(logits_side),
        "columns": frame.mask_columns(logits_side),
        "margin": np.array([0.15], np.float32),
    }
