"""The README's table of what `llmsys.accelerate` does to each model, made by doing it.

    python -m benchmarks.dropin            rewrite the table
    python -m benchmarks.dropin --check    exit code 1 if it is not what comes out now

"Equal" is meant by the rule that every op goes through: truth is the untouched model in float64, and ours is off by at
most twice (gradients and steps: three times) what the untouched model is off in float32, and one rounding.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

import llmsys
from benchmarks.families import FAMILIES, batch, build
from llmsys.integrations.transformers import Report
from llmsys.ops._verify import Verdict, judge
from llmsys.perf.report import CHECKOUT

STEPS = 3
# With the usual 1e-8 an element whose gradient is zero but for rounding moves by the whole learning rate, in the
# direction of the rounding. Near the size of the gradients, a step is a smooth function of them and can be compared.
ADAMW = {"lr": 1e-3, "eps": 1e-3}
TABLE = re.compile(r"(<!-- dropin -->\n).*?(<!-- /dropin -->)", re.DOTALL)
ASPECTS = ("forward", "gradient", "steps")


class Wide(TorchFunctionMode):
    """Float64 where a model's code says float32: without it, norms and softmax of a float64 model are not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args, kwargs = (self._wide(args), self._wide(kwargs or {}))
        return function(*args, **kwargs)

    @staticmethod
    def _wide(given):
        if isinstance(given, dict):
            return {name: torch.float64 if value is torch.float32 else value for name, value in given.items()}
        return tuple(torch.float64 if value is torch.float32 else value for value in given)


def compare(
    family: str, change: Callable[[torch.nn.Module], object] = llmsys.accelerate, seed: int = 0
) -> tuple[object, dict[str, list[Verdict]]]:
    """What `change` returns, and verdicts on the forward, gradient and steps of the model that it changed."""
    model = build(family, seed)
    wide = copy.deepcopy(model).double()
    if family == "Mixtral":
        wide.set_experts_implementation("eager")  # the grouped product has no float64
    same, ours = copy.deepcopy(model), model
    report = change(ours)
    with Wide():
        truth = train(wide, seed)
    return report, verdicts(train(ours, seed), train(same, seed), truth)


def verdicts(ours: dict, same: dict, truth: dict) -> dict[str, list[Verdict]]:
    """One verdict on the forward, and one for each parameter on its gradient and on its value after the steps."""
    return {
        aspect: [judge(name, [(ours[aspect][name], same[aspect][name], true)]) for name, true in truth[aspect].items()]
        for aspect in ASPECTS
    }


def train(model: torch.nn.Module, seed: int = 0, **options: object) -> dict[str, dict[str, torch.Tensor]]:
    """The first forward, the first gradients, and the parameters after the steps; names as `judge` reads them."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for step in range(STEPS):
        outputs = model(**batch(seed), **options)
        optimizer.zero_grad()
        outputs.loss.backward()
        if step == 0:
            # One vector: a single number can be right by chance, and then would allow nothing. Not of padding, where
            # eager attention has means over all keys and others zeros.
            logits = outputs.logits.detach()[batch(seed)["attention_mask"].bool()]
            results = {"results": torch.cat([logits.flatten(), outputs.loss.detach()[None]])}
            gradients = {f"d{name}": parameter.grad.clone() for name, parameter in trained(model)}
        optimizer.step()
    parameters = {f"d{name}": parameter.detach().clone() for name, parameter in trained(model)}
    return {"forward": results, "gradient": gradients, "steps": parameters}


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def row(family: str) -> str:
    report, found = compare(family)
    assert isinstance(report, Report)
    swapped = Counter((line.kind, line.what) for line in report.swapped)
    left = Counter((line.kind, line.module) for line in report.left)
    cells = [
        family,
        ", ".join(f"{count} {kind} → `{op}`" for (kind, op), count in sorted(swapped.items())) or "–",
        ", ".join(f"{count} {kind} (`{module}`)" for (kind, module), count in sorted(left.items())) or "–",
        *("equal" if all(verdict.right for verdict in found[aspect]) else "**not equal**" for aspect in ASPECTS),
    ]
    return "| " + " | ".join(cells) + " |"


def rendered(readme: str) -> str:
    """`readme` with its table made anew.

    Errors     ValueError if there is no marker
    """
    if not TABLE.search(readme):
        raise ValueError("benchmarks.dropin: no marker, expected <!-- dropin --> … <!-- /dropin -->")
    head = ["| model | swapped | left | " + " | ".join(ASPECTS) + " |", "|---|---|---|" + "---|" * len(ASPECTS)]
    table = "\n".join([*head, *map(row, FAMILIES), ""])
    return TABLE.sub(lambda found: found[1] + table + found[2], readme)


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)  # tiny models: threads cost more than they bring
    path = CHECKOUT / "README.md"
    old = path.read_text()
    new = rendered(old)
    if "--check" not in arguments:
        path.write_text(new)
    elif new != old:
        print("README.md: the drop-in table is not what comes out now; run `python -m benchmarks.dropin`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
