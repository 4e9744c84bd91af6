"""AdamW over 33 million parameters, in the tensors of a small Llama, against PyTorch, DeepSpeed and Apex.

"ready step" is the op itself; "public step" an optimizer's `step()`. "clip+step+copy" is a whole mixed-precision
update: float32 gradients unscaled and clipped to norm 1, float32 masters stepped, bfloat16 weights written.
"""

import torch

from benchmarks.harness import Case

BLOCK = [(512, 512)] * 4 + [(1536, 512)] * 2 + [(512, 1536)] + [(512,)] * 2
SHAPES = [(32000, 512), *BLOCK * 5, (512,)]
NUMEL = (sum(torch.Size(shape).numel() for shape in SHAPES),)
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
PLAN = [
    Case("ready", "step", NUMEL, "float32"),
    Case("public", "step", NUMEL, "float32"),
    Case("public", "clip+step+copy", NUMEL, "bfloat16"),
]
