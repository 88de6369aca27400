"""Trains the CLIP of the mini bundle on views of drawn scenes.

    python -m wsss.mini.train_clip --out mini/weights/clip.safetensors --minutes 70

A view is a window of a scene squashed to 96 x 96, as in the runtime; its target is the set of classes that it shows. A rerun
continues where the last one stopped. Progress goes to stderr, one JSON line of results to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor, nn

from wsss.export.mini import build_clip_mini, clip_mini_tokenizer
from wsss.mini import scenes as drawing
from wsss.mini.scenes import BACKGROUNDS, CLASSES, DISTRACTORS, GROUNDS, JPEG_QUALITY, Scene, draw_scene
from wsss.mini.training import log, parameter_groups, save_checkpoint, save_weights, through_jpeg

if TYPE_CHECKING:
    import open_clip

TEMPLATES = ("a clean origami {}.", "a photo of a {}.", "{}")
"""Prompt templates of a name; the first is CLIP-ES's (arXiv:2212.09506)."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""RGB, on the 0-1 scale (OpenAI CLIP, clip/clip.py)."""
LEVELS = (1, 2, 3)
"""Grids of windows that the tagger uses: 1 + 4 + 9 views."""

PRESENT_SHARE, ABSENT_SHARE = 0.45, 0.10
"""A class counts as present from the first share of an object inside the view, as absent below the second; between them the
view is undecided about it."""
LEAST_VIEW_PX = 40
"""An object with fewer pixels than this in the 96 x 96 view is never counted as present."""
POOL_SCENES, FIRST_SCENES, NEW_SCENES = 1000, 300, 1
"""Number of scenes held in memory, drawn before the first step, and drawn in each step to replace the oldest."""
POOL_SINGLES, FIRST_SINGLES, NEW_SINGLES = 2000, 600, 6
"""The same for images of a single item."""
SINGLE_SHARE = 0.5
"""Share of views that show a single item; the others are windows of scenes like the tagger's."""
SCENE_TRIES = 8
"""Number of seeds reserved for each scene of the pool; the first suitable one is used."""
BATCH_VIEWS = 64
PEAK_RATE, WEIGHT_DECAY, WARMUP_STEPS = 2e-3, 0.05, 200
EMA_DECAY = 0.995
DENSE_CELLS = 6
"""Side of the auxiliary task's grid: the third stage's output for 96 pixels."""
CALIBRATION_SEED = 10**12
"""First scene of the train split that is used to choose thresholds; no training uses it or later ones."""


