"""Trains the mini SAM on drawn scenes: ``python -m wsss.mini.train_sam --out sam.safetensors --minutes 30``.

The model takes a box, moved slightly as a detector's box is off, and gives one mask. A run that was stopped continues from
its last checkpoint. The finished weights are rounded to float16 and keep the official state-dict names.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from segment_anything.modeling import Sam
from torch import Tensor, nn

from wsss.export.mini import build_sam_mini
from wsss.mini.scenes import CLASSES, Scene, draw_scene
from wsss.mini.training import log, parameter_groups, save_checkpoint, save_weights, through_jpeg

BOX_JITTER = 0.08
"""Each edge of a training box moves by up to this share of the box's width or height."""
FAR_WEIGHT = 0.1
"""Loss weight of cells far from the box."""
IMAGES_PER_STEP = 4
LEARNING_RATE = 1.3e-3
WARM_UP_SHARE = 0.03
COARSE_PX = (240, 10)
"""Input side and patch size of the first stage: 24 x 24 tokens train twice as fast as the final 32 x 32."""
COARSE_SHARE = 0.25
FINE_RATE_SHARE = 0.6
EMA_DECAY = 0.998
REPORT_STEPS = 100
CHECKPOINT_SECONDS = 180.0
DEFAULT_MINUTES = 140.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Scenes in the model's frame, and their boxes as flat arrays."""

    pixels: Tensor
    """(B, 3, side, side) float32, RGB, normalized, zero to the right of and below the image."""
    xyxy_model: Tensor
    """(N, 4) float32, jittered boxes in pixels of the model's input."""
    image: Tensor
    """(N,) int64, the row of ``pixels`` that each box belongs to."""
    cover: Tensor
    """(N, L, L) float32, 0-1: share of each low-resolution cell that the object fills. L is four cells per patch."""
    label: Tensor
    """(B, L, L) int64, the class at each cell's center, 0 background: for the auxiliary loss."""


# ---- scenes into the model's frame ----


def jittered(rng: np.random.Generator, xyxy: np.ndarray, amount: float) -> np.ndarray:
    """(N, 4) float32 boxes with edges moved by up to ``amount`` of the box's own width or height."""
    size = np.tile(xyxy[:, 2:] - xyxy[:, :2], 2)  # (N, 4)
    moved: np.ndarray = xyxy + rng.uniform(-amount, amount, xyxy.shape) * size
    return moved.astype(np.float32)


def resized(pixels: np.ndarray, side_px: int) -> np.ndarray:
    """(h, w, C) or (h, w) uint8, longest side ``side_px``: segment_anything's ``ResizeLongestSide.apply_image``."""
    height, width = pixels.shape[:2]
    scale = side_px / max(height, width)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    result: np.ndarray = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    return result


def boxes_in_model_frame(xyxy_image: np.ndarray, size: tuple[int, int], side_px: int) -> np.ndarray:
    """(N, 4) float32 boxes scaled by the rounded sizes, as ``ResizeLongestSide.apply_boxes`` does."""
    height, width = size
    scale = side_px / max(size)
    x, y = int(width * scale + 0.5) / width, int(height * scale + 0.5) / height
    scaled: np.ndarray = xyxy_image * np.array([x, y, x, y])
    return scaled.astype(np.float32)


def batch_of_step(sam: Sam, *, seed: int, step: int) -> Batch:
    """The training batch of one step; it depends on the seed and the step alone."""
    rng = np.random.default_rng([seed, step])
    scenes: list[Scene] = []
    while len(scenes) < IMAGES_PER_STEP:
        scene = draw_scene(int(rng.integers(2**62)))
        if len(scene.labels) > int(rng.random() < 0.6):  # fewer scenes with one object: the encoder is the costly part
            scenes.append(scene)
    return _batch(sam, scenes, rng)


def _batch(sam: Sam, scenes: list[Scene], rng: np.random.Generator) -> Batch:
    side = sam.image_encoder.img_size
    cells = 4 * sam.prompt_encoder.image_embedding_size[0]
    device = sam.pixel_mean.device
    pixels, boxes, image, cover, label = [], [], [], [], []
    for row, scene in enumerate(scenes):
        photograph = np.array(through_jpeg(scene.pixels, int(rng.integers(75, 97)))) if rng.random() < 0.6 else scene.pixels
        chw = torch.from_numpy(resized(photograph, side)).permute(2, 0, 1).float()
        pixels.append(sam.preprocess(chw.to(device)))
        amount = BOX_JITTER if rng.random() < 0.8 else 0.0
        boxes.append(boxes_in_model_frame(jittered(rng, scene.xyxy_image, amount), scene.label.shape, side))
        for number in range(1, len(scene.labels) + 1):
            mask = Image.fromarray(resized((scene.instance == number).astype(np.uint8) * 255, side))
            cover.append(_cells(mask, side, cells, Image.Resampling.BOX).astype(np.float32) / 255)
            image.append(row)
        classes = Image.fromarray(scene.label).resize((chw.shape[2], chw.shape[1]), Image.Resampling.NEAREST)
        label.append(_cells(classes, side, cells, Image.Resampling.NEAREST).astype(np.int64))
    return Batch(
        pixels=torch.stack(pixels),
        xyxy_model=torch.from_numpy(np.concatenate(boxes)).to(device),
        image=torch.tensor(image, device=device),
        cover=torch.from_numpy(np.stack(cover)).to(device),
        label=torch.from_numpy(np.stack(label)).to(device),
    )


