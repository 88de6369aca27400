"""SAM 3 (Meta, 2025) from transformers' ``Sam3Model``: photographs and noun phrases to instances, in place of a detector and SAM.

Graphs: ``vision`` (a photograph's features), ``text`` (a phrase's), ``detector`` (rows of an image and a phrase to scores and
boxes), ``outline`` (masks of the queries that were chosen), ``fuse``. The features stay on the device.

Settings in the manifest:

``context_length``, ``pad``, ``end``
    Tokens of a phrase, start and end included, and the ids of the padding and of the end.
``queries``
    Boxes for each phrase of a photograph.
``box_threshold``
    Lowest score, the product of a query's probability and the phrase's presence: 0.5, as ``Sam3Processor`` of the publisher
    (sam3/model/sam3_image_processor.py). ``post_process_instance_segmentation`` of transformers has 0.3.
``logits_side``
    Side of the mask logits. They are resized to the photograph as logits, as the publisher does; transformers resizes
    probabilities.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ...errors import UsageError
from ...spec import AxisRange, Preprocess
from ..family import Family, Options, Prepared
from ..resize import resize_graphs
from ..sam import fuse
from ..sam.decoder import MASKS, images_per_call
from .graphs import detector_graph, outline_graph, text_graph, vision_graph
from .vision import MEAN, STD, grid_of
from .weights import CONFIGS, MINI, NAME, load, tokenizer_of

BATCHES = {MINI: AxisRange(1, 4, 8)}
"""Images per call of the vision graph, if not 1 to 4."""
THRESHOLD = 0.5


def prepare(variant: str, weights: str, options: Options) -> Prepared:
    """SAM 3 ready to be traced.

    Args:
        variant: ``sam3``, or ``sam3_mini``, which has random weights only.
        weights: a safetensors file of ``facebook/sam3`` in transformers' names, or its folder, or ``random:SEED``.
        options: ``batch`` is the range of images per call.

    Raises:
        UsageError: an unknown variant, or sizes, which SAM 3 does not support.
        WeightsError: a checkpoint that is missing, damaged or of another model.
    """
    if variant not in CONFIGS:
        raise UsageError(f"--variant: expected one of {', '.join(CONFIGS)}, got {variant!r}")
    if options.sizes:
        raise UsageError("--size: SAM 3 has one fixed input size and takes no others", hint="leave --size out")
    model, record = load(variant, weights)
    batch = options.batch or BATCHES.get(variant, AxisRange(1, 2, 4))
    images = images_per_call(batch) if variant == MINI else batch
    grid, side = grid_of(model), model.config.vision_config.backbone_config.image_size
    context = model.config.text_config.max_position_embeddings
    tokenizer = tokenizer_of(variant, context)
    preprocess = Preprocess(
        resize="squash",
        longest_px=side,
        filter="bilinear",
        canvases=((side, side),),
        mean=MEAN,
        std=STD,
        source="sam3/model/sam3_image_processor.py, transformers image_processing_sam3.py",
    )
    return Prepared(
        variant=variant,
        graphs=(
            partial(text_graph, model),
            partial(vision_graph, model, batch),
            partial(detector_graph, model, images),
            partial(outline_graph, model, images),
            partial(fuse.fuse_graph, preprocess, logits_side=4 * grid, masks=MASKS),
            *(resize_graphs(preprocess) if options.for_tensorrt else ()),
        ),
        preprocess=preprocess,
        settings={
            "context_length": context,
            "pad": 0,
            "end": int(np.array(tokenizer.encode("a").ids).max()),  # CLIP's end is its last id
            "queries": model.config.detr_decoder_config.num_queries,
            "box_threshold": THRESHOLD,
            "logits_side": 4 * grid,
        },
        tokenizer=tokenizer,
        weights=record,
    )


FAMILY = Family(name="sam3", variants=tuple(CONFIGS), default="sam3", prepare=prepare, official=lambda variant: NAME)