@dataclass(frozen=True, slots=True)
class Views:
    """A batch of training views.

    pixels: (B, 3, 96, 96) float32, normalized.
    present, undecided: (B, 12) bool, per class; never both.
    cells: (B, 6, 6) int64, class at the center of each cell, 0 is background.
    """

    pixels: Tensor
    present: Tensor
    undecided: Tensor
    cells: Tensor

    def to(self, device: torch.device) -> Views:
        """The same batch on another device."""
        return Views(*(part.to(device) for part in (self.pixels, self.present, self.undecided, self.cells)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m wsss.mini.train_clip", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="weights to write, float16 safetensors")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=70.0, help="training time, including drawing")
    length.add_argument("--steps", type=int, help="training length in steps, reproducible bit by bit on one machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes to measure on")
    options = parser.parse_args(arguments)
    train(options.out, options.minutes, options.steps, options.seed, options.scenes)


def train(out: Path, minutes: float, steps: int | None, seed: int, scenes: int) -> None:
    """Train, measure on ``scenes`` held-out scenes, and write the averaged weights to ``out``.

    Every ten minutes the present weights are written to ``out``, and everything a rerun needs to ``<out>.checkpoint``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(seed)
    run = _Run(out.with_suffix(".checkpoint"), device)
    run.resume()
    pool = ScenePool(seed, run.step)
    saved_at = time.monotonic()
    while (progress := run.step / steps if steps else run.seconds / 60 / minutes) < 1:
        started = time.monotonic()
        pool.advance(run.step)
        rng = np.random.default_rng([seed, 1, run.step])
        views = draw_views(pool, rng, single_only=progress < 0.15).to(device)
        loss = run.learn(views, progress)
        run.seconds += time.monotonic() - started
        if run.step % 100 == 0:
            log(f"step {run.step}  {run.seconds / 60:.1f} min  loss {loss:.3f}")
        if time.monotonic() - saved_at > 600:
            run.save()
            results = measure(run.average, scenes // 3)
            write_weights(run.average, out, results)
            log(f"step {run.step}  {json.dumps(results)}")
            saved_at = time.monotonic()
    run.save()
    _round_to_half(run.average)
    results = measure(run.average, scenes)
    write_weights(run.average, out, results)
    log(f"wrote {out}")
    print(json.dumps(results))


class _Run:
    """The state of a training, and its checkpoint file."""

    def __init__(self, checkpoint: Path, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.model = _initialized(build_clip_mini()).to(device)
        self.average = build_clip_mini().to(device).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.dense = nn.Conv2d(256, len(CLASSES) + 1, 1).to(device)  # on the third stage; not part of the weights
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.dense, weight_decay=WEIGHT_DECAY), lr=PEAK_RATE, betas=(0.9, 0.98)
        )
        self.prompts = prompt_ids().to(device)  # (3, 20, 16)
        self.step, self.seconds = 0, 0.0
        self._stage: list[Tensor] = []
        self.model.visual.layer3.register_forward_hook(lambda _, __, output: self._stage.append(output))

    def learn(self, views: Views, progress: float) -> float:
        """Make one optimizer step; returns the loss."""
        rate = PEAK_RATE * min(1.0, (self.step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self._stage.clear()
        image = self.model.encode_image(views.pixels.contiguous(memory_format=torch.channels_last), normalize=True)
        text = _name_features(self.model, self.prompts)  # (3, 20, 64)
        turn = self.step % (len(TEMPLATES) + 1)  # each template in turn, then their mean
        names = text[turn] if turn < len(TEMPLATES) else functional.normalize(text.mean(dim=0), dim=-1)
        scale = self.model.logit_scale.exp()
        loss = view_loss(scale * image @ names.T, views.present, views.undecided)
        loss = loss + 0.5 * functional.cross_entropy(self.dense(self._stage[0]), views.cells)
        loss = loss + 0.2 * _likeness(text[:, : len(CLASSES)])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))  # as CLIP, arXiv:2103.00020, section 2.5
        self.step += 1
        self._update_average()
        return float(loss.detach())

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        now = self.model.state_dict()
        for name, value in self.average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(now[name], 1 - decay)  # running statistics included
            else:
                value.copy_(now[name])

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "dense": self.dense.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_checkpoint(state, self.checkpoint)

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.dense.load_state_dict(state["dense"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        log(f"continues from step {self.step} of {self.checkpoint}")


# ---- the model and its loss ----


def prompt_ids() -> Tensor:
    """(3, 20, 16) int64: template, name (classes, then backgrounds), token."""
    tokenizer = clip_mini_tokenizer()
    names = (*CLASSES, *BACKGROUNDS)
    return torch.tensor([[tokenizer.encode(form.format(name)).ids for name in names] for form in TEMPLATES])


def name_embeddings(model: open_clip.CLIP, prompts: Tensor) -> Tensor:
    """(20, 64) float32, unit length: the mean over the templates for each name, as in the runtime."""
    return functional.normalize(_name_features(model, prompts).mean(dim=0), dim=-1)


def _name_features(model: open_clip.CLIP, prompts: Tensor) -> Tensor:
    features: Tensor = model.encode_text(prompts.flatten(0, 1), normalize=True)
    return features.reshape(*prompts.shape[:2], -1)  # (3, 20, 64)


def view_loss(logits: Tensor, present: Tensor, undecided: Tensor) -> Tensor:
    """Loss of a batch of views, for both ways to turn logits into probabilities.

    Args:
        logits: (B, 20) float32, classes first, then backgrounds.
        present, undecided: (B, 12) bool.

    The first term asks that a softmax over all names is spread evenly over the classes in the view, or falls on any background
    where the view shows no class. The second asks that each present class exceeds all backgrounds together, and each absent
    class does not. Undecided classes take part in neither.
    """
    count = present.shape[1]
    open_logits = torch.cat([logits[:, :count].masked_fill(undecided, -1e4), logits[:, count:]], dim=1)
    log_share = open_logits.log_softmax(dim=1)
    shown = present.sum(dim=1)
    on_classes = -(log_share[:, :count] * present).sum(dim=1) / shown.clamp(min=1)
    on_backgrounds = -log_share[:, count:].logsumexp(dim=1)
    softmax_loss = torch.where(shown > 0, on_classes, on_backgrounds).mean()
    margin = logits[:, :count] - logits[:, count:].logsumexp(dim=1, keepdim=True)
    pair_loss = functional.binary_cross_entropy_with_logits(margin, present.float(), reduction="none")
    return softmax_loss + 6.0 * pair_loss.masked_fill(undecided, 0.0).mean()


def _likeness(text: Tensor) -> Tensor:
    """Mean squared cosine between different classes; without it the text tower collapses in the first steps."""
    cosine = text @ text.transpose(1, 2)  # (3, 12, 12)
    others = ~torch.eye(cosine.shape[1], dtype=torch.bool, device=text.device)
    return cosine[:, others].square().mean()


def _initialized(model: open_clip.CLIP) -> open_clip.CLIP:
    """open_clip's initialization, with token embeddings large enough (0.5, not 0.02) to tell prompts apart."""
    nn.init.normal_(model.token_embedding.weight, std=0.5)
    nn.init.normal_(model.positional_embedding, std=0.02)
    model.visual.to(memory_format=torch.channels_last)
    return model


# ---- scenes and views ----


@dataclass(frozen=True, slots=True)
class Photograph:
    """A scene as the runtime reads it: saved as JPEG and opened again."""

    image: Image.Image
    scene: Scene
    whole_px: np.ndarray
    """(N,) int64, visible pixels of each object."""


class ScenePool:
    """The latest scenes of an endless sequence. The content depends on seed and step alone, so that a rerun sees the same."""

    def __init__(self, seed: int, step: int) -> None:
        self._first = seed * SCENE_TRIES * 1_000_000
        end, last = FIRST_SCENES + NEW_SCENES * step, FIRST_SINGLES + NEW_SINGLES * step
        self.photographs = deque(map(self._scene, range(max(0, end - POOL_SCENES), end)), maxlen=POOL_SCENES)
        self.singles = deque(map(self._single, range(max(0, last - POOL_SINGLES), last)), maxlen=POOL_SINGLES)

    def advance(self, step: int) -> None:
        """Draw the scenes that this step adds."""
        start = FIRST_SCENES + NEW_SCENES * step
        self.photographs.extend(map(self._scene, range(start, start + NEW_SCENES)))
        start = FIRST_SINGLES + NEW_SINGLES * step
        self.singles.extend(map(self._single, range(start, start + NEW_SINGLES)))

    def _scene(self, number: int) -> Photograph:
        """Every second scene shows a colored blob, because nearly all early errors were blobs taken for a class by color."""
        for attempt in range(SCENE_TRIES):
            scene = draw_scene(self._first + number * SCENE_TRIES + attempt)
            if number % 2 == 0 or "coloured blob" in scene.distractors:
                break
        return as_photograph(scene, 75 + number % 21)

    def _single(self, number: int) -> Photograph:
        return as_photograph(draw_single(self._first + number), 75 + number % 21)


def draw_single(seed: int) -> Scene:
    """A large item in a square: an object in half of the seeds, else a distractor, mostly a blob in a class's color or texture.

    Both are drawn in the same way, so that only outlines tell them apart. Without these images the image tower learns only
    colors and textures, which already give F1 0.93; with distractors alone, it learns to recognize such images.
    """
    rng = np.random.default_rng([3, seed])  # scenes.py uses the streams 0 and 1
    side_px = int(np.exp(rng.uniform(np.log(80), np.log(320))))
    pixels = drawing.draw_ground(rng, str(rng.choice(GROUNDS)), side_px, side_px)
    instance = np.zeros((side_px, side_px), np.uint8)

    def put(item: drawing.Item, reach: float) -> np.ndarray:
        height, width = item.cover.shape
        x, y = side_px / 2 + rng.uniform(-reach, reach, 2) * side_px
        left, top = int(x - width / 2), int(y - height / 2)
        drawing._paste(pixels, item, left, top)
        window, inner = drawing._overlap(pixels.shape, item.cover.shape, left, top)
        cover = np.zeros((side_px, side_px), dtype=bool)
        cover[window] = item.cover[inner] >= 0.5
        return cover

    if rng.random() < 0.3:  # something behind it
        put(drawing._distractor(rng, str(rng.choice(DISTRACTORS)), side_px * rng.uniform(0.3, 0.8)), 0.45)
    share = rng.uniform(0.25, 0.95)
    label = int(rng.integers(1, len(CLASSES) + 1)) if rng.random() < 0.5 else 0
    if label:
        instance[put(drawing.draw_object(rng, CLASSES[label - 1], side_px * share), 0.55 * (1 - share))] = 1
    else:
        kind = str(rng.choice(DISTRACTORS)) if rng.random() < 0.15 else "coloured blob"
        put(drawing._distractor(rng, kind, side_px * share), 0.55 * (1 - share))
    return Scene(
        pixels=drawing._finish(rng, pixels),
        label=instance * np.uint8(label),
        instance=instance,
        labels=np.full(1 if label else 0, label, np.int64),
        xyxy_image=np.zeros((1 if label else 0, 4), np.float32),  # not asked for
        ground="",
        distractors=(),
    )


def as_photograph(scene: Scene, quality: int = JPEG_QUALITY) -> Photograph:
    """The scene after JPEG compression."""
    return Photograph(
        through_jpeg(scene.pixels, quality), scene, np.bincount(scene.instance.ravel(), minlength=len(scene.labels) + 1)[1:]
    )


def draw_views(pool: ScenePool, rng: np.random.Generator, single_only: bool) -> Views:
    """A batch of views: single items and, unless ``single_only``, windows of scenes like the tagger's."""
    pixels: list[np.ndarray] = []
    present, undecided, cells = [], [], []
    for draw in rng.random(BATCH_VIEWS):
        single = single_only or draw < SINGLE_SHARE
        source = pool.singles if single else pool.photographs
        photograph = source[int(rng.integers(len(source)))]
        window = _window(photograph.scene, rng, level=1 if single else int(rng.choice(LEVELS, p=[0.15, 0.25, 0.6])))
        pixels.append(squash(photograph.image, window))
        shown, unclear, cell = _targets(photograph, window)
        present.append(shown)
        undecided.append(unclear)
        cells.append(cell)
    return _augmented(np.stack(pixels), np.stack(present), np.stack(undecided), np.stack(cells), rng)


def squash(image: Image.Image, window: tuple[float, float, float, float]) -> np.ndarray:
    """The window (x0, y0, x1, y1) of an RGB image as (96, 96, 3) uint8, bicubic as PIL does it."""
    return np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC, box=window))


