"""Trains the mini Grounding-DINO on drawn scenes, on a CPU core or a GPU.

    python -m wsss.mini.train_detector --out mini/weights/grounding-dino.safetensors --minutes 150

A pool of scenes is drawn once and kept at the detector's resolution. Each batch takes scenes of one bucket, mirrored and
transposed at random, with a separate caption for each row. First the backbone alone learns a dense task, the class and box of
each cell: this is cheap, and a Swin starts slowly without it. Then the whole model learns detection. A rerun continues from
the checkpoint beside ``--out``.
"""

from __future__ import annotations

import argparse
import math
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
from .training import log, parameter_groups, rounded, save_checkpoint, save_weights

POOL_SCENES = 12_000
BATCH = 8
WARM_SHARE, WARM_BATCH = 0.06, 16
"""Share of the run in which the backbone alone learns the dense task, and the batch size there."""
SMALL_SHARE, SMALL_SCALE = 0.25, 0.75
"""Share of the run in which scenes are shrunk, and their scale: two updates then take the time of one."""
LEARNING_RATE, WEIGHT_DECAY, RISE_STEPS = 1e-3, 0.02, 150
EMA_DECAY = 0.998
CHECKPOINT_SECONDS = 240.0


def model_from(state: dict[str, Tensor]) -> transformers.GroundingDinoForObjectDetection:
    """The mini detector with the weights of a rounded state dict, in float32 and evaluation mode."""
    model = build_grounding_dino_mini()
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


@dataclass(slots=True)
class Run:
    """Everything a rerun needs: the networks, their optimizer, and the progress."""

    model: transformers.GroundingDinoForObjectDetection
    dense: DenseHeads
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "dense": self.dense.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_checkpoint(state, path)

    def load(self, path: Path) -> None:
        """Load a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.dense.load_state_dict(state["dense"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.step, self.seconds = state["step"], state["seconds"]

    @torch.no_grad()
    def follow(self) -> None:
        """Move the averaged weights one step towards the model's."""
        decay = min(EMA_DECAY, self.step / (self.step + 20))
        values = self.model.state_dict()
        names = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[name] for name in names], [values[name] for name in names], 1 - decay)


def start_run(device: torch.device, seed: int) -> Run:
    """A new run."""
    torch.manual_seed(seed)
    model = build_grounding_dino_mini()
    prepare(model)
    model = model.to(device).train()
    dense = DenseHeads(model.config.d_model, levels=2).to(device)
    groups = parameter_groups(model, dense, weight_decay=WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Run(model, dense, average, optimizer)


def learning_rate(progress: float, step: int) -> float:
    """Linear warm-up, then cosine decay to 1 % at ``progress`` 1."""
    return LEARNING_RATE * min(1.0, (step + 1) / RISE_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(
    run: Run, pools: dict[tuple[int, int], Pool], tokenizer: tokenizers.Tokenizer, progress: float, seed: int
) -> float:
    """Make one update; all random choices depend on the seed and the step alone. Returns the loss."""
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
    """Train to the end of the budget and write the averaged weights to ``out``; returns their quality.

    Progress is the larger share of the two budgets, so that the schedule ends with either. Only a run with ``steps`` can be
    repeated exactly.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_suffix(".progress.pt")
    run = start_run(device, seed)
    if checkpoint.exists():
        run.load(checkpoint)
        log(f"continuing {checkpoint} at step {run.step}, {run.seconds / 60:.1f} min")
    clock = time.monotonic()
    pools = draw_pool(scenes)
    log(f"drew {scenes} scenes in {time.monotonic() - clock:.0f} s")
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
            log(f"step {run.step}  {run.seconds / 60:.1f} min  {progress:.1%}  loss {np.mean(losses[-50:]):.4f}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            run.save(checkpoint)
            saved = time.monotonic()
            if progress > WARM_SHARE:
                log(f"step {run.step}  {evaluate(model_from(rounded(run.average)).to(device), 40)}")
    save_weights(run.average, out, {"format": "pt"})
    checkpoint.unlink(missing_ok=True)  # finished: another run starts from the beginning
    return evaluate(model_from(rounded(run.average)).to(device), 100)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m wsss.mini.train_detector", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mini/weights/grounding-dino.safetensors"))
    parser.add_argument("--minutes", type=float, help="time budget; the schedule ends with it")
    parser.add_argument("--steps", type=int, help="step budget, for a run that can be repeated exactly")
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
