"""ReGLU in plain PyTorch."""

from llmsys.ops._activation_reference import glu, relu, relu_slope

forward, backward = glu(relu, relu_slope)
