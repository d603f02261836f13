"""Block-diagonal operators whose blocks are spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from curvlinops._damping import Damping
from curvlinops._formats import Columns
from curvlinops._operator import PyTorchLinearOperator, map_state, of_block
from curvlinops._saving import FORMAT_VERSION, rebuild_operator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.distributed import Collective
from curvlinops.distributed.transfers import broadcast, share


class RemoteBlock(PyTorchLinearOperator):
    """Stands for a square block that other processes hold.

    Args:
        size: Its number of rows.
        holders: The ranks that hold it, by the numbers that users know.
        like: An empty tensor of its device and dtype.
    """

    _init_args = ("size", "holders", "like")
    SELF_ADJOINT = True

    def __init__(self, size: int, holders: Sequence[int], like: Tensor):
        super().__init__([(size,)], [(size,)])
        self.size = size
        self.holders = list(holders)
        self.like = like

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{self!r} has no {name} here: {self._where()}")

    def _where(self) -> str:
        """Return where the block is, and how to get it."""
        return (
            f"the block is stored on rank(s) {self.holders}. Use curvlinops.sharded.gathered(K) on "
            "all ranks for an operator that has all blocks."
        )

    def _matmat(self, X: Columns) -> Columns:
        raise RuntimeError(f"{self!r} cannot multiply: {self._where()}")

    def _missing(self, form: str) -> Exception:
        return RuntimeError(f"{self!r} has no {form} here: {self._where()}")

    def _resolve_damping(self, damping: Damping) -> Any:
        return 0.0  # those that hold the block know


class ShardedBlockDiagonalLinearOperator(BlockDiagonalLinearOperator):
    r"""A block-diagonal operator of square blocks, each of which some processes hold.

    Every process multiplies the blocks that it holds; what other processes lack, the first holder
    of a block, its owner, sends to them. So does the owner of what is expensive: it decomposes or
    inverts the block and sends the result to the block's other holders. If each process holds
    every block, products need no communication. All processes make the same calls in the same
    order, with the same vectors.

    Args:
        blocks: The blocks, on one vector each; anything of the same size where this process does
            not hold the block.
        holders: The ranks that hold each block, its owner first.
        collective: The processes.
    """

    _init_args = ("blocks", "holders", "collective")  # type: ignore[assignment]

    def __init__(
        self,
        blocks: Sequence[PyTorchLinearOperator],
        holders: Sequence[Sequence[int]],
        collective: Collective,
    ):
        self.holders = [list(ranks) for ranks in holders]
        self.collective = collective
        super().__init__(
            [
                block if collective.rank in ranks else _remote(block, map(collective.name, ranks))
                for block, ranks in zip(blocks, self.holders, strict=True)
            ]
        )

    def _like(self, blocks: Sequence[PyTorchLinearOperator]) -> ShardedBlockDiagonalLinearOperator:
        return ShardedBlockDiagonalLinearOperator(blocks, self.holders, self.collective)

    def _fits(self, other: BlockDiagonalLinearOperator) -> bool:
        return (
            isinstance(other, ShardedBlockDiagonalLinearOperator)
            and other.holders == self.holders
            and super()._fits(other)
        )

    def _blockwise(
        self, function: Callable[[PyTorchLinearOperator], PyTorchLinearOperator]
    ) -> BlockDiagonalLinearOperator:
        return self._like([b if isinstance(b, RemoteBlock) else function(b) for b in self])

    def _decomposed(
        self, function: Callable[..., PyTorchLinearOperator], *values: Sequence[Any]
    ) -> BlockDiagonalLinearOperator:
        """Return the operator of what the owner of each block makes of it."""
        arguments = list(zip(self._blocks, *values, strict=True))
        with self.collective.together():
            own = {i: of_block(i, function, *arguments[i]) for i in self._own()}
        blocks = [own.get(i, block) for i, block in enumerate(self._blocks)]
        shared = [i for i, ranks in enumerate(self.holders) if len(ranks) > 1]
        if shared:
            sent = share(
                self.collective,
                {i: _plain(block) for i, block in own.items() if i in shared},
                [ranks[0] for ranks in self.holders],
            )
            for i, plain in sent.items():
                if self.collective.rank in self.holders[i]:
                    blocks[i] = _operator(plain)
        return self._like(blocks)

    def _resolve_damping(self, damping: Damping) -> list[Any]:
        with self.collective.together():  # a function of blocks sees those that are held
            return super()._resolve_damping(damping)

    def _own(self) -> list[int]:
        """Return the numbers of the blocks that this process owns."""
        return [i for i, ranks in enumerate(self.holders) if ranks[0] == self.collective.rank]

    def _is_whole(self) -> bool:
        """Return whether each process holds every block."""
        return all(len(ranks) == self.collective.size for ranks in self.holders)

    # ---- products --------------------------------------------------------------------------------
    def _matmat(self, X: Columns) -> Columns:
        return self._complete(lambda i: self._blocks[i]._matmat([X[i]])[0], [x.shape for x in X])

    def _adjoint_matmat(self, X: Columns) -> Columns:
        return self._complete(
            lambda i: self._blocks[i]._adjoint_matmat([X[i]])[0], [x.shape for x in X]
        )

    def _complete(
        self, function: Callable[[int], Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Return a tensor for each block, computed where it is held and sent to the others."""
        collective = self.collective
        held = [i for i, ranks in enumerate(self.holders) if collective.rank in ranks]
        if self._is_whole():
            return [function(i) for i in held]
        with collective.together(sum(map(prod, shapes))):
            results = {i: function(i) for i in held}
        for owner in range(collective.size):
            sent = [
                i
                for i, ranks in enumerate(self.holders)
                if ranks[0] == owner and len(ranks) < collective.size
            ]
            if not sent:
                continue
            sizes = [prod(shapes[i]) for i in sent]
            if collective.rank == owner:
                buffer = torch.cat([results[i].reshape(-1) for i in sent])
            else:
                buffer = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
            parts = broadcast(collective, buffer, owner).split(sizes)
            for i, part in zip(sent, parts, strict=True):
                results.setdefault(i, part.reshape(tuple(shapes[i])))
        return [results[i] for i in range(len(self))]

    # ---- closed forms ----------------------------------------------------------------------------
    def trace(self) -> Tensor:
        """Return the sum of the blocks' traces."""
        return torch.stack(self._numbers(lambda block: block.trace())).sum()

    def diagonal(self) -> Tensor:
        """Return the blocks' diagonals one after the other."""
        shapes = [(block.shape[0],) for block in self._blocks]
        return torch.cat(self._complete(lambda i: self._blocks[i].diagonal(), shapes))

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of the blocks' squared norms."""
        norms = self._numbers(lambda block: block.frobenius_norm())
        return torch.linalg.vector_norm(torch.stack(norms))

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the product of the blocks' signs and the sum of their logarithms."""
        pairs = self._numbers(lambda block: torch.stack(block.slogdet()), 2)
        signs, logs = torch.stack(pairs).unbind(1)
        return signs.prod(), logs.sum()

    def _numbers(
        self, function: Callable[[PyTorchLinearOperator], Tensor], count: int = 0
    ) -> list[Tensor]:
        """Return a number (or a few) for each block."""
        shapes = [(count,) if count else ()] * len(self)
        return self._complete(lambda i: function(self._blocks[i]), shapes)

    # ---- other forms -----------------------------------------------------------------------------
    def gathered(self) -> BlockDiagonalLinearOperator:
        """Return an operator that has all blocks and needs no other process; on all ranks."""
        with self.collective.together():
            own = {i: _plain(self._blocks[i]) for i in self._own()}
        if self._is_whole():
            return BlockDiagonalLinearOperator(self.blocks)
        plain = share(self.collective, own, [ranks[0] for ranks in self.holders])
        return BlockDiagonalLinearOperator([_operator(plain[i]) for i in range(len(self))])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError(
            f"{self!r} is spread over processes: save curvlinops.sharded.gathered(K), which is "
            "called on all of them."
        )


