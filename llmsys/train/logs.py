"""What a run writes while it trains: a CSV file, and TensorBoard events."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from llmsys import env
from llmsys.train.trainer import Record

COLUMNS = (*(field.name for field in fields(Record) if field.name != "sent_bytes"), "mfu", "validation_loss")


class Logs:
    """`log.csv` and, if wanted, `tensorboard/` in `folder`; rows after step `resume_from` of an earlier run are cut.

    A job of ranks has a column more for each of the `axes` that it sends bytes on.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, resume_from: int = 0, axes: Iterable[str] = ()):
        path = folder / "log.csv"
        columns = dict.fromkeys([*COLUMNS, *map(_column, axes)])
        kept = []
        if resume_from and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= resume_from]
            columns |= dict.fromkeys(name for row in kept for name in row)  # it may have begun in another layout
        self.file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.rows = csv.DictWriter(self.file, list(columns))
        self.rows.writeheader()
        self.rows.writerows(kept)
        self.events = _summary_writer(folder, resume_from) if tensorboard else None

    def write(self, record: Record, mfu: float, validation_loss: float | None) -> None:
        row = asdict(record) | {"mfu": mfu, "validation_loss": validation_loss}
        row |= {_column(axis): num_bytes for axis, num_bytes in row.pop("sent_bytes").items()}
        self.rows.writerow(row)
        self.file.flush()
        if self.events:
            for key, value in row.items():
                if value is not None and key != "step":
                    self.events.add_scalar(key, value, record.step)

    def close(self) -> None:
        self.file.close()
        if self.events:
            self.events.close()


def _column(axis: str) -> str:
    return f"{axis}_bytes"


def _summary_writer(folder: Path, resume_from: int):
    if not env.has("tensorboard"):
        raise RuntimeError(
            "llmsys.train.logs: tensorboard=true without the package tensorboard, expected it installed; "
            "pip install tensorboard, or set tensorboard=false"
        )
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from + 1 if resume_from else None)
