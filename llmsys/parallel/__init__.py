"""One axis, one file: how a model that is written for one process runs on many."""

from llmsys.parallel.apply import Parallel, parallelize
from llmsys.parallel.collectives import CollectiveError, counted
from llmsys.parallel.connect import connect, disconnect
from llmsys.parallel.mesh import Axis, Mesh
from llmsys.parallel.pipeline import Pipeline
from llmsys.parallel.zero import Zero

__all__ = [
    "Axis",
    "CollectiveError",
    "Mesh",
    "Parallel",
    "Pipeline",
    "Zero",
    "connect",
    "counted",
    "disconnect",
    "parallelize",
]