def gathered(operator: Any) -> Any:
    """Return an operator whose blocks are all in this process, and which needs no other one.

    Args:
        operator: An operator that was built with a ``process_group``, or what was made of it. All
            ranks call this.

    Returns:
        An operator of the same type. One whose blocks are not spread over processes stays as it is.
    """
    if isinstance(operator, ShardedBlockDiagonalLinearOperator):
        return operator.gathered()
    if not isinstance(operator, PyTorchLinearOperator) or not any(_sharded(operator)):
        return operator
    return type(operator)._from_state(map_state(operator._state(), gathered))


def _sharded(item: Any) -> Iterator[bool]:
    """Iterate over whether the operators in a state are spread over processes."""
    if isinstance(item, ShardedBlockDiagonalLinearOperator):
        yield True
    elif isinstance(item, PyTorchLinearOperator):
        yield from _sharded(item._state())
    elif isinstance(item, dict):
        yield from _sharded(list(item.values()))
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from _sharded(value)


def _remote(block: PyTorchLinearOperator, holders: Iterable[int]) -> RemoteBlock:
    """Return what stands for a block that is not held."""
    like = torch.empty(0, dtype=block.dtype, device=block.device)
    return RemoteBlock(block.shape[0], list(holders), like)


def _plain(item: Any) -> Any:
    """Return tensors and plain values for an operator, with the name of its type."""
    if isinstance(item, PyTorchLinearOperator):
        return {"operator": type(item).__name__, "state": _plain(item._state())}
    if type(item) is dict:
        return {key: _plain(value) for key, value in item.items()}
    if type(item) in (list, tuple):
        return type(item)(map(_plain, item))
    return item


def _operator(plain: Any) -> Any:
    """Return the operator that :func:`_plain` was called of."""
    if type(plain) is dict and set(plain) == {"operator", "state"}:
        return rebuild_operator(FORMAT_VERSION, plain["operator"], _operator(plain["state"]))
    if type(plain) is dict:
        return {key: _operator(value) for key, value in plain.items()}
    if type(plain) in (list, tuple):
        return type(plain)(map(_operator, plain))
    return plain


__all__ = ["RemoteBlock", "ShardedBlockDiagonalLinearOperator", "gathered"]
