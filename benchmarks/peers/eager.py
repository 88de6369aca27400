"""The same chain in PyTorch as users of the official modules write it: one photograph at a time, no batch, no export.

- CLIP: ``encode_image`` on the views of our tagger; the prompts are embedded once, as ours.
- Grounding-DINO: transformers' image processor, ``GroundingDinoForObjectDetection`` on the caption of all classes, a threshold
  and non-maximum suppression by torchvision. The photograph is not padded to a canvas, and BERT runs for every photograph.
- SAM: ``SamPredictor.set_image`` and ``predict_torch`` with all boxes, upsampled to the photograph.
- Fusing has no official code: the rule of `export.sam.fuse` on the upsampled logits.

All under ``torch.no_grad``, as the official code. Not under ``torch.inference_mode``, which makes the bf16 autocast of CLIP's
five views ten times as slow (torch 2.14.1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from ...batch import Boxes, Images, Photograph
from ...classes import backgrounds_for, parse_classes
from ...engines.machine import version_of
from ...errors import WeightsError
from ...export.exporting import prepare_again
from ...export.family import Feeds
from ...export.grounding_dino import family as grounding_dino
from ...export.grounding_dino.layers import inverse_sigmoid
from ...export.grounding_dino.weights import load as load_grounding_dino
from ...export.mini import build_grounding_dino_mini
from ...export.sam.family import load as load_sam
from ...export.sam.fuse import vote
from ...frame import frame_for
from ...runtime.canvas import on_canvas
from ...runtime.chain import Rules
from ...runtime.tag import embed_prompts, view_windows
from ...spec import AxisRange, Model, TensorSpec, box_thresholds
from .job import Caption, Job, caption_of, official_resize

PACKAGES = ("torch", "transformers", "open_clip_torch", "segment-anything")
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SAME_CLASS = 0.5
"""IoU from which two boxes of one class are one object, as in `Rules`."""

Encode = Callable[[Tensor], Tensor]
"""Normalized pixels (V, 3, S, S) to unit embeddings (V, D)."""


class SegmentsBoxes(Protocol):
    """SAM in one of its official forms."""

    def __call__(self, photo: Photograph, xyxy: np.ndarray) -> tuple[Tensor, Tensor]:
        """Upsampled logits (N, H, W) and predicted IoU (N,) of boxes (N, 4) in pixels of the photograph."""
        ...


class EagerChain:
    """Stages in PyTorch.

    Args:
        job: whose ``fp32`` bundle says which weights the modules have.
        encode, detector, segment: the models; see `official_chain`.
        autocast: run them under ``torch.autocast("cpu", torch.bfloat16)``.
    """

    batch = 1

    def __init__(
        self, job: Job, encode: Encode, prompts: Tensor, detector: EagerDetector, segment: SegmentsBoxes, *, autocast: bool
    ) -> None:
        self._tagger = EagerTagger(job.model("clip"), encode, prompts)
        self._detector, self._segment = detector, segment
        self._precision = partial(torch.autocast, "cpu", torch.bfloat16) if autocast else contextlib.nullcontext
        self.about: dict[str, Any] = {
            "precision": "autocast to bf16" if autocast else "fp32",
            "threads": torch.get_num_threads(),
            "versions": {name: version_of(name) for name in PACKAGES},
        }

    @torch.no_grad()
    def tag(self, photos: Images) -> object:
        """Score all classes in all views."""
        with self._precision():
            return self._tagger(photos[0])

    @torch.no_grad()
    def detect(self, photos: Images, wanted: np.ndarray) -> object:
        """Find boxes of all classes."""
        with self._precision():
            return self._detector(photos[0])

    @torch.no_grad()
    def segment(self, photos: Images, boxes: Boxes) -> object:
        """A mask of each box, at the photograph's size."""
        with self._precision():
            return self._segment(photos[0], boxes.xyxy_image)

    @torch.no_grad()
    def fuse(self, photos: Images, boxes: Boxes, masks: tuple[Tensor, Tensor]) -> list[np.ndarray]:
        """Label maps."""
        logits, quality = masks
        score = torch.from_numpy(boxes.score) * quality.float().clip(1e-3, 1)
        return [vote(logits.float(), score, torch.from_numpy(boxes.label), torch.tensor([Rules.margin]))[0].numpy()]

    def embeddings(self, tagged: Any) -> np.ndarray:
        """Of each view."""
        values: np.ndarray = tagged.float().numpy()[None]
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    def scores(self, detected: Any) -> np.ndarray:
        """The best score of each class."""
        best: np.ndarray = detected.float().numpy().max(axis=0)[None]
        return best

    @torch.no_grad()
    def scores_on_canvas(self, photo: Photograph) -> np.ndarray:
        """As ``scores``, of the official module on our input: padded to the canvas, with the margin of the official code."""
        return self._detector.on_canvas(photo).float().numpy().max(axis=0)[None]