def _cells(picture: Image.Image, side_px: int, cells: int, resampling: Image.Resampling) -> np.ndarray:
    """Pad a map of the model's frame to the square and resize it to (cells, cells)."""
    square = Image.new("L", (side_px, side_px))
    square.paste(picture)
    result: np.ndarray = np.array(square.resize((cells, cells), resampling))
    return result


# ---- one step ----


def decoded(sam: Sam, embeddings: Tensor, xyxy_model: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """The single mask of every box: logits (N, L, L) and predicted IoU (N,).

    As ``MaskDecoder.predict_masks``, but for boxes of several images at once, which the official code does not support, and
    without the three multi-mask outputs.
    """
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    sparse, dense = encoder(points=None, boxes=xyxy_model, masks=None)  # (N, 2, C), (N, C, g, g)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], dim=1)
    source = embeddings[image] + dense
    hidden, keys = decoder.transformer(source, encoder.get_dense_pe().expand_as(source), tokens)
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(source.shape))  # (N, C / 8, 4 g, 4 g)
    weights = decoder.output_hypernetworks_mlps[0](hidden[:, 1])  # (N, C / 8)
    logits = torch.einsum("nc,nchw->nhw", weights, upscaled)
    return logits, decoder.iou_prediction_head(hidden[:, 0])[:, 0]


