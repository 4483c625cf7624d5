"""torch as a peer: F.batch_norm, eager in both layouts, and compiled.

Imported only where torch is installed.
"""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from jbn.bench.cases import Problem
from jbn.bench.peer_layers import EPS, MOMENTUM


def builders(backend: str, compiled: bool) -> Iterator[tuple[str, Callable]]:
    """(name, build) of each way to run it: none on a TPU or on a GPU that torch cannot use."""
    if backend == "tpu" or (backend == "gpu" and not torch.cuda.is_available()):
        return
    device = "cuda" if backend == "gpu" else "cpu"
    yield "eager channels_last", _builder(device, channels_last=True)
    yield "eager NCHW", _builder(device, channels_last=False)
    compiler = importlib.util.find_spec("triton") if device == "cuda" else shutil.which("g++")
    if compiled and compiler:
        yield "compiled channels_last", _builder(device, channels_last=True, compiled=True)


def wait(result: Any) -> None:
    del result  # on the CPU it is there already
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elapsed(run: Callable[[int], Any], calls: int) -> float:
    """Seconds of device time of a call on a GPU.

    The calls are queued behind a sleep, so that none waits for Python.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # about 10 ms
    start.record()
    for i in range(calls):
        run(i)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _builder(device, *, channels_last, compiled=False):
    def build(problem: Problem, input_sets: int):
        if not channels_last and len(problem.case.shape) != 4:
            return None  # there is only one layout
        dtype = getattr(torch, problem.dtype)
        first = _inputs(problem, device, dtype, channels_last)
        inputs = [
            [a.detach().clone().requires_grad_(a.requires_grad) for a in first]
            for _ in range(input_sets)
        ]
        weight, bias = (
            torch.ones(problem.case.features, device=device),
            torch.zeros(problem.case.features, device=device),
        )
        stats = (
            torch.zeros(problem.case.features, device=device),
            torch.ones(problem.case.features, device=device),
        )
        step = function(problem)
        step = torch.compile(step) if compiled else step
        if problem.mode == "forward_backward":
            weight.requires_grad_()
            bias.requires_grad_()
        return lambda i: step(*inputs[i % input_sets], weight, bias, *stats)

    return build


def function(problem: Problem) -> Callable:
    """f(x, residual, dy, weight, bias, running_mean, running_var) of a problem.

    The running statistics change in place.
    """
    adds, relu, mode = problem.adds, problem.relu, problem.mode

    def layer(x, residual, weight, bias, mean, var, training):
        # momentum is the weight of the new value
        y = F.batch_norm(x, mean, var, weight, bias, training, 1 - MOMENTUM, EPS)
        y = y + residual if adds else y
        return F.relu(y, inplace=True) if relu else y  # in place, as torchvision's models do

    def forward(x, residual, dy, weight, bias, mean, var):
        with torch.no_grad():
            return layer(x, residual, weight, bias, mean, var, mode != "eval")

    def forward_backward(x, residual, dy, weight, bias, mean, var):
        y = layer(x, residual, weight, bias, mean, var, True)
        wanted = (x, weight, bias, residual) if adds else (x, weight, bias)
        return y, torch.autograd.grad(y, wanted, dy)

    return forward_backward if mode == "forward_backward" else forward


def _inputs(problem, device, dtype, channels_last):
    """(x, residual, dy): x as torch indexes it, channels second, in either layout."""
    shape = problem.case.shape
    if problem.case.channels_last and len(shape) > 2:
        shape = (shape[0], shape[-1], *shape[1:-1])
    generator = torch.Generator(device).manual_seed(0)
    x, residual, dy = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    x = x * 2 + 0.5
    if channels_last and len(shape) == 4:
        x, residual, dy = (a.to(memory_format=torch.channels_last) for a in (x, residual, dy))
    wanted = problem.mode == "forward_backward"
    return x.requires_grad_(wanted), residual.requires_grad_(wanted), dy
