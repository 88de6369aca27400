"""The names of the contenders, and how each is opened."""

from __future__ import annotations

from dataclasses import dataclass

from .job import Contender, Job

OFFICIAL = "official"
"""The reference of speed and quality: the official modules in FP32."""


@dataclass(frozen=True)
class Kind:
    """A contender before it is opened. ``engine``: of ours, empty for a peer. ``precision``: of the bundle that it needs."""

    title: str
    engine: str = ""
    precision: str = "fp32"


CONTENDERS = {
    OFFICIAL: Kind("official modules, eager"),
    "autocast": Kind("official modules, eager, bf16 autocast"),
    "openvino-bf16": Kind("wsss, OpenVINO BF16", "openvino", "bf16"),
    "ort": Kind("wsss, ONNX Runtime FP32", "ort"),
    "openvino": Kind("wsss, OpenVINO FP32", "openvino"),
    "transformers": Kind("transformers' classes, eager"),
    "compiled": Kind("official modules, torch.compile"),
    "compiled-autocast": Kind("official modules, torch.compile, bf16 autocast"),
}
"""In the order in which they run."""


def open_contender(name: str, job: Job) -> Contender:
    """Load the models of a contender."""
    kind = CONTENDERS[name]
    if kind.engine:
        from .ours import OurChain

        return OurChain(job, kind.engine, kind.precision)
    if name == "transformers":
        from .of_transformers import transformers_chain

        return transformers_chain(job)
    from .eager import official_chain

    return official_chain(job, autocast=name.endswith("autocast"), compiled=name.startswith("compiled"))
