"""What a student is to get right of its teacher: the embeddings, and where asked the masks too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesam_deploy.distill.options import DistillOptions
from edgesam_deploy.distill.prompt_loop import PromptLoop
from edgesam_deploy.distill.teacher import encoder_of
from edgesam_deploy.recipe import Recipe


def embedding_loss(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar loss of (B,C,E,E) float32 against (B,C,E,E). huber: NanoSAM's, delta 1; mse: MobileSAM's."""
    if kind == "huber":
        return F.huber_loss(student, teacher)
    if kind == "l1":
        return F.l1_loss(student, teacher)
    if kind == "mse":
        return F.mse_loss(student, teacher)
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


class TeacherObjective(nn.Module):
    """Images (B,3,S,S) uint8, the teacher's embeddings (B,C,E,E) float32 and ``draw`` (see ``samples.Pairs``) -> (loss,
    mean cosine of embeddings). Decoupled, the student's image encoder alone learns, and its mask decoder is the
    teacher's own, as in MobileSAM (Zhang et al. 2023, arXiv:2306.14289, §3.2) and NanoSAM.

    student, teacher: whole networks; the teacher's decoder alone is used, and only for prompts in the loop.
    """

    metric = "cosine"

    def __init__(
        self, student: nn.Module, recipe: Recipe, teacher: nn.Module, teacher_recipe: Recipe, options: DistillOptions
    ) -> None:
        super().__init__()
        self.options = options
        self.encoder: Any = encoder_of(student, recipe)
        self.loop = PromptLoop(student, recipe, teacher, teacher_recipe, options) if options.rounds else None

    def forward(self, images: Tensor, wanted: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        # Products in the autocast type, losses in float32.
        device, kind = images.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.amp)
        with torch.autocast(device, kind, enabled=kind is not None):
            embeddings = self.encoder(images).float()
        loss = embedding_loss(self.options.loss, embeddings, wanted)
        with torch.no_grad():
            cosine = F.cosine_similarity(embeddings, wanted, dim=1).mean()
        if self.loop is None:
            return loss, cosine
        return self.options.embedding_weight * loss + self.loop(embeddings, wanted, draw), cosine