def losses(logits: Tensor, predicted_iou: Tensor, cover: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the boxes' mean IoU at low resolution.

    Cross-entropy against each cell's cover is summed per object and divided by the object's size, so that small objects
    count as much as large ones. The logits then cross zero where half a cell is covered, which is finer than the grid. Cells
    far from the box have a small weight (``near`` (N, L, L) is 1 or ``FAR_WEIGHT``), because they are many and easy. Dice as in
    V-Net (arXiv 1606.04797, section 3), squared error for the predicted IoU as in SAM (arXiv 2304.02643, appendix A).
    """
    size = cover.sum((1, 2)).clamp(min=16)
    entropy = F.binary_cross_entropy_with_logits(logits, cover, near, reduction="none").sum((1, 2)) / size
    probability = logits.sigmoid()
    dice = 1 - 2 * (probability * cover).sum((1, 2)) / (probability.square().sum((1, 2)) + cover.square().sum((1, 2)))
    with torch.no_grad():
        predicted, true = logits > 0, cover > 0.5
        iou = (predicted & true).sum((1, 2)) / (predicted | true).sum((1, 2)).clamp(min=1)
    return (entropy + dice + (predicted_iou - iou).square()).mean(), iou.mean()


def near_boxes(xyxy_model: Tensor, side_px: int, cells: int) -> Tensor:
    """(N, cells, cells) float32: 1 within each box grown by a quarter on every side, ``FAR_WEIGHT`` elsewhere."""
    center = (torch.arange(cells, device=xyxy_model.device) + 0.5) * (side_px / cells)
    low, high = xyxy_model[:, :2], xyxy_model[:, 2:]
    grow = (high - low) / 4
    inside = (center[None, :, None] > (low - grow)[:, None]) & (center[None, :, None] < (high + grow)[:, None])
    both = inside[:, None, :, 0] & inside[:, :, None, 1]  # (N, y, x)
    return torch.where(both, 1.0, FAR_WEIGHT)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then cosine decay to nearly zero, in each of the two stages; ``progress`` runs from 0 to 1."""
    peak, done = LEARNING_RATE, progress / COARSE_SHARE
    if progress >= COARSE_SHARE:
        peak, done = LEARNING_RATE * FINE_RATE_SHARE, (progress - COARSE_SHARE) / (1 - COARSE_SHARE)
    if done < WARM_UP_SHARE:
        return peak * (done / WARM_UP_SHARE + 0.01)
    return peak * (0.002 + 0.998 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def _optimizer(*modules: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(*modules, weight_decay=0.02), lr=LEARNING_RATE, betas=(0.9, 0.98))


# ---- the run ----


@dataclass(kw_only=True)
class Run:
    """The content of a checkpoint: model, optimizer, running average of the weights, and progress."""

    sam: Sam
    dense: nn.Conv2d
    """An auxiliary head that predicts the class of every low-resolution cell from the embedding. Its dense loss speeds up the
    encoder's first steps; the loss weight falls to zero and the head is not part of the result."""
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    step: int = 0
    stage_step: int = 0
    """Steps since this stage began, where the average starts again."""
    seconds: float = 0.0

    @classmethod
    def begin(cls, sam: Sam, dense: nn.Conv2d, *, step: int = 0, seconds: float = 0.0) -> Run:
        """Start a stage from these weights with a new optimizer."""
        average = {name: value.detach().clone() for name, value in sam.state_dict().items()}
        return cls(sam=sam, dense=dense, optimizer=_optimizer(sam, dense), average=average, step=step, seconds=seconds)

    @property
    def is_coarse(self) -> bool:
        """Whether this is the first stage."""
        return bool(self.sam.image_encoder.img_size == COARSE_PX[0])

    def refined(self) -> Run:
        """Start the second stage from the averaged weights of the first."""
        self.sam.load_state_dict(self.average)
        fine = on_final_grid(self.sam).to(self.sam.pixel_mean.device)
        return Run.begin(fine, self.dense, step=self.step, seconds=self.seconds)

    def restored(self, path: Path) -> Run:
        """The run stored in a checkpoint, in its stage."""
        saved = torch.load(path, map_location=self.sam.pixel_mean.device, weights_only=True)
        positions = "image_encoder.pos_embed"
        run = self if saved["average"][positions].shape == self.average[positions].shape else self.refined()
        run.sam.load_state_dict(saved["model"])
        run.dense.load_state_dict(saved["dense"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.average, run.step, run.seconds = saved["average"], saved["step"], saved["seconds"]
        run.stage_step = saved["stage_step"]
        return run

    def save(self, path: Path) -> None:
        """Write a checkpoint whole or not at all."""
        state: dict[str, object] = {"average": self.average, "step": self.step, "seconds": self.seconds}
        state["stage_step"] = self.stage_step
        for name, part in (("model", self.sam), ("dense", self.dense), ("optimizer", self.optimizer)):
            state[name] = part.state_dict()
        save_checkpoint(state, path)

    def advance(self, batch: Batch, progress: float) -> tuple[float, float, float]:
        """Make one step of the optimizer and of the average; returns both losses and the batch's low-resolution IoU."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        # bfloat16 is twice as fast on CPUs with AMX; logits and loss stay float32
        with torch.autocast(batch.pixels.device.type, torch.bfloat16):
            embeddings = self.sam.image_encoder(batch.pixels)
            logits, predicted_iou = decoded(self.sam, embeddings, batch.xyxy_model, batch.image)
            classes = F.pixel_shuffle(self.dense(embeddings), 4)  # (B, 13, L, L)
        near = near_boxes(batch.xyxy_model, batch.pixels.shape[-1], logits.shape[-1])
        loss, iou = losses(logits.float(), predicted_iou.float(), batch.cover, near)
        dense_loss = F.cross_entropy(classes.float(), batch.label)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + 3 * (1 - progress) * dense_loss)
        torch.nn.utils.clip_grad_norm_(self.sam.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.stage_step += 1
        decay = min(EMA_DECAY, self.stage_step / (self.stage_step + 10))
        with torch.no_grad():
            for name, value in self.sam.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return float(loss.detach()), float(dense_loss.detach()), float(iou)


def train(out: Path, *, minutes: float, steps: int | None, seed: int) -> Sam:
    """Train for ``steps``, or for ``minutes`` where steps is None; writes the weights to ``out`` and returns the model."""
    torch.manual_seed(seed)
    run = _fresh_run(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    progress_file = out.with_suffix(".progress.pt")
    if progress_file.exists():
        run = run.restored(progress_file)
        log(f"continues at step {run.step}, after {run.seconds / 60:.1f} min")

    begun, last_saved = time.monotonic() - run.seconds, run.seconds
    recent: deque[tuple[float, float, float]] = deque(maxlen=REPORT_STEPS)
    while (progress := run.step / steps if steps else run.seconds / 60 / minutes) < 1:
        if run.is_coarse and progress >= COARSE_SHARE:
            run = run.refined()
        recent.append(run.advance(batch_of_step(run.sam, seed=seed, step=run.step), progress))
        run.seconds = time.monotonic() - begun
        if run.step % REPORT_STEPS == 0:
            loss, dense, iou = np.mean(recent, axis=0)
            where = f"step {run.step}  {progress:.1%}  {run.seconds / 60:.1f} min"
            log(f"{where}  loss {loss:.3f}  dense {dense:.3f}  IoU {iou:.3f}")
        if run.seconds - last_saved > CHECKPOINT_SECONDS:
            run.save(progress_file)
            last_saved = run.seconds

    save_weights(run.average, out)
    progress_file.unlink(missing_ok=True)
    return load_sam_mini(out)


def _fresh_run(device: torch.device) -> Run:
    """Random weights on the coarse grid, with Fourier frequencies that float16 represents exactly."""
    sam = build_sam_mini(*COARSE_PX)
    torch.nn.init.trunc_normal_(sam.image_encoder.pos_embed, std=0.02)
    frequencies = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    frequencies.copy_(frequencies.half().float())
    dense = nn.Conv2d(sam.mask_decoder.transformer_dim, 16 * (len(CLASSES) + 1), kernel_size=1)
    return Run.begin(sam.to(device), dense.to(device))


def on_final_grid(coarse: Sam) -> Sam:
    """The same weights at ``build_sam_mini()``'s input side and patch size, with resampled kernels and position tables.

    As in FlexiViT (arXiv 2212.08013, section 3), with plain bilinear kernels scaled to keep the sum over the patch.
    """
    fine = build_sam_mini()
    state = {name: value.detach().cpu() for name, value in coarse.state_dict().items()}
    for name, target in fine.state_dict().items():
        value = state[name]
        if value.shape == target.shape:
            continue
        if name == "image_encoder.pos_embed":  # (1, g, g, C)
            maps = F.interpolate(value.permute(0, 3, 1, 2), target.shape[1:3], mode="bicubic")
            state[name] = maps.permute(0, 2, 3, 1)
        elif name == "image_encoder.patch_embed.proj.weight":  # (C, 3, p, p)
            kernels = F.interpolate(value, target.shape[2:], mode="bilinear", antialias=True)
            state[name] = kernels * (value[0, 0].numel() / target[0, 0].numel())
        else:  # relative positions along one axis, (2 g - 1, channels of a head)
            state[name] = F.interpolate(value.T[None], target.shape[0], mode="linear")[0].T
    fine.load_state_dict(state)
    return fine


def load_sam_mini(path: Path) -> Sam:
    """The mini SAM with the weights of a float16 safetensors file, in float32 on the CPU and in eval mode."""
    sam = build_sam_mini()
    sam.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return sam.eval()


@torch.no_grad()
def evaluate(sam: Sam, *, count: int = 100, jitter: float = 0.0) -> dict[str, float]:
    """Mean IoU of the single mask at original size on held-out scenes, through the official ``Sam.forward``.

    Returns:
        ``objects``, ``iou`` (mean over objects), ``iou_p10`` (its 10th percentile) and ``iou_error`` (mean absolute
        difference between predicted and true IoU).
    """
    side = sam.image_encoder.img_size
    rng = np.random.default_rng(0)
    ious: list[float] = []
    predicted_ious: list[float] = []
    for seed in range(count):
        scene = draw_scene(seed, split="held-out")
        if not len(scene.labels):
            continue
        chw = torch.from_numpy(resized(np.array(through_jpeg(scene.pixels)), side)).permute(2, 0, 1).float()
        boxes = boxes_in_model_frame(jittered(rng, scene.xyxy_image, jitter), scene.label.shape, side)
        record = {"image": chw, "boxes": torch.from_numpy(boxes), "original_size": scene.label.shape}
        result = sam([record], multimask_output=False)[0]
        masks = result["masks"][:, 0].numpy()  # (N, H, W)
        for row, mask in enumerate(masks):
            true = scene.instance == row + 1
            ious.append(float((mask & true).sum() / (mask | true).sum()))
        predicted_ious += result["iou_predictions"][:, 0].tolist()
    errors = np.abs(np.array(predicted_ious) - np.array(ious))
    return {
        "objects": float(len(ious)),
        "iou": float(np.mean(ious)),
        "iou_p10": float(np.percentile(ious, 10)),
        "iou_error": float(errors.mean()),
    }


def main() -> None:
    """Run the command line; prints the held-out scores of the rounded weights to stdout."""
    parser = argparse.ArgumentParser(prog="python -m wsss.mini.train_sam", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help=f"time to train (default {DEFAULT_MINUTES:.0f})")
    length.add_argument("--steps", type=int, help="number of steps, for a run that can be repeated exactly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.out.exists():
        log(f"{options.out} exists already; delete it to train again")
        sam = load_sam_mini(options.out)
    else:
        sam = train(options.out, minutes=options.minutes, steps=options.steps, seed=options.seed)
    for jitter in (0.0, BOX_JITTER):
        figures = "  ".join(f"{name} {value:.4g}" for name, value in evaluate(sam, jitter=jitter).items())
        print(f"box jitter {jitter:.2f}: {figures}")


if __name__ == "__main__":
    main()
