"""`wsss models`: its rows are the variants of the exporters, with the sizes that these have."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from wsss.export.catalog import ENTRIES, Entry


def test_the_command_lists_every_entry_without_loading_a_library() -> None:
    program = "import sys; sys.argv[1:] = {arguments}; from wsss.cli.main import app; app(standalone_mode=False); "
    program += "loaded = set(sys.modules) & {{'torch', 'transformers', 'onnx', 'numpy'}}; sys.exit(str(loaded) if loaded else 0)"

    def output(*arguments: str) -> str:
        command = [sys.executable, "-c", program.format(arguments=list(arguments))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lines = output("models").splitlines()
    assert len(lines) == len(ENTRIES) + 1
    for line, entry in zip(lines[1:], ENTRIES, strict=True):
        assert line.split()[:3] == [entry.role, entry.model, entry.variant] and entry.license in line
    rows = json.loads(output("models", "--json"))
    assert [(row["model"], row["variant"]) for row in rows] == [(entry.model, entry.variant) for entry in ENTRIES]
    [swin_t] = [row for row in rows if row["variant"] == "swin_t"]
    assert swin_t["proven"]["fp32"]["photographs"] == 24 and list(swin_t["proven"]) == ["fp32", "fp16", "trt-rtx"]


def test_entries_are_the_variants_of_the_exporters_with_their_default_weights() -> None:
    pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
    from wsss.export.family import family

    for model in ("clip", "grounding-dino", "sam", "sam3"):
        chosen = family(model)
        entries = [entry for entry in ENTRIES if entry.model == model]
        assert [entry.variant for entry in entries] == [each for each in chosen.variants if "mini" not in each]
        assert [entry.weights for entry in entries] == [chosen.official(entry.variant) for entry in entries]


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.same_network], ids=lambda entry: entry.variant)
def test_parameters_are_those_of_the_official_modules(entry: Entry) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
    with torch.device("meta"):
        if entry.model == "clip":
            import open_clip

            model = open_clip.create_model(entry.variant, load_weights=False, device="meta")
        elif entry.variant.startswith("sam2.1"):
            from wsss.export.sam import sam2

            model = sam2.build(entry.variant)
        elif entry.model == "sam3":
            from wsss.export.sam3 import weights

            model = weights.build(entry.variant)
        elif entry.model == "sam":
            from segment_anything import sam_model_registry

            model = sam_model_registry[entry.variant]()
        else:
            from wsss.export.grounding_dino.family import build_official

            model = build_official(entry.variant)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6, 1) == entry.parameters
