"""Trains the mini Grounding-DINO on drawn scenes, on a CPU core or a GPU.

    python -m wsss.mini.train_detector --out mini/weights/grounding-dino.safetensors --minutes 150

A pool of scenes is drawn once and kept at the detector's resolution; each batch takes scenes of one bucket, mirrored and
transposed at random, with a caption of its own per row. First the backbone alone learns a dense task (class and box of
each cell: cheap, and a Swin starts slowly otherwise), then the whole model learns detection. A rerun continues from the
checkpoint beside ``--out``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from ..export.mini import build_grounding_dino_mini, grounding_dino_mini_tokenizer
from .detector_data import Pool, draw_pool, drawn_batch, drawn_caption, encoded_captions, moved, normalized, shrunk
from .detector_loss import DenseHeads, detection_loss, prepare, projected_features
from .detector_quality import Quality, evaluate

POOL_SCENES = 12_000
BATCH = 8
WARM_SHARE, WARM_BATCH = 0.06, 16
"""Share of the run in which the backbone alone learns the dense task, and its batch."""
SMALL_SHARE, SMALL_SCALE = 0.25, 0.75
"""Share of the run in which scenes are shrunk, and to what: two updates for the price of one."""
LEARNING_RATE, WEIGHT_DECAY, RISE_STEPS = 1e-3, 0.02, 150
EMA_DECAY = 0.998
CHECKPOINT_SECONDS = 240.0


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it is shipped: float16, each tensor its own; integer buffers keep their type."""
    return {name: (value.half() if value.is_floating_point() else value).contiguous().clone() for name, value in state.items()}


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Writes a rounded state dict as safetensors, atomically."""
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file(rounded(state), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, path)


def model_from(state: dict[str, Tensor]) -> transformers.GroundingDinoForObjectDetection:
    """The mini detector with the weights of a rounded state dict, in float32 and evaluation mode."""
    model = build_grounding_dino_mini()
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(slots=True)
class Run:
    """All that a rerun needs: the networks, their optimizer, and how far it is."""

    model: transformers.GroundingDinoForObjectDetection
    dense: DenseHeads
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Writes the checkpoint, atomically."""
        partial = path.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "dense": self.dense.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.dense.load_state_dict(state["dense"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.step, self.seconds = state["step"], state["seconds"]

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the averaged weights one step towards the model's."""
        decay = min(EMA_DECAY, self.step / (self.step + 20))
        values = self.model.state_dict()
        names = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[name] for name in names], [values[name] for name in names], 1 - decay)


def start_run(device: torch.device, seed: int) -> Run:
    """A fresh run."""
    torch.manual_seed(seed)
    model = build_grounding_dino_mini()
    prepare(model)
    model = model.to(device).train()
    dense = DenseHeads(model.config.d_model, levels=2).to(device)
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for _, parameter in [*model.named_parameters(), *dense.named_parameters()]:
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Run(model, dense, average, optimizer)


def learning_rate(progress: float, step: int) -> float:
    """Linear rise, then half a cosine down to 1 % at ``progress`` 1."""
    return LEARNING_RATE * min(1.0, (step + 1) / RISE_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(
    run: Run, pools: dict[tuple[int, int], Pool], tokenizer: tokenizers.Tokenizer, progress: float, seed: int
) -> float:
    """One update; everything random follows from the seed and the step. Returns the loss."""
    device = next(run.model.parameters()).device
    rng = np.random.default_rng([seed, run.step])
    warming = progress < WARM_SHARE
    batch = drawn_batch(pools, WARM_BATCH if warming else BATCH, rng)
    if progress < SMALL_SHARE:
        batch = shrunk(batch, SMALL_SCALE)
    pixels, mask = normalized(batch.pixels.to(device), batch.valid.to(device))
    if warming:
        loss = run.dense(projected_features(run.model, pixels, mask), batch)
    else:
        captions = moved(encoded_captions([drawn_caption(row, rng) for row in batch.labels], tokenizer), device)
        batch.labels, batch.boxes = batch.labels.to(device), batch.boxes.to(device)
        loss = detection_loss(run.model, pixels, mask, captions, batch)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(progress, run.step)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.step += 1
    run.follow()
    return float(loss)


def train(out: Path, *, minutes: float | None, steps: int | None, seed: int, scenes: int, device: torch.device) -> Quality:
    """Trains to the end of the budget and writes the averaged weights to ``out``; returns their quality.

    Progress is the larger of the two budgets' shares, so that the schedule ends with either. Only ``steps`` makes two
    runs equal.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_suffix(".progress.pt")
    run = start_run(device, seed)
    if checkpoint.exists():
        run.load(checkpoint)
        _log(f"continuing {checkpoint} at step {run.step}, {run.seconds / 60:.1f} min")
    clock = time.monotonic()
    pools = draw_pool(scenes)
    _log(f"drew {scenes} scenes in {time.monotonic() - clock:.0f} s")
    tokenizer = grounding_dino_mini_tokenizer()
    losses: list[float] = []
    clock = saved = time.monotonic()
    earlier = run.seconds
    while True:
        shares = [run.seconds / (60 * minutes)] if minutes else []
        shares += [run.step / steps] if steps else []
        progress = max(shares)
        if progress >= 1:
            break
        losses.append(train_step(run, pools, tokenizer, progress, seed))
        run.seconds = earlier + time.monotonic() - clock
        if run.step % 50 == 0:
            _log(f"step {run.step}  {run.seconds / 60:.1f} min  {progress:.1%}  loss {np.mean(losses[-50:]):.4f}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            run.save(checkpoint)
            saved = time.monotonic()
            if progress > WARM_SHARE:
                _log(f"step {run.step}  {evaluate(model_from(rounded(run.average)).to(device), 40)}")
    save_weights(run.average, out)
    checkpoint.unlink(missing_ok=True)  # done: another run starts anew
    return evaluate(model_from(rounded(run.average)).to(device), 100)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsss.mini.train_detector", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mini/weights/grounding-dino.safetensors"))
    parser.add_argument("--minutes", type=float, help="time budget; the schedule ends with it")
    parser.add_argument("--steps", type=int, help="step budget; makes a run repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=POOL_SCENES, help="scenes in the pool, about 0.16 MB of memory each")
    parser.add_argument("--evaluate", action="store_true", help="only measure the weights in --out, on 100 held-out scenes")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if options.evaluate:
        quality = evaluate(model_from(safetensors.torch.load_file(options.out)).to(device), 100)
    else:
        budget = options.minutes if options.minutes or options.steps else 60.0
        quality = train(options.out, minutes=budget, steps=options.steps, seed=options.seed, scenes=options.scenes, device=device)
    print(quality)


if __name__ == "__main__":
    main()
