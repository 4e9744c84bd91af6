"""The tensors of one bucket on this rank: its parameters, their gradients, and the part of both that it owns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from llmsys.ops.sink import Product
from llmsys.parallel import collectives
from llmsys.parallel.buckets import Bucket, Piece
from llmsys.parallel.collectives import Pending
from llmsys.parallel.in_parts import make_whole, take_apart
from llmsys.parallel.mesh import Axis

Fill = Callable[[Mapping[str, Tensor]], None]


class Flat:
    """A bucket, whose parameters become views of one tensor.

    whole        the parameters; without storage while they are freed
    shard        what an optimizer updates: this rank's part of `whole`, or what that part is rounded from
    gradients    the sum of what this rank's backwards found and nobody reduced yet, over the number of ranks; None
                 where there is none
    total        this rank's part of the sum over `owners` of what was reduced; None where there is none

    fill              writes parameters, by name, of a model that has no memory for them; else they are copied
    keeps_gradients   whether `gradients` stay, and `total` is written into them; else a reduction uses them up
    """

    def __init__(
        self,
        bucket: Bucket,
        parameters: Sequence[nn.Parameter],
        owners: Axis,
        copies: Axis,
        *,
        keeps_whole: bool,
        keeps_gradients: bool,
        master_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
        fill: Fill | None,
    ):
        self.bucket, self.parameters, self.owners, self.copies = bucket, list(parameters), owners, copies
        self.keeps_gradients = keeps_gradients
        self.whole = parameters[0].new_zeros(bucket.size, requires_grad=False)
        views = [self._view(self.whole, index) for index in range(len(parameters))]
        if fill is not None:
            fill({piece.name: view for piece, view in zip(bucket.pieces, views, strict=True)})
        for view, parameter in zip(views, parameters, strict=True):
            if fill is None:
                view.copy_(parameter.data)
            parameter.data = view
        part = self.part_of(self.whole)
        self.trained = parameters[0].requires_grad
        dtype = master_dtype if master_dtype and self.trained else part.dtype
        shard = self._new_shard(part, dtype, apart=not keeps_whole)
        self.shard = nn.Parameter(shard, requires_grad=self.trained)
        self.gradient_dtype = reduce_dtype or part.dtype
        self._scale = 1 / (owners.size * copies.size)  # of a rank's gradient in the mean
        self.gradients: Tensor | None = None
        self.total: Tensor | None = None
        self.missing: set[int] = set()  # of parameters, whose gradients this backward has yet to find
        self.waits = False  # for a reduction
        self._blank: set[int] = set()  # of parameters, whose part of `gradients` nobody has written yet
        # Held here, autograd's node of each parameter stays the same.
        self.nodes = [get_gradient_edge(parameter).node for parameter in parameters if self.trained]
        self._gathering: Pending | None = None
        self._reducing: Pending | None = None
        self.begin()
        if not keeps_whole:
            self.free()

    def _new_shard(self, part: Tensor, dtype: torch.dtype, *, apart: bool) -> Tensor:
        return part.to(dtype, copy=apart)

    @property
    def group(self) -> Hashable:
        return self.bucket.kind[0]  # type: ignore[index]

    @property
    def first_name(self) -> str:
        return self.bucket.pieces[0].name

    def part_of(self, whole: Tensor) -> Tensor:
        """What this rank owns of a tensor like `whole`."""
        return whole.chunk(self.owners.size)[self.owners.rank]

    def owned(self) -> Iterator[tuple[Piece, int, slice]]:
        """Each parameter, from which of its elements on this rank owns some, and where these lie in the shard."""
        begin = self.owners.rank * self.shard.numel()
        for piece in self.bucket.pieces:
            first, end = (min(max(at - begin, 0), self.shard.numel()) for at in (piece.start, piece.end))
            yield piece, begin + first - piece.start, slice(first, end)

    def _view(self, whole: Tensor, index: int) -> Tensor:
        """The parameter's place in a tensor like `whole`."""
        piece = self.bucket.pieces[index]
        return whole[piece.start : piece.end].view(piece.shape)

    # ---- parameters ----

    def start_gather(self) -> None:
        """Every rank's shard on its way into `whole`, which has its storage again."""
        storage = self.whole.untyped_storage()
        if storage.nbytes() != self.whole.nbytes:  # resize_ to the same size would copy all
            storage.resize_(self.whole.nbytes)
        self._gathering = collectives.start_all_gather_into(self.whole, self._own_part(), self.owners)

    def _own_part(self) -> Tensor:
        """The shard in the parameters' dtype."""
        part = self.shard.detach()
        return part if part.dtype == self.whole.dtype else self.part_of(self.whole).copy_(part)

    def finish_gather(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None
            make_whole(self.parameters)

    def free(self) -> None:
        """`whole` and the parameters keep their shapes alone."""
        self.finish_gather()
        take_apart(self.parameters)
        self.whole.untyped_storage().resize_(0)

    def send_back(self) -> None:
        """The shard was updated: let it come to where it is gathered from."""

    def take_written(self) -> None:
        """The shard becomes what was written into the parameters."""
        self.shard.data.copy_(self.part_of(self.whole))

    # ---- gradients ----

    def begin(self) -> None:
        """No gradient yet, and no memory for any: a forward has it."""
        self.finish_reduce()
        self.waits = False
        self.shard.grad = self.total = self.gradients = None
        for parameter in self.parameters:
            parameter.grad = None

    def await_gradients(self) -> None:
        """What the backward that is going on will find."""
        execute = torch._C._will_engine_execute_node  # type: ignore[attr-defined]
        self.missing = {index for index, node in enumerate(self.nodes) if execute(node)}

    def add(self, index: int) -> None:
        """What a backward left in a parameter's `.grad`, if anything, goes to `gradients`, if it is not there.

        Where gradients stay as autograd finds them, `.grad` is there from then on.
        """
        self.waits = True
        parameter = self.parameters[index]
        found = parameter.grad
        if found is None:  # a product added it, or will
            return
        view = self._room(index)
        if view.data_ptr() == found.data_ptr():
            return
        if index not in self._blank:
            view.add_(found, alpha=self._scale)
        elif view.dtype == found.dtype:
            torch.mul(found, self._scale, out=view)
        else:
            view.copy_(found).mul_(self._scale)
        self._blank.discard(index)
        as_found = view.dtype == found.dtype and self._scale == 1
        parameter.grad = view if self.keeps_gradients and as_found else None

    def add_product(self, index: int, product: Product) -> None:
        """It is of a parameter's gradient."""
        view = self._room(index)
        if index in self._blank:  # a product is quicker where the caches are warm, and its copy costs little
            torch.mul(product.make(), self._scale, out=view)
        else:
            product.add_to(view, self._scale)
        self._blank.discard(index)

    def add_rows(self, index: int, dy: Tensor, ids: Tensor) -> None:
        """Row dy[i] is of row ids[i] of a parameter's gradient."""
        view = self._room(index)
        if index in self._blank:
            view.zero_()
        view.index_add_(0, ids, dy, alpha=self._scale)
        self._blank.discard(index)

    def _room(self, index: int) -> Tensor:
        """The parameter's place in `gradients`."""
        if self.gradients is None:
            self.gradients = self.whole.new_empty(self.bucket.size, dtype=self.gradient_dtype)
            self._blank = set(range(len(self.parameters)))
        return self._view(self.gradients, index)

    def start_reduce(self) -> None:
        """The sum of what was found on its way; of zeros if nothing was, since all ranks reduce the same buckets."""
        self.finish_reduce()
        self.waits = False
        if self.gradients is None:
            found = self.whole.new_zeros(self.bucket.size, dtype=self.gradient_dtype)
        else:
            found = self.gradients
            for index in self._blank:
                self._view(found, index).zero_()
            found[self.bucket.numel :].zero_()
        if self._whole_at_once:
            self._reducing = collectives.start_all_reduce(found, self.copies)
            return
        in_place = self.keeps_gradients or self.owners.size == 1
        out = self.part_of(found) if in_place else found.new_empty(self.shard.numel())
        self._reducing = collectives.start_reduce_scatter_into(out, found, self.owners)
        if not self.keeps_gradients:
            self.gradients = None

    @property
    def _whole_at_once(self) -> bool:
        """Nothing to scatter, and one reduction a step: it goes over the copies at once."""
        return self.keeps_gradients and self.owners.size == 1

    def finish_reduce(self) -> None:
        if self._reducing is None:
            return
        found, self._reducing = self._reducing.wait(), None
        self.total = found if self.total is None or self.keeps_gradients else self.total.add_(found)

    def start_copies(self) -> Pending:
        """The sum over the copies of this shard, if it is not there yet."""
        total = self.total
        if total is None:
            total = self.total = torch.zeros_like(self.shard, dtype=self.gradient_dtype, requires_grad=False)
        if self._whole_at_once:
            return Pending("all_reduce", self.copies, None, lambda: total)
        return collectives.start_all_reduce(total, self.copies)

    def finish(self) -> None:
        """The mean becomes the shard's gradient."""
        assert self.total is not None
        self.shard.grad, self.total = self.total.to(self.shard.dtype), None
