"""CLIP (arXiv:2103.00020) from open_clip: an image graph and a text graph with a common embedding space.

``image``: ``pixels`` uint8 (batch, S, S, 3) RGB, squashed on the host, to ``embedding`` float32 (batch, D) of unit length.
``text``: ``tokens`` int64 (batch, C), to ``embedding`` float32 (batch, D) of unit length.

Settings in the manifest:

``logit_scale``, ``logit_bias``
    A logit is ``logit_scale * image . text + logit_bias``. The scale is the exponential of the trained parameter.
``context_length``, ``pad``, ``start``, ``end``
    C, and the ids of the padding, start and end tokens; -1 where the tokenizer has none.
``templates``
    A name's embedding is the mean over these prompts, normalized again.
``backgrounds``
    Names for "none of the classes"; those that collide with a class of the run are left out.
``views``
    Levels of a grid: level k has k x k evenly spaced windows, each covering 2 / (k + 1) of both sides. A class is in an
    image if it is in any view: the official center crop would lose objects at the border.
``rule``, ``threshold``
    How a view scores a class, see `runtime.tag`: ``softmax`` over all classes and backgrounds; ``background``, each class only
    against the backgrounds; or ``sigmoid``, each by itself, where the model was trained so. A class is present if its score
    reaches the threshold in any view.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...errors import UsageError, WeightsError
from ...spec import AxisRange, Preprocess, TensorSpec
from .. import weights as checkpoints
from ..family import DISTINCT, Family, Feeds, Graph, InHalf, Options, Prepared, Tolerance
from ..precision.lowering import Fp32
from ..resize import PARTS, resize_graphs
from ..rewrites import normalize_in_fp32
from ..verify import photograph
from . import weights as clip_weights
from .tokenizer import special_ids, tokenizer_from_open_clip

if TYPE_CHECKING:
    import open_clip

VARIANTS = (
    *("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"),
    *("ViT-B-16-SigLIP2", "ViT-SO400M-16-SigLIP2-384", "PE-Core-B-16", "PE-Core-L-14-336"),
    *("MobileCLIP2-S0", "MobileCLIP2-S2", "MobileCLIP2-B", "MobileCLIP2-L-14", "mini"),
)
TEMPLATES = ("a clean origami {}.",)
"""The prompt of CLIP-ES (arXiv:2212.09506; generate_cams_voc12.py), for classes and backgrounds alike."""
BACKGROUNDS = (
    *("ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway", "railroad"),
    *("keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley", "bridge", "sign"),
)
"""``BACKGROUND_CATEGORY`` of CLIP-ES, clip_text.py (github.com/linyq2117/CLIP-ES, 78e0198)."""
VIEWS = (1, 2)
THRESHOLD = 0.3
"""Below one half, so that two classes in one view can both pass. Not calibrated with official weights."""
SIGMOID_TEMPLATES = ("This is a photo of {}.",)
"""The prompt of SigLIP's zero-shot pipeline (transformers, model documentation of SigLIP 2)."""
SIGMOID_THRESHOLD = 0.1
"""SigLIP's probability of a pair is low even where it is right. Not calibrated with official weights."""
MINI_TEMPLATES, MINI_VIEWS = ("a clean origami {}.", "a photo of a {}.", "{}"), (1, 2, 3)
"""The templates and views of mini/train_clip.py."""
TOKENIZER = "tokenizer.json"
"""Published beside weights whose tokenizer is not CLIP's own."""
TEXT_BATCH = AxisRange(1, 32, 64)
TOLERANCE = Tolerance(
    relative=3e-5,
    why="unit vectors, cosine >= 1 - 5e-10: float32 rounding gives 1e-6 (ViT-B/16), a mean rounded to whole numbers 9e-5",
)
HALF_TOLERANCE = Tolerance(relative=0.0316, why="unit vectors: cosine >= 0.9995")


def prepare(variant: str, weights_name: str, options: Options) -> Prepared:
    """A CLIP ready for export.

    Args:
        variant: ``mini``, or any name of ``open_clip.list_models()``.
        weights_name: a file or folder in open_clip's format, a pretrained tag of the variant, ``random:SEED``; for
            ``mini`` also ``mini``, the trained weights in the package. A tag whose weights were trained with QuickGELU
            (``openai``) selects the ``-quickgelu`` variant. For a file, the ``open_clip_config.json`` beside it does; without
            one, give the ``-quickgelu`` variant.
        options: ``batch`` is the range of images, and of prompts, per call; ``sizes`` cannot be changed.

    Raises:
        UsageError: no such variant, or a size that is not the model's.
        WeightsError: weights that are missing, damaged or of another architecture, or a tokenizer that needs torch.
    """
    import open_clip

    loaded, tokenizer, settings = _mini(weights_name) if variant == "mini" else _official(variant, weights_name)
    model = cast("open_clip.CLIP", loaded.model)
    height, width = _image_size(model)
    if options.sizes and set(options.sizes) != {(height, width)}:
        raise UsageError(f"--size: CLIP {variant} only takes {height}x{width}", hint="leave --size out")
    recipe = loaded.recipe
    bias = model.logit_bias
    preprocess = Preprocess(
        resize="squash",
        longest_px=max(height, width),
        filter=cast("Any", recipe.interpolation),
        canvases=((height, width),),
        mean=_on_255(recipe.mean),
        std=_on_255(recipe.std),
        source=f"open_clip {open_clip.__version__}, pretrained.py; squashed instead of center-cropped",
    )
    return Prepared(
        variant=loaded.variant,
        graphs=(
            partial(image_graph, model, recipe, options.batch or image_batch(model)),
            partial(text_graph, model, tokenizer, options.batch or TEXT_BATCH),
            *(resize_graphs(preprocess, PARTS) if options.for_tensorrt else ()),
        ),
        preprocess=preprocess,
        settings={
            "logit_scale": float(model.logit_scale.detach().exp()),
            "logit_bias": 0.0 if bias is None else float(bias.detach()),
            **settings,
        },
        tokenizer=tokenizer,
        weights=loaded.record,
    )


