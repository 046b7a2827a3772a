"""Data parallelism: every process takes its share of each batch's examples, sums go over all processes, everybody ends with all rewards.

The optimizer and the metric are computed by every process on the same numbers, so parameters need no exchange.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dpgbench.metagrad.inputs import Batch
from dpgbench.metagrad.optimizers import Cotangents, Params


class WholeBatch:
    """One process: the whole batch is its share and every sum is already complete."""

    def rows(self, count: int) -> slice:
        return slice(0, count)

    def check_agreement(self, steps: Sequence[Batch], weights: Tensor, params: Params) -> None:
        pass

    def summed(self, tensors: Cotangents, like: Params) -> Cotangents:
        return tensors

    def collected(self, rewards: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        return torch.cat(list(rewards))


class ShardedBatch(WholeBatch):
    """The processes of torch.distributed's default group (torchrun). Raises ValueError when there is none."""

    def __init__(self) -> None:
        import torch.distributed as distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "data_parallel=True without a process group: torch.distributed must be initialised;"
                " start with torchrun and call torch.distributed.init_process_group() first"
            )
        self.distributed, self.rank, self.size = distributed, distributed.get_rank(), distributed.get_world_size()

    def rows(self, count: int) -> slice:
        """This process's rows of a batch of `count`: contiguous, and of equal number up to one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def check_agreement(self, steps: Sequence[Batch], weights: Tensor, params: Params) -> None:
        """Raises ValueError, in every process, where two were given different examples, weights or parameters."""
        what = {
            "batches": [tensor for step in steps for tensor in step],
            "weights": [weights],
            "parameters": [torch.stack([theta.double().sum() for theta in params.values()])],  # hashing a billion takes too long
        }
        mine = torch.tensor([_hash(tensors) for tensors in what.values()], device=weights.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        self.distributed.all_gather(everyone, mine)
        for index, name in enumerate(what):
            odd = [rank for rank, theirs in enumerate(everyone) if theirs[index] != everyone[0][index]]
            if odd:
                raise ValueError(
                    f"data_parallel: the {name} of rank {odd[0]} are not those of rank 0: every process must be given the same,"
                    " the engine takes the shares; build them from one seed"
                )

    def summed(self, tensors: Cotangents, like: Params) -> Cotangents:
        """Sums over all processes, in one exchange. None counts as zero, because another process may have something to add."""
        flat = torch.cat(
            [(torch.zeros_like(theta) if tensors.get(name) is None else tensors[name]).flatten() for name, theta in like.items()]
        )
        self.distributed.all_reduce(flat)
        parts = flat.split([theta.numel() for theta in like.values()])
        return {name: part.view_as(theta).to(theta.dtype) for (name, theta), part in zip(like.items(), parts, strict=True)}

    def collected(self, rewards: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """All rewards, (N,) or (N, L), in the order of the concatenated batches, from every process's shares."""
        pieces = []
        for share, count in zip(rewards, counts, strict=True):
            whole = share.new_zeros(count, *share.shape[1:])
            whole[self.rows(count)] = share
            pieces.append(whole)
        everything = torch.cat(pieces)
        self.distributed.all_reduce(everything)
        return everything


def _hash(tensors: Sequence[Tensor]) -> int:
    code = 0
    for tensor in tensors:
        code = zlib.crc32(repr(tuple(tensor.shape)).encode(), code)
        code = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), code)
    return code
