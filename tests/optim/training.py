"""A small model, its gradients and its training, as the tests of every optimizer want them."""

import torch

from llmsys.ops._cases import random


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)).to(dtype)


def give_gradients(net: torch.nn.Module, seed: int) -> None:
    """The same random gradients to every model of one shape."""
    for i, param in enumerate(net.parameters()):
        param.grad = random(1000 * seed + i, "cpu", (tuple(param.shape), param.dtype))[0]


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(net, step)
        optimizer.step()


def state_of(optimizer, name):
    return [state[name] for state in optimizer.state.values()]
