"""Seeds: masks worth trying before any sampler has seen a score. A heuristic is one function here."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from skipsearch.mask import Kind, SkipMask
from skipsearch.model.preset import Preset
from skipsearch.model.sublayers import input_device
from skipsearch.model.view import draft_view
from skipsearch.search.cost import Point
from skipsearch.search.space import Space
from skipsearch.search.trace import Progress, Trace

Seed = tuple[str, SkipMask]


def published(preset: Preset | None, space: Space) -> list[Seed]:
    """Masks from the literature for this model."""
    return [] if preset is None else [(f"published:{m.name}", m.mask - space.fixed) for m in preset.masks]


def uniform(space: Space) -> list[Seed]:
    """Every n-th layer skipped, whole or its attention alone; first and last layers are kept."""
    inner = range(1, space.num_layers - 1)
    seeds = []
    for stride in (2, 3, 4):
        layers = [i for i in inner if i % stride == 1]
        seeds.append((f"uniform:{stride}", SkipMask(attention=layers, mlp=layers, num_layers=space.num_layers)))
    layers = [i for i in inner if i % 2 == 1]
    seeds.append(("uniform:attention", SkipMask(attention=layers, num_layers=space.num_layers)))
    return [(name, mask - space.fixed) for name, mask in seeds]


@torch.no_grad()
def single_skip_loss(
    model: PreTrainedModel, trace: Trace, space: Space, progress: Progress
) -> dict[tuple[Kind, int], float]:
    """For each free sublayer: the share of trace tokens whose argmax changes when it alone is skipped.

    One teacher-forced pass a sublayer over prompts and continuations.
    """
    sequences = [p + c for p, c in zip(trace.prompts, trace.continuations, strict=True)]
    ids = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long, device=input_device(model))
    generated = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, sequence) in enumerate(zip(trace.prompts, sequences, strict=True)):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        generated[i, len(prompt) : len(sequence)] = True
    wanted, predicted_here = ids[:, 1:], generated[:, 1:]
    loss = {}
    for number, (kind, layer) in enumerate(space.free):
        view = draft_view(model, SkipMask.from_sublayers([(kind, layer)], space.num_layers))
        same = view(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1) == wanted
        loss[kind, layer] = 1 - float(same[predicted_here].float().mean())
        progress("sensitivity", number + 1, len(space.free))
    return loss


def by_sensitivity(space: Space, loss: dict[tuple[Kind, int], float], point: Point) -> list[Seed]:
    """The least harmful sublayers first, weighed by the seconds that skipping them saves: 1/8, 2/8, ... 7/8 of all."""
    saves = {"attention": max(point.attention, 1e-12), "mlp": max(point.mlp, 1e-12)}
    order = sorted(space.free, key=lambda sub: (loss[sub] + 1e-3) / saves[sub[0]])
    seeds = []
    for eighths in range(1, 8):
        count = round(len(order) * eighths / 8)
        seeds.append((f"sensitivity:{count}", SkipMask.from_sublayers(order[:count], space.num_layers)))
    return seeds