def _window(scene: Scene, rng: np.random.Generator, level: int) -> tuple[float, float, float, float]:
    """A window at a random place, of about the size of the tagger's windows at this level."""
    height, width = scene.label.shape
    share_x, share_y = np.minimum(2 / (level + 1) * rng.uniform(0.75, 1.1, 2), 1.0)
    x, y = rng.random() * (1 - share_x) * width, rng.random() * (1 - share_y) * height
    return x, y, x + share_x * width, y + share_y * height


def _targets(photograph: Photograph, window: tuple[float, float, float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The targets of one view: present (12,) bool, undecided (12,) bool and cells (6, 6) int64."""
    scene = photograph.scene
    side = 8 * DENSE_CELLS  # a grid of 48 x 48 points is exact enough for shares
    x0, y0, x1, y1 = window
    rows = (y0 + (np.arange(side) + 0.5) * (y1 - y0) / side).astype(int)
    columns = (x0 + (np.arange(side) + 0.5) * (x1 - x0) / side).astype(int)
    points = scene.instance[rows[:, None], columns]  # (48, 48)
    objects = len(scene.labels)
    view_share = np.bincount(points.ravel(), minlength=objects + 1)[1:] / side**2
    inside = view_share * (x1 - x0) * (y1 - y0) / photograph.whole_px
    clear = (inside >= PRESENT_SHARE) & (view_share * 96**2 >= LEAST_VIEW_PX)
    unclear = ~clear & (inside >= ABSENT_SHARE)
    present = np.zeros(len(CLASSES), dtype=bool)
    undecided = np.zeros(len(CLASSES), dtype=bool)
    present[scene.labels[clear] - 1] = True
    undecided[scene.labels[unclear] - 1] = True
    return present, undecided & ~present, scene.label[rows[4::8, None], columns[4::8]]


def _augmented(
    pixels: np.ndarray, present: np.ndarray, undecided: np.ndarray, cells: np.ndarray, rng: np.random.Generator
) -> Views:
    """Flip views, and change brightness and tint slightly: larger changes of hue would change the class."""
    for axis in (1, 2):
        flipped = np.flatnonzero(rng.random(len(pixels)) < 0.5)
        pixels[flipped] = np.flip(pixels[flipped], axis)
        cells[flipped] = np.flip(cells[flipped], axis)
    gain = rng.uniform(0.85, 1.15, (len(pixels), 1)) * rng.uniform(0.96, 1.04, (len(pixels), 3))
    color = _channels_first(pixels).mul_(torch.from_numpy(gain.astype(np.float32))[:, :, None, None]).clamp_(0, 1)
    return Views(
        _normalized(color),
        torch.from_numpy(present),
        torch.from_numpy(undecided),
        torch.from_numpy(cells.astype(np.int64)),
    )


def _channels_first(pixels: np.ndarray) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)


def _normalized(color: Tensor) -> Tensor:
    return (color - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# ---- measuring ----


def view_windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The tagger's 14 windows of an image, (x0, y0, x1, y1): level k has k x k, each 2 / (k + 1) of both sides."""
    windows: list[tuple[int, int, int, int]] = []
    for level in LEVELS:
        for row in range(level):
            for column in range(level):
                y0, y1 = (round(height * start / (level + 1)) for start in (row, row + 2))
                x0, x1 = (round(width * start / (level + 1)) for start in (column, column + 2))
                windows.append((x0, y0, x1, y1) if level > 1 else (0, 0, width, height))
    return windows


@torch.no_grad()
def score_scenes(model: open_clip.CLIP, photographs: Iterable[Photograph]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tagger's scores of each scene.

    Returns:
        softmax_score (N, 12) float32 in [0, 1]: the class's largest softmax probability over all names, among the views.
        pair_score (N, 12) float32 in [0, 1]: the same against the backgrounds alone, e^c / (e^c + sum of e^b).
        truth (N, 12) bool.
    """
    device = model.logit_scale.device
    names = name_embeddings(model, prompt_ids().to(device))
    softmax_scores, pair_scores, truths = [], [], []
    for photograph in photographs:
        windows = view_windows(*photograph.scene.label.shape)
        views = np.stack([squash(photograph.image, window) for window in windows])
        pixels = _normalized(_channels_first(views)).to(device)
        logits = model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ names.T  # (14, 20)
        share, margin = logits.softmax(dim=1), logits - logits[:, len(CLASSES) :].logsumexp(dim=1, keepdim=True)
        softmax_scores.append(share[:, : len(CLASSES)].amax(dim=0).cpu().numpy())
        pair_scores.append(margin[:, : len(CLASSES)].sigmoid().amax(dim=0).cpu().numpy())
        truths.append(np.isin(np.arange(1, len(CLASSES) + 1), photograph.scene.labels))
    return np.stack(softmax_scores), np.stack(pair_scores), np.stack(truths)


def f1(present: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(12,) float64, F1 per class of (N, 12) decisions; 1 for a class that is neither present nor predicted."""
    wrong = (present != truth).sum(axis=0)
    right = 2 * (present & truth).sum(axis=0)
    return np.where(right + wrong == 0, 1.0, right / np.maximum(right + wrong, 1))


def measure(model: open_clip.CLIP, scenes: int) -> dict[str, float | list[float]]:
    """F1 on held-out scenes from seed 0, with thresholds chosen on as many calibration scenes."""
    calibration = (as_photograph(draw_scene(CALIBRATION_SEED + number)) for number in range(scenes))
    held_out = (as_photograph(draw_scene(number, split="held-out")) for number in range(scenes))
    *calibration_scores, calibration_truth = score_scenes(model, calibration)
    *scores, truth = score_scenes(model, held_out)
    results: dict[str, float | list[float]] = {}
    levels = np.linspace(0.05, 0.95, 91)
    for rule, calibration_score, score in zip(("softmax", "pair"), calibration_scores, scores, strict=True):
        by_level = np.stack([f1(calibration_score >= level, calibration_truth) for level in levels])  # (91, 12)
        # A running mean over nine levels, so that no chance peak is chosen.
        smooth = np.stack([np.convolve(np.pad(column, 4, "edge"), np.ones(9) / 9, "valid") for column in by_level.T], 1)
        shared_threshold = levels[smooth.mean(axis=1).argmax()]
        class_thresholds = levels[(smooth + 0.5 * smooth.mean(axis=1, keepdims=True)).argmax(axis=0)]
        per_class = f1(score >= shared_threshold, truth)
        results[f"{rule}_threshold"] = round(float(shared_threshold), 2)
        results[f"{rule}_macro_f1"] = round(float(per_class.mean()), 4)
        results[f"{rule}_micro_f1"] = round(float(f1((score >= shared_threshold).ravel(), truth.ravel())), 4)
        results[f"{rule}_class_f1"] = [round(float(value), 3) for value in per_class]
        results[f"{rule}_class_thresholds"] = [round(float(value), 2) for value in class_thresholds]
        results[f"{rule}_macro_f1_class_thresholds"] = round(float(f1(score >= class_thresholds, truth).mean()), 4)
    return results


# ---- weights ----


@torch.no_grad()
def _round_to_half(model: nn.Module) -> None:
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half().float())


def write_weights(model: nn.Module, out: Path, results: dict[str, float | list[float]]) -> None:
    """Write the state dict under open_clip's names, with its results as metadata."""
    save_weights(model.state_dict(), out, {"results": json.dumps(results)})


if __name__ == "__main__":
    main()
