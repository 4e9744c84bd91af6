"""What a training run is made of. The defaults are the demo: 2.4 M parameters, Python's own text, a few minutes."""

import re
from dataclasses import dataclass, field

from llmsys.models.llama import SIZES, LlamaConfig

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text files, JSONL or Parquet in `paths`; with none, the documentation and source of the installed Python."""

    paths: tuple[str, ...] = ()
    max_bytes: int = 2_500_000  # of Python's own text, whose prose comes first
    sequence_length: int = 256
    batch_size: int = 8

    def __post_init__(self):
        _at_least("data", self, max_bytes=1, sequence_length=2, batch_size=1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; a linear warm-up to `lr`, then half a cosine down to `final_lr_ratio · lr` at the last step."""

    lr: float = 1.5e-3
    final_lr_ratio: float = 0.1
    warmup_steps: int = 25
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self):
        _at_least("optimizer", self, lr=0, final_lr_ratio=0, warmup_steps=0, beta1=0, beta2=0, eps=0, weight_decay=0)
        _at_most("optimizer", self, final_lr_ratio=1)
        for key in ("beta1", "beta2"):
            if getattr(self, key) >= 1:
                raise ValueError(f"llmsys.train.config: optimizer.{key}={getattr(self, key)}, expected less than 1")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"llmsys.train.config: optimizer.max_grad_norm={self.max_grad_norm}, expected more than 0; "
                "inf turns clipping off"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How pp · dp · tp ranks, started by torchrun, train one model; rank 0 writes the run's folder, which all read.

    What the model cannot be cut by is refused at the start.
    """

    pp: int = 1  # pipeline stages, which the blocks are dealt to
    dp: int = 1  # ranks that each batch is dealt to
    tp: int = 1  # parts of each weight
    shard: int | None = None  # of dp, the ranks that ZeRO shards over (HSDP); None: all
    zero: int = 0
    schedule: str = "1f1b"
    chunks_per_stage: int | None = None  # for the schedules that leave it free
    micro_batches: int | None = None  # that each rank's part of a batch is cut into; None: as many as stages
    sequence_parallel: bool = False
    overlap_chunks: int = 1  # that a sequence passes between the ranks of tp in, beside the products of others
    recompute: str = "none"  # what backward computes again: "selective" attention, "full" blocks
    offload: bool = False  # the weights that the optimizer updates, and what it keeps, are the host's
    timeout_s: float = 600.0  # of a collective
    connect_timeout_s: float = 60.0  # for all ranks to come

    def __post_init__(self):
        _at_least("parallel", self, pp=1, dp=1, tp=1, zero=0, overlap_chunks=1)
        for key in ("shard", "chunks_per_stage", "micro_batches"):
            if getattr(self, key) is not None:
                _at_least("parallel", self, **{key: 1})
        for key in ("timeout_s", "connect_timeout_s"):
            if not 0 < getattr(self, key) < 1e7:
                _refuse("parallel", key, getattr(self, key), "seconds, more than 0 and less than 1e7")

    @property
    def num_ranks(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def micros(self) -> int:
        return self.micro_batches or self.pp


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, whole."""

    name: str = "demo"
    model: LlamaConfig = SIZES["demo"]
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int = 250
    accumulation: int = 1  # batches whose gradients are averaged into one step
    precision: str = "auto"
    device: str = "cpu"
    seed: int = 0
    output: str | None = None  # the run's folder; None: runs/<name>-<date>
    checkpoint_every: int = 0  # steps; 0: at the end only
    keep_checkpoints: int = 2
    validate_every: int = 0  # steps; 0: at the end only
    validation_batches: int = 8
    tensorboard: bool = True
    prompt: str = "The "
    generated_tokens: int = 120

    def __post_init__(self):
        _at_least("", self, steps=1, accumulation=1, checkpoint_every=0, keep_checkpoints=1, validate_every=0)
        _at_least("", self, validation_batches=1, generated_tokens=1, seed=0)
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"llmsys.train.config: precision={self.precision!r}, expected one of {', '.join(PRECISIONS)}"
            )
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"llmsys.train.config: device={self.device!r}, expected cpu, cuda or cuda:<number>")
        if self.data.sequence_length > self.model.max_sequence_length:
            raise ValueError(
                f"llmsys.train.config: data.sequence_length={self.data.sequence_length}, expected at most "
                f"model.max_sequence_length={self.model.max_sequence_length}; set both"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"llmsys.train.config: optimizer.warmup_steps={self.optimizer.warmup_steps}, "
                f"expected fewer than steps={self.steps}"
            )
        parallel, rows = self.parallel, self.data.batch_size
        if rows % (parallel.dp * parallel.micros):
            raise ValueError(
                f"llmsys.train.config: data.batch_size={rows} over parallel.dp={parallel.dp} ranks in "
                f"{parallel.micros} microbatches each, expected a multiple of {parallel.dp * parallel.micros}; set "
                "data.batch_size or parallel.micro_batches"
            )
        if parallel.sequence_parallel and self.data.sequence_length % parallel.tp:
            raise ValueError(
                f"llmsys.train.config: data.sequence_length={self.data.sequence_length} over parallel.tp={parallel.tp} "
                f"with sequence_parallel, expected a multiple of {parallel.tp}"
            )
        if not self.prompt:
            raise ValueError("llmsys.train.config: prompt='', expected some text to continue")

    @property
    def tokens_per_step(self) -> int:
        return self.accumulation * self.data.batch_size * self.data.sequence_length


def _at_least(section: str, config: object, **limits: float) -> None:
    for key, limit in limits.items():
        if not getattr(config, key) >= limit:
            _refuse(section, key, getattr(config, key), f"at least {limit}")


def _at_most(section: str, config: object, **limits: float) -> None:
    for key, limit in limits.items():
        if not getattr(config, key) <= limit:
            _refuse(section, key, getattr(config, key), f"at most {limit}")


def _refuse(section: str, key: str, value: object, expected: str) -> None:
    raise ValueError(f"llmsys.train.config: {section + '.' if section else ''}{key}={value}, expected {expected}")
