"""Students' encoders in ONNX against the unmerged networks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgesam_deploy.contract import encoder_contract
from edgesam_deploy.models import architecture, graph_modules
from edgesam_deploy.models.session import PyTorchSession
from edgesam_deploy.runtime import open_session
from edgesam_deploy.stages import export as export_stage
from edgesam_deploy.stages import graph as graphs

from .test_timm_fpn import settled, small

SIZE = 128


# One of each kind: residual convolutions, windowed attention, linear attention.
@pytest.mark.parametrize("name", ["student_resnet18", "student_tiny_vit_5m", "student_efficientvit_b0"])
def test_a_student_exports(name: str, tmp_path: Path) -> None:
    recipe = small(name, SIZE)
    model, contract = settled(recipe), encoder_contract(recipe.geometry)
    path = tmp_path / "encoder.onnx"
    graph = graph_modules(model, recipe)[0]
    graphs.save(export_stage._export(graph, export_stage._examples(contract), contract, None, recipe), path, {})
    export_stage.check_contract(path, contract)
    feeds = graphs.example_feeds(graphs.load(path), seed=1)
    reference = PyTorchSession(architecture(recipe).reference_encoder(model, recipe), contract)
    with open_session(path) as session:
        assert graphs.relative_error(reference.run(feeds), session.run(feeds)) < graphs.AGREEMENT
    nodes = graphs.load(path).graph.node
    assert not [node.name for node in nodes if node.op_type == "BatchNormalization"]
    for pattern in (*recipe.fp16.keep, *recipe.int8.keep):  # a rule that names nothing protects nothing
        assert any(re.search(pattern, node.name) for node in nodes), pattern
