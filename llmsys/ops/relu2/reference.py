"""Squared ReLU in plain PyTorch."""

from llmsys.ops._activation_reference import relu2, relu2_slope, unary

forward, backward = unary(relu2, relu2_slope)
