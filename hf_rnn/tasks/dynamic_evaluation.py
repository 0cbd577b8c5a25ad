"""Compression by a model that goes on learning from what it reads."""

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel


def dynamic_loss(
    model: PreTrainedModel,
    ids: Tensor,
    learning_rate: float = 3e-4,
    segment: int = 32,
    progress: bool = False,
) -> float:
    """Summed loss in nats of `ids` (T,) after the first token, the model learning on the way: dynamic evaluation
    (Krause et al., "Dynamic Evaluation of Neural Sequence Models", arXiv 1709.07432).

    The text is read in segments. The loss of a segment counts as it is before the weights have seen it; then they take
    a step down its gradient, which ends at the segment's first token while the state goes on. What is measured is
    therefore what a decoder could follow that learns from the text it has decoded: a code, as the loss without
    learning is. Steps are Adam's without momentum, so that each is as large as a weight's gradients were so far, the
    root mean square which Krause et al. take from the training text. The model is afterwards as it was.

    Args:
        model: a causal language model of this package.
        ids: one sequence of token ids.
        learning_rate: of a weight, a step.
        segment: tokens between two steps. Fewer learn sooner and cost more steps.
        progress: show a progress bar.

    Raises:
        ValueError: `ids` of another shape, or a setting without a meaning.
    """
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"ids: expected one sequence of at least 2 tokens, got shape {tuple(ids.shape)}")
    if segment < 1:
        raise ValueError(f"segment: expected at least 1 token, got {segment}")
    if not 0 <= learning_rate < float("inf"):
        raise ValueError(f"learning_rate: expected a finite number of at least 0, got {learning_rate}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected weights that can be trained, got none")
    kept, was_training = [p.detach().clone() for p in parameters], model.training
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.0, 0.999), fused=True)
    model.eval()
    ids = ids.to(model.device)[None]
    total, state = 0.0, None
    try:
        for start in tqdm(range(0, ids.shape[1] - 1, segment), desc="evaluating", disable=not progress):
            piece = ids[:, start : start + segment + 1]
            outputs = model(piece[:, :-1], cache=state, use_cache=True)
            logits = outputs.logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, piece[0, 1:].long(), reduction="sum")
            total += loss.item()
            optimizer.zero_grad()
            (loss / segment).backward()
            optimizer.step()
            state = outputs.cache.detach()
    finally:
        model.train(was_training)
        with torch.no_grad():
            for p, weights in zip(parameters, kept, strict=True):
                p.copy_(weights)
                p.grad = None
    return total
