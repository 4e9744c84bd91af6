"""GEGLU in Triton."""

from llmsys.ops._activation_native import gelu_name
from llmsys.ops._activation_triton import glu

forward, backward = glu(gelu_name)
