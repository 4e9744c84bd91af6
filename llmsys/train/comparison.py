"""What `llmsys train --compare` shows: a table, a plot, whether the curves agree, and a paragraph."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmsys.models import Llama, load_weights
from llmsys.train.compare import Agreement, Run, agreement, compare, control_steps, final_steps, turns
from llmsys.train.config import TrainConfig
from llmsys.train.run import new_folder, prepare_data, settle, show_sample

DIFFERENCES = (
    "llmsys: its rms_norm, add_rms_norm, rope_qk, mlp, linear_cross_entropy, grad_norm, AdamW and tune_allocator(). "
    "stock: F.rms_norm, rotation by chunk and cat, F.silu(gate) * up, F.cross_entropy, clip_grad_norm_, "
    "AdamW(fused=True). All else is the same."
)


def train_and_compare(config: TrainConfig, console: Console) -> bool:
    """Train with llmsys and with stock PyTorch, show both, and return whether their curves agree.

    Leaves comparison.png and model.safetensors (llmsys's weights) in the run's folder.
    """
    config, dtype, rate = settle(config, console)
    folder = new_folder(config)
    tokenizer, tokens = prepare_data(config, console)
    console.print(f"model: {config.model.num_parameters() / 1e6:.1f} M parameters, trained twice; run: {folder}")
    runs, control = compare(config, tokens.path, dtype, folder / "model.safetensors", console)
    judged = agreement(runs["llmsys"].losses, runs["stock"].losses, control)
    model = Llama(config.model, device=config.device, dtype=dtype)
    load_weights(model, folder / "model.safetensors")
    print_comparison(runs, judged, config, turns(config.steps)[0], rate, console)
    plot_comparison(runs, control, folder / "comparison.png")
    console.print(f"loss curves: {folder / 'comparison.png'} (its control ran {control_steps(config.steps)} steps)")
    show_sample(model, tokenizer, config, console)
    return judged.holds


def print_comparison(
    runs: dict[str, Run], judged: Agreement, config: TrainConfig, warm_up: int, gemm_rate: float, console: Console
) -> None:
    """The table of both runs and of their ratio, then the criterion with its figures."""
    ours, stock = runs["llmsys"], runs["stock"]
    flops = config.model.flops_per_token(config.data.sequence_length)
    last = final_steps(config.steps)

    def final(run: Run) -> float:
        return sum(run.losses[-last:]) / last

    speeds = [run.tokens_per_s(warm_up) for run in (ours, stock)]
    table = Table("", "llmsys", "stock PyTorch", "ratio", caption=DIFFERENCES)
    table.add_row(
        "tokens/s, median step", *(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}× as fast"
    )
    table.add_row("MFU", *(f"{flops * speed / gemm_rate:.0%}" for speed in speeds), "")
    table.add_row(
        "peak memory over start",
        *(f"{run.extra_bytes / 2**20:,.0f} MiB" for run in (ours, stock)),
        f"{ours.extra_bytes / stock.extra_bytes:.2f}× as much",
    )
    table.add_row(f"loss, mean of last {last} steps", *(f"{final(run):.4f}" for run in (ours, stock)), "")
    table.add_row("validation loss", *(f"{run.validation_loss:.4f}" for run in (ours, stock)), "")
    console.print(table)
    console.print(
        f"curves {'agree' if judged.holds else 'DISAGREE'}: they drift {judged.drift:.1e} apart while rounding is "
        f"allowed {judged.drift_limit:.1e} (from a stock run with other roundings), and end {judged.final:.1e} "
        f"apart while three standard errors of the final loss are {judged.final_limit:.1e}"
    )


def plot_comparison(runs: dict[str, Run], control: list[float], path: Path) -> None:
    """Both loss curves, and below them their distance beside the control's, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (losses, distance) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained"
    )
    stock = runs["stock"].losses
    for name, style in (("stock", "-"), ("llmsys", "--")):
        losses.plot(range(1, len(stock) + 1), runs[name].losses, style, label=f"{name}", linewidth=1.2)
    losses.set_ylabel("training loss (nats)")
    losses.legend()
    for name, curve in (("llmsys", runs["llmsys"].losses), ("other roundings", control)):
        apart = [abs(a - b) for a, b in zip(curve, stock, strict=False)]
        distance.semilogy(range(1, len(apart) + 1), apart, label=f"|{name} - stock|", linewidth=1)
    distance.set_xlabel("step")
    distance.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
