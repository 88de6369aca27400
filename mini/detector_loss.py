"""The mini detector's loss, its warm-up task and its starting values.

The detection loss is our own: the targets of transformers' loss are wrong for batches of different captions, and it gives
the two-stage box head no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from .detector_data import Captions, Pool
from .scenes import CLASSES

# ---- model ----


def prepare(model: transformers.GroundingDinoForObjectDetection) -> None:
    """Set starting values for a short training, in place.

    transformers initializes linear layers with a standard deviation of 0.02, far too small for widths of 32 to 128, and the
    fusion with a gain of 1e-4. The class logits are inner products of two layer-normed vectors: without a smaller gain and a
    negative offset they start at about +-10.
    """
    for name, module in model.named_modules():
        last = name.endswith("layers.2") and "bbox_embed" in name  # box heads start as the identity
        if isinstance(module, nn.Linear) and not last and "sampling_offsets" not in name and "attention_weights" not in name:
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    core = model.model
    embeddings = core.text_backbone.embeddings
    nn.init.normal_(embeddings.word_embeddings.weight, std=0.5)  # with smaller values the texts of the classes become alike
    nn.init.normal_(embeddings.position_embeddings.weight, std=0.1)
    nn.init.normal_(core.query_position_embeddings.weight, std=0.5)
    with torch.no_grad():
        for layer in core.encoder.layers:
            layer.fusion_layer.vision_param.fill_(0.3)
            layer.fusion_layer.text_param.fill_(0.1)
        # logit = 0.12 n.m - 0.2 * 0.2 * 96 with n and m of unit variance: about -4 +- 1, so that positives start rare, as the
        # focal loss expects. The small gain is on the text's side, because the box heads also read the image side's norm.
        text_norm = core.encoder.layers[-1].text_enhancer_layer.layer_norm_after
        text_norm.weight.fill_(0.12)
        text_norm.bias.fill_(0.2)
        for norm in (core.decoder.layer_norm, core.enc_output_norm):
            norm.bias.fill_(-0.2)


class DenseHeads(nn.Module):
    """The warm-up task: class and box of the object in each cell, read from the detector's projected features."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(width, len(CLASSES) + 1 + 4, 1) for _ in range(levels))

    def forward(self, features: Sequence[Tensor], batch: Pool) -> Tensor:
        """Loss of one batch; features: (B, C, h, w) per level, at strides 8, 16, ..."""
        device = features[0].device
        total = torch.zeros((), device=device)
        rows = torch.arange(len(batch.labels))[:, None, None]
        labels = functional.pad(batch.labels, (1, 0)).to(device)  # object 0 is the background
        boxes = functional.pad(batch.boxes, (0, 0, 1, 0)).to(device)
        for level, feature in enumerate(features):
            stride = 8 * 2**level
            output = self.heads[level](feature).permute(0, 2, 3, 1)  # (B, h, w, 17)
            height, width = output.shape[1:3]
            owner = batch.owner[:, stride // 2 :: stride, stride // 2 :: stride].to(device).long()[:, :height, :width]
            output = output[:, : owner.shape[1], : owner.shape[2]]
            cell_labels = labels[rows.to(device), owner]  # (B, h, w)
            weight = torch.ones(len(CLASSES) + 1, device=device)
            weight[0] = 0.3  # most cells are ground
            total = total + functional.cross_entropy(output[..., :-4].flatten(0, 2), cell_labels.flatten(), weight)
            inside = cell_labels > 0
            if inside.any():
                ys, xs = (torch.arange(extent, device=device) + 0.5 for extent in owner.shape[1:])
                valid = batch.valid.to(device) / stride  # (B, 2), cells
                center = torch.stack(
                    [
                        xs[None, None, :] / valid[:, 1, None, None].expand(-1, len(ys), len(xs)),
                        ys[None, :, None] / valid[:, 0, None, None].expand(-1, len(ys), len(xs)),
                    ],
                    -1,
                )
                target = boxes[rows.to(device), owner]  # (B, h, w, 4)
                shift = torch.cat([(target[..., :2] - center) * 8, torch.log(target[..., 2:].clamp(min=0.01)) + 1.5], -1)
                total = total + functional.smooth_l1_loss(output[..., -4:][inside], shift[inside], beta=0.1)
        return total


def projected_features(model: transformers.GroundingDinoForObjectDetection, pixels: Tensor, mask: Tensor) -> list[Tensor]:
    """The detector's features before its encoder, (B, 96, h, w) at strides 8 and 16."""
    maps, _ = model.model.backbone(pixels, mask)
    return [model.model.input_proj_vision[level](feature) for level, (feature, _) in enumerate(maps)]


# ---- loss ----


def varifocal(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of the varifocal loss (arXiv 2008.13367, alpha 0.75, gamma 2) over tokens of the caption.

    logits (B, Q, T); targets (B, Q, T), the IoU of a matched query's box on its words, 0 elsewhere; mask (B, T), 0 on
    padding.
    """
    logits = logits.masked_fill(mask[:, None] == 0, -20.0)
    weight = torch.where(targets > 0, targets, 0.75 * logits.detach().sigmoid() ** 2) * mask[:, None]
    return functional.binary_cross_entropy_with_logits(logits, targets, weight, reduction="sum")


@torch.no_grad()
def match_costs(logits: Tensor, boxes: Tensor, spans: Tensor, targets: Tensor) -> Tensor:
    """(Q, N) cost of matching each of N objects to each of Q queries: focal cost of its words, L1, GIoU (DETR's weights).

    logits (Q, T), boxes (Q, 4) cxcywh, spans (N, T), targets (N, 4) cxcywh.
    """
    probability = logits.sigmoid()
    gain = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    loss = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    by_class = torch.where(torch.isfinite(logits), gain - loss, 0.0) @ (spans / spans.sum(1, keepdim=True)).T
    overlap = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(targets, "cxcywh", "xyxy"))
    return 2 * by_class + 5 * torch.cdist(boxes, targets, p=1) - 2 * overlap


def one_to_many(costs: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Match each object to its ``copies`` cheapest queries; returns the queries and the object of each.

    A query that is among the cheapest of several objects is matched to the one with the lowest cost.
    """
    chosen = torch.zeros_like(costs, dtype=torch.bool)
    chosen.scatter_(0, costs.topk(min(copies, len(costs)), dim=0, largest=False).indices, True)
    best = costs.masked_fill(~chosen, math.inf).argmin(1)
    queries = chosen.any(1).nonzero()[:, 0]
    return queries, best[queries]


def layer_loss(logits: Tensor, boxes: Tensor, captions: Captions, batch: Pool, copies: int) -> Tensor:
    """Detection loss of one layer's output.

    Args:
        logits: (B, Q, T), one per token of the caption.
        boxes: (B, Q, 4) cxcywh in 0..1; not finite for a query that must not be matched.
        copies: queries per object.
    """
    logits, boxes = logits.float(), boxes.float()
    targets = torch.zeros_like(logits)
    matched: list[Tensor] = []
    true_boxes: list[Tensor] = []
    for row in range(len(logits)):
        named = captions.spans[row, batch.labels[row]]  # (5, T)
        objects = (named.sum(1) > 0).nonzero()[:, 0]
        if len(objects) == 0:
            continue
        spans, truth = named[objects], batch.boxes[row, objects]
        usable = torch.isfinite(boxes[row]).all(1)
        costs = match_costs(logits[row], boxes[row].nan_to_num(0.5, 0.5, 0.5), spans, truth)
        costs = costs.masked_fill(~usable[:, None], 1e4)
        queries, owners = one_to_many(costs, copies)
        overlap = box_iou(box_convert(boxes[row, queries].detach(), "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
        quality = overlap.gather(1, owners[:, None]).clamp(min=0.05)  # (queries, 1)
        targets[row, queries] = spans[owners] * quality
        matched.append(boxes[row, queries])
        true_boxes.append(truth[owners])
    count = max(sum(map(len, matched)), 1)
    loss = varifocal(logits, targets, captions.mask) / count
    if matched:
        found, truth = torch.cat(matched), torch.cat(true_boxes)
        overlap = generalized_box_iou(box_convert(found, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
        loss = loss + 5 * (found - truth).abs().sum() / count + 5 * (1 - overlap.diagonal()).mean()
    return loss


def detection_loss(
    model: transformers.GroundingDinoForObjectDetection, pixels: Tensor, mask: Tensor, captions: Captions, batch: Pool
) -> Tensor:
    """Loss of the two-stage proposals and of both decoder layers.

    Several queries are matched to each object in every layer, since the runtime removes duplicates by NMS. With one query per
    object (Hungarian matching), this short training left the last layer's boxes worse than the first layer's.
    """
    output = model.model(pixel_values=pixels, pixel_mask=mask, input_ids=captions.ids, attention_mask=captions.mask)
    length = captions.ids.shape[1]
    proposals = output.enc_outputs_coord_logits
    usable = torch.isfinite(proposals).all(-1, keepdim=True)
    boxes = torch.where(usable, proposals.masked_fill(~usable, 0).sigmoid(), math.nan)
    total = layer_loss(output.enc_outputs_class[..., :length], boxes, captions, batch, copies=4)
    reference = output.init_reference_points
    layers = output.intermediate_hidden_states.shape[1]
    for layer in range(layers):
        hidden = output.intermediate_hidden_states[:, layer]
        logits = hidden @ output.encoder_last_hidden_state_text.transpose(1, 2)  # (B, 30, T), as class_embed
        boxes = (model.bbox_embed[layer](hidden) + torch.special.logit(reference, eps=1e-5)).sigmoid()
        total = total + layer_loss(logits, boxes, captions, batch, copies=3)
        reference = output.intermediate_reference_points[:, layer]
    return total