class ImageTower(nn.Module):
    """``encode_image`` of raw pixels, with unit length; the pixels are normalized in the graph."""

    def __init__(self, model: open_clip.CLIP, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Branches of a block that are one convolution (MobileCLIP's) are added up; the reference keeps them apart.
        branched = any(hasattr(module, "reparameterize") for module in model.modules())
        self.model = reparameterize_model(model).eval() if branched else model
        self.normalize = normalize_in_fp32(mean, std)
        self.unit = Fp32(partial(F.normalize, dim=-1), why="a sum of squares, and embeddings are compared in float32")

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 to (B, D) float32."""
        embedding: Tensor = self.unit(self.model.encode_image(self.normalize(pixels).permute(0, 3, 1, 2)))
        return embedding


class TextTower(nn.Module):
    """``encode_text``, with unit length."""

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.model = model
        self.unit = Fp32(partial(F.normalize, dim=-1), why="a sum of squares, and embeddings are compared in float32")

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, C) int64 to (B, D) float32."""
        embedding: Tensor = self.unit(self.model.encode_text(tokens))
        return embedding


def image_graph(model: open_clip.CLIP, recipe: clip_weights.Recipe, batch: AxisRange) -> Graph:
    """Graph ``image``. Reference: open_clip on torchvision's ToTensor and Normalize of the same pixels."""
    from torchvision.transforms import Compose, Normalize, ToTensor

    height, width = _image_size(model)
    official = Compose([ToTensor(), Normalize(recipe.mean, recipe.std)])

    def sample(rows: int, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        return {"pixels": np.stack([photograph(rng, height, width) for _ in range(rows)])}

    @torch.no_grad()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        return {"embedding": model.encode_image(official(feeds["pixels"][0])[None], normalize=True).numpy()}

    tower = ImageTower(model, _on_255(recipe.mean), _on_255(recipe.std))
    pixels = TensorSpec("pixels", ("batch", height, width, 3), "uint8")
    return _tower_graph("image", tower, pixels, batch, sample, reference)


def text_graph(model: open_clip.CLIP, tokenizer: Tokenizer, batch: AxisRange) -> Graph:
    """Graph ``text``. Its samples are prompts from one word to more than the context length."""
    context = len(tokenizer.encode("").ids)

    def sample(rows: int, seed: int) -> Feeds:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, context, rows)
        lengths[:3] = (1, context, 3)[: min(rows, 3)]
        prompts = [TEMPLATES[0].format(" ".join(rng.choice(BACKGROUNDS, length))) for length in lengths]
        return {"tokens": np.array([tokenizer.encode(prompt).ids for prompt in prompts], dtype=np.int64)}

    @torch.no_grad()
    def reference(feeds: Feeds, _: Feeds) -> Feeds:
        return {"embedding": model.encode_text(torch.from_numpy(feeds["tokens"]), normalize=True).numpy()}

    return _tower_graph("text", TextTower(model), TensorSpec("tokens", ("batch", context), "int64"), batch, sample, reference)


def _tower_graph(
    name: str,
    tower: ImageTower | TextTower,
    tensor: TensorSpec,
    batch: AxisRange,
    sample: Callable[[int, int], Feeds],
    reference: Callable[[Feeds, Feeds], Feeds],
) -> Graph:
    return Graph(
        name=name,
        module=tower.eval(),
        inputs=(tensor,),
        outputs=(TensorSpec("embedding", ("batch", _embedding_size(tower.model)), "float32"),),
        axes={"batch": batch},
        row_axis="batch",
        sample=sample,
        reference=reference,
        distinct=DISTINCT,
        tolerance={"embedding": TOLERANCE},
        half=InHalf(tolerance={"embedding": HALF_TOLERANCE}),
    )


def image_batch(model: open_clip.CLIP) -> AxisRange:
    """Range of images per call, smaller for larger towers: ViT-B up to 64, ViT-L/14 16, ViT-L/14@336 8.

    The cost is estimated as parameters times 14-pixel patches, the multiply-adds of a ViT.
    """
    height, width = _image_size(model)
    cost = sum(parameter.numel() for parameter in model.visual.parameters()) * height * width / 14**2
    if cost <= 30e9:
        return AxisRange(1, 16, 64)
    return AxisRange(1, 8, 16) if cost <= 100e9 else AxisRange(1, 4, 8)


def _official(variant: str, weights_name: str) -> tuple[clip_weights.Loaded, Tokenizer, Mapping[str, Any]]:
    """A model of open_clip, its tokenizer and its settings."""
    loaded = clip_weights.load(variant, weights_name)
    tokenizer = _official_tokenizer(loaded.variant, Path(weights_name).expanduser())
    is_sigmoid = getattr(loaded.model, "logit_bias", None) is not None
    settings = {
        "context_length": tokenizer.context_length,
        **special_ids(tokenizer),
        "templates": list(SIGMOID_TEMPLATES if is_sigmoid else TEMPLATES),
        "backgrounds": [] if is_sigmoid else list(BACKGROUNDS),
        "views": list(VIEWS),
        "rule": "sigmoid" if is_sigmoid else "softmax",
        "threshold": SIGMOID_THRESHOLD if is_sigmoid else THRESHOLD,
    }
    return loaded, tokenizer_from_open_clip(tokenizer, where=f"--variant {variant}"), settings


def _mini(weights_name: str) -> tuple[clip_weights.Loaded, Tokenizer, Mapping[str, Any]]:
    """The CLIP of the drawn scenes, its tokenizer and its settings; trained weights contain their measured threshold."""
    from ...mini.scenes import BACKGROUNDS as DRAWN_BACKGROUNDS
    from ..mini import build_clip_mini, clip_mini_tokenizer

    tokenizer = clip_mini_tokenizer()
    seed = checkpoints.random_seed(weights_name)
    path: Path | None = None
    if seed is not None:
        model = clip_weights.seeded(build_clip_mini, seed)
    else:
        path = checkpoints.find_weights(weights_name, {}, model="clip")
        model = build_clip_mini().eval()
        clip_weights.load_checkpoint(model, path, variant="mini")
    settings = {
        "context_length": len(tokenizer.encode("").ids),
        "pad": 0,
        "start": tokenizer.token_to_id("<|startoftext|>"),
        "end": tokenizer.token_to_id("<|endoftext|>"),
        "templates": list(MINI_TEMPLATES),
        "backgrounds": list(DRAWN_BACKGROUNDS),
        "views": list(MINI_VIEWS),
        **({"rule": "softmax", "threshold": THRESHOLD} if path is None else _measured_rule(path)),
    }
    record = checkpoints.weights_record(weights_name, path, model)
    recipe = clip_weights.recipe_of("ViT-B-16", {})  # mean, std and filter of CLIP
    return clip_weights.Loaded(model=model, variant="mini", recipe=recipe, record=record), tokenizer, settings


def _measured_rule(path: Path) -> dict[str, str | float]:
    """The better of the two rules of `runtime.tag` and its threshold, from the metadata that mini/train_clip.py writes."""
    results: dict[str, float] = {}
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="numpy") as file:
            results = json.loads((file.metadata() or {}).get("results", "{}"))
    if results.get("pair_macro_f1", 0.0) > results.get("softmax_macro_f1", 0.0):
        return {"rule": "background", "threshold": float(results["pair_threshold"])}
    return {"rule": "softmax", "threshold": float(results.get("softmax_threshold", THRESHOLD))}


def _official_tokenizer(variant: str, weights: Path) -> Any:
    """The variant's tokenizer; where that is on the hub, the one published in the folder of the weights, if there is one."""
    import open_clip

    text = open_clip.get_model_config(variant).get("text_cfg", {})
    folder = weights if weights.is_dir() else weights.parent
    files = (TOKENIZER, clip_weights.CONFIG)
    is_local = bool(text.get("hf_tokenizer_name")) and weights.exists() and all((folder / file).is_file() for file in files)
    try:
        return open_clip.get_tokenizer(f"local-dir:{folder}" if is_local else variant)
    except (OSError, ValueError, ImportError) as error:  # damaged, or on the hub and no network
        raise WeightsError(
            f"{folder / TOKENIZER if is_local else f'--variant {variant}'}: its tokenizer cannot be loaded: "
            f"{clip_weights.first_line(error)}",
            hint=f"put {TOKENIZER} and {clip_weights.CONFIG} beside the weights, run once with a network, or use a variant with "
            "CLIP's own tokenizer, for example ViT-B-16",
        ) from None


def _image_size(model: open_clip.CLIP) -> tuple[int, int]:
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _embedding_size(model: open_clip.CLIP) -> int:
    with torch.no_grad():
        return int(model.encode_text(torch.zeros(1, model.context_length, dtype=torch.int64)).shape[1])


def _on_255(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (255 * value for value in values)
    return red, green, blue


FAMILY = Family(
    name="clip",
    variants=VARIANTS,
    default="ViT-B-16",
    prepare=prepare,
    official=lambda variant: "mini" if variant == "mini" else clip_weights.official_tag(variant),
)
