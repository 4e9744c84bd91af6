"""One axis, one file: how a model that is written for one process runs on many."""

from llmsys.parallel.collectives import CollectiveError, counted
from llmsys.parallel.connect import connect, disconnect
from llmsys.parallel.mesh import Axis, Mesh

__all__ = ["Axis", "CollectiveError", "Mesh", "connect", "counted", "disconnect"]
