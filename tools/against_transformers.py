"""Times detectors with a ResNet-18, ours and the transformers library's: same weights, in turns.

python -m tools.against_transformers --threads 2
python -m tools.against_transformers --threads 2 --family rt_detr --size 416x1344

Both are eager torch in one process, with the same threads, allocator and random weights; before
anything is timed, their predictions are compared. A training step is forward, loss with its
matching on every layer, backward, clipping and AdamW; the two need 7 GB at 402x1333. Besides the
wall clock's time it prints the time the process spent on processors, which other processes on the
machine disturb less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers

from detr.data.cli import parse_size
from detr.models import Target
from detr.models.weights.hugging_face import convert
from distill.losses.detection import detection_losses
from distill.losses.weights import LossWeights
from distill.training.cpu import prepare_cpu, trained_format
from tools.turns import in_turns

BOXES = torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.6, 0.3, 0.5], [0.5, 0.5, 0.1, 0.1]])
LABELS = torch.tensor([0, 2, 1])
Run = Callable[[], object]


def deformable_detr() -> Any:
    """The library's Deformable DETR with a ResNet-18 and otherwise its own defaults."""
    backbone = {
        "model_type": "timm_backbone",
        "backbone": "resnet18",
        "out_indices": [2, 3, 4],
        "features_only": True,
        "use_pretrained_backbone": False,
    }
    options: dict[str, Any] = {"backbone_config": backbone, "num_labels": 8, "auxiliary_loss": True}
    config = transformers.DeformableDetrConfig(**options)
    torch.manual_seed(0)
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr() -> Any:
    """The library's RT-DETR-R18, as it is published."""
    backbone = {
        "model_type": "rt_detr_resnet",
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
        "out_indices": [2, 3, 4],
    }
    options: dict[str, Any] = {
        "backbone_config": backbone,
        "num_labels": 8,
        "hidden_expansion": 0.5,
        "decoder_layers": 3,
        "encoder_in_channels": [128, 256, 512],
        "freeze_backbone_batch_norms": False,
    }
    torch.manual_seed(0)
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**options))


# Each family's model, and the loss it is trained with.
FAMILIES: dict[str, tuple[Callable[[], Any], LossWeights]] = {
    "deformable_detr": (deformable_detr, LossWeights(focal=2.0)),
    "rt_detr": (rt_detr, LossWeights(scores="varifocal")),
}


def contenders(family: str, size: tuple[int, int]) -> dict[str, dict[str, Run]]:
    """For both tasks, what ours and theirs run."""
    published, weights = FAMILIES[family]
    theirs = published().eval()
    ours = convert(theirs.config.to_dict(), theirs.state_dict(), "random weights").detector
    # As training places it.
    ours = ours.eval().to(memory_format=trained_format(torch.device("cpu")))
    images = torch.randn(1, 3, *size)
    valid = torch.tensor([[float(size[0]), float(size[1])]])
    mask = torch.ones(1, *size, dtype=torch.int64)

    def our_forward() -> torch.Tensor:
        with torch.inference_mode():
            memory = ours.encode(images, valid)
            group = ours.queries(memory)
            boxes: torch.Tensor = ours.decoder(memory, group, ours.source, final_only=True)[0].boxes
            return boxes[-1]

    def their_forward() -> torch.Tensor:
        with torch.inference_mode():
            boxes: torch.Tensor = theirs(pixel_values=images, pixel_mask=mask).pred_boxes
            return boxes

    # Fresh heads answer with their biases alone; tests/models compares trained-like weights.
    difference = (our_forward() - their_forward()).abs().max().item()
    print(f"largest difference of the boxes: {difference:.1e}", flush=True)
    if difference > 1e-3:
        raise SystemExit("the models do not predict the same")

    targets = [Target(BOXES, LABELS, torch.zeros(0, 4))]
    labels = [{"class_labels": LABELS, "boxes": BOXES}]
    optimizers = {model: torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (ours, theirs)}

    def step(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> None:
        model.train()
        optimizers[model].zero_grad()
        torch.autograd.backward(loss_of())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizers[model].step()
        model.eval()

    def our_loss() -> torch.Tensor:
        memory = ours.encode(images, valid)
        outputs = ours.decode(memory, ours.queries(memory, targets))
        found = {output.group.role: output for output in outputs}
        losses = detection_losses(found, targets, torch.tensor(3.0), weights)
        return sum(losses.values(), torch.zeros(()))

    def their_loss() -> torch.Tensor:
        loss: torch.Tensor = theirs(pixel_values=images, pixel_mask=mask, labels=labels).loss
        return loss

    return {
        "forward": {"ours": our_forward, "theirs": their_forward},
        "step": {
            "ours": lambda: step(ours, our_loss),
            "theirs": lambda: step(theirs, their_loss),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="402x1333")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="deformable_detr")
    parser.add_argument(
        "--tasks", nargs="+", choices=("forward", "step"), default=("forward", "step")
    )
    arguments = parser.parse_args()
    prepare_cpu()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.size}, {arguments.threads} threads, {arguments.rounds} rounds in turns")
    every = contenders(arguments.family, parse_size(arguments.size))
    for task in arguments.tasks:
        for label, seconds in in_turns(every[task], arguments.rounds).items():
            ours, theirs = seconds["ours"].median, seconds["theirs"].median
            print(
                f"{task:8} {label:10} ours {ours * 1e3:8.0f} ms, "
                f"theirs {theirs * 1e3:8.0f} ms, {theirs / ours:.2f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
