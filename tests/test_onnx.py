"""ONNX files of language models hold plain operators and compute what the models compute."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from prunelm import Blocks, LowRank, Magnitude, Pruner, accelerate
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.nn import BlockSparseLinear, LowRankLinear, PackedLowRankLinear

CONFIG = LMConfig(23, 64, 16, (LayerSizes(4, 96), LayerSizes(4, 96)))
FORMS = ("dense", "ranks", "blocks-accelerated", "ranks-accelerated", "all-accelerated")


def model_of(form: str) -> nn.Module:
    model = TransformerLM(CONFIG).eval()
    if form.startswith("ranks"):
        model = Pruner(LowRank(), Magnitude()).run(model, "40%").model
        assert any(isinstance(m, LowRankLinear) for m in model.modules())
    elif form.startswith("blocks"):
        model = Pruner(Blocks(16, 4), Magnitude()).run(model, "30%").model
    if form.endswith("accelerated"):
        model = accelerate(model, dense=True if form.startswith("all") else None)
        kind = PackedLowRankLinear if form.startswith("ranks") else BlockSparseLinear
        assert any(isinstance(m, kind) for m in model.modules())
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_language_models_export(form: str, dynamo: bool, tmp_path: Path) -> None:
    model, path = model_of(form), tmp_path / "lm.onnx"
    seen, tokens = torch.randint(23, (2, 7)), torch.randint(23, (3, 5))
    axes = {0: "B", 1: "L"}
    sizes = {"dynamic_shapes": {"tokens": axes}} if dynamo else {"dynamic_axes": {"tokens": axes}}
    with torch.no_grad():
        expected = model(tokens)
        names = {"input_names": ["tokens"], "verbose": False}
        torch.onnx.export(model, (seen,), path, dynamo=dynamo, **names, **sizes)
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert {node.domain for node in file.graph.node} <= {"", "ai.onnx"}
    (found,) = ReferenceEvaluator(file).run(None, {"tokens": tokens.numpy()})
    assert np.abs(found - expected.numpy()).max() <= 1e-4