class EagerTagger:
    """CLIP on the views of a photograph."""

    def __init__(self, clip: Model, encode: Encode, prompts: Tensor) -> None:
        preprocess, settings = clip.manifest.preprocess, clip.manifest.settings
        self._encode, self._prompts = encode, prompts
        self._side, self._filter = preprocess.canvases[0], FILTERS[preprocess.filter]
        self._levels = tuple(int(level) for level in settings["views"])
        self._scale = float(settings["logit_scale"])
        mean, std = ([value / 255 for value in values] for values in (preprocess.mean, preprocess.std))
        self._transform = torchvision.transforms.Compose(
            [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean, std)]
        )

    def __call__(self, photo: Photograph) -> Tensor:
        image = Image.fromarray(photo.pixels)
        windows = view_windows(*photo.shape, self._levels)
        crops = (image.crop((x0, y0, x1, y1)) for y0, y1, x0, x1 in windows)
        pixels = torch.stack([self._transform(crop.resize(self._side[::-1], self._filter)) for crop in crops])
        embedding = self._encode(pixels)
        (self._scale * embedding.float() @ self._prompts.T).softmax(dim=-1).amax(dim=0)
        return embedding


class EagerDetector:
    """``GroundingDinoForObjectDetection`` on one photograph and the caption of all classes."""

    def __init__(self, dino: Model, model: Any, caption: Caption) -> None:
        from transformers import GroundingDinoImageProcessor

        self.model, self._caption, self._dino = model, caption, dino
        limits = official_resize(dino)
        size = {"shortest_edge": limits.short_px, "longest_edge": limits.longest_px}
        self._processor = GroundingDinoImageProcessor(size=size)
        rule, thresholds = box_thresholds(dino.manifest.settings)
        self._threshold = thresholds[rule]
        self._tokens = torch.tensor([caption.tokens])

    def __call__(self, photo: Photograph) -> Tensor:
        inputs = self._processor(images=photo.pixels, return_tensors="pt")
        out = self.model(
            pixel_values=inputs["pixel_values"],
            pixel_mask=inputs["pixel_mask"],
            input_ids=self._tokens,
            attention_mask=torch.ones_like(self._tokens),
        )
        scores = self._scores(out.logits[0].float())
        best, label = scores.max(dim=1)
        kept = best >= self._threshold
        xyxy = torchvision.ops.box_convert(out.pred_boxes[0].float()[kept], "cxcywh", "xyxy")
        xyxy = xyxy * torch.tensor([*photo.shape[::-1], *photo.shape[::-1]])
        torchvision.ops.batched_nms(xyxy, best[kept], label[kept], SAME_CLASS)
        return scores

    def on_canvas(self, photo: Photograph) -> Tensor:
        """The scores of the module on a photograph that is padded as for our graph, see `official_detections`."""
        from unittest import mock

        limits = grounding_dino.MINI if self._dino.manifest.variant == "mini" else grounding_dino.FULL
        preprocess = self._dino.manifest.preprocess
        frame = frame_for(preprocess, *photo.shape)
        feeds: Feeds = {
            "pixels": on_canvas(photo.pixels, frame, preprocess.filter)[None],
            "size": np.array([frame.valid], np.int64),
        }
        pixels, mask = grounding_dino.official_pixels(feeds)
        margin = partial(_logit, margin=limits.margin[0])
        with mock.patch("torch.special.logit", margin):
            out = self.model(
                pixel_values=pixels, pixel_mask=mask, input_ids=self._tokens, attention_mask=torch.ones_like(self._tokens)
            )
        return self._scores(out.logits[0].float())

    def _scores(self, logits: Tensor) -> Tensor:
        """(Q, C) float32, as `Caption.scores`."""
        probability = logits.sigmoid()
        score = torch.zeros(len(logits), max(label for label, _, _ in self._caption.spans))
        for label, start, stop in self._caption.spans:
            score[:, label - 1] = torch.maximum(score[:, label - 1], probability[:, start:stop].mean(dim=1))
        return score


