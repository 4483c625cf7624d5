"""torchvision's ResNet-50 train step. Imported only where torch and torchvision are installed."""

from collections.abc import Callable, Iterator

import torch
import torchvision

from jbn.bench.peers_torch import wait


def steps(
    batch: int, side: int, compiled: bool
) -> Iterator[tuple[str, Callable, Callable, Callable]]:
    """(name, run, wait, facts), eager and by torch.compile; channels_last, bfloat16 autocast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield ("torchvision eager", *_step(batch, side, device, compiled=False))
    if compiled:
        yield ("torchvision compiled", *_step(batch, side, device, compiled=True))


def _step(batch, side, device, *, compiled):
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None, zero_init_residual=True)
    model = model.to(device, memory_format=torch.channels_last)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    losses = []

    def run(i):
        del i
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        if len(losses) < 2:
            losses.append(loss.detach())
        return loss

    def facts():
        # What torch allocated in this process, all its models together.
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        return {"peak_GB": peak, "first_loss": float(losses[0]), "second_loss": float(losses[1])}

    return run, wait, facts