def _logit(values: Tensor, eps: float, *, margin: float) -> Tensor:
    return inverse_sigmoid(values, margin)


class OfficialSam:
    """``SamPredictor`` with all boxes of a photograph in one call."""

    def __init__(self, sam: Any) -> None:
        from segment_anything import SamPredictor

        self._predictor = SamPredictor(sam)

    def __call__(self, photo: Photograph, xyxy: np.ndarray) -> tuple[Tensor, Tensor]:
        self._predictor.set_image(photo.pixels)
        boxes = self._predictor.transform.apply_boxes_torch(torch.from_numpy(xyxy), photo.shape)
        logits, quality, _ = self._predictor.predict_torch(
            point_coords=None, point_labels=None, boxes=boxes, multimask_output=False, return_logits=True
        )
        return logits[:, 0], quality[:, 0]


def official_chain(job: Job, *, autocast: bool = False, compiled: bool = False) -> EagerChain:
    """The chain of open_clip, transformers' Grounding-DINO and segment_anything.

    Args:
        compiled: by ``torch.compile``: both image towers and the detector. The first call compiles.
    """
    clip, detector, sam = load_clip(job.model("clip")), open_detector(job), _same(load_sam, job.model("sam"))
    prompts = prompts_of(job, clip)
    clip.transformer = None  # the text tower; prompts are embedded once
    encode = partial(clip.encode_image, normalize=True)
    if compiled:
        clip.visual, sam.image_encoder = torch.compile(clip.visual), torch.compile(sam.image_encoder)
        detector.model = torch.compile(detector.model)
    return EagerChain(job, encode, prompts, detector, OfficialSam(sam), autocast=autocast)


def load_clip(clip: Model) -> Any:
    """open_clip's model with the weights of an export."""
    return prepare_again(clip.manifest).graphs[0]().module.model


def load_official_sam(sam: Model) -> Any:
    """segment_anything's model with the weights of an export."""
    return _same(load_sam, sam)


def open_detector(job: Job) -> EagerDetector:
    """The official detector with the weights of an export."""
    dino = job.model("grounding-dino")

    def load(variant: str, weights: str) -> tuple[Any, Mapping[str, str]]:
        build = build_grounding_dino_mini if variant == "mini" else partial(grounding_dino.build_official, variant)
        return load_grounding_dino(build, variant, weights)[:2]

    return EagerDetector(dino, _same(load, dino), caption_of(dino, job.classes))


def _same(load: Callable[[str, str], tuple[Any, Mapping[str, str]]], model: Model) -> Any:
    """The module with the weights of an export. Raises WeightsError when they are other ones by now."""
    module, record = load(model.manifest.variant, model.manifest.weights["source"])
    if record["sha256"] != model.manifest.weights["sha256"]:
        raise WeightsError(f"{model.manifest.weights['source']}: not the weights that {model.folder} was exported from")
    return module.eval().requires_grad_(False)


def prompts_of(job: Job, clip: Any) -> Tensor:
    """(C + backgrounds, D) float32: the embeddings that our tagger computes, by open_clip's text tower."""
    model, classes = job.model("clip"), parse_classes(job.classes)
    names = (*backgrounds_for(classes, tuple(model.manifest.settings["backgrounds"])), *classes.negatives)
    prompts: Sequence[tuple[str, ...]] = [*classes.prompts, *((name,) for name in names)]
    return torch.from_numpy(embed_prompts(model, _TextTower(clip), list(prompts)))


class _TextTower:
    """open_clip's ``encode_text`` as an engine."""

    inputs: Mapping[str, TensorSpec] = {}
    outputs: Mapping[str, TensorSpec] = {}
    axes: Mapping[str, AxisRange] = {"batch": AxisRange(1, 32, 64)}

    def __init__(self, clip: Any) -> None:
        self._clip = clip

    @torch.no_grad()
    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"embedding": self._clip.encode_text(torch.from_numpy(feeds["tokens"]), normalize=True).numpy()}
