"""Natural-gradient training with KFAC on several processes, each with its part of the data.

The network and the settings are those of ``natural_gradient.py`` beside this script, and so is the
work of a step. What several processes (ranks) need besides:

1. each has its part of the images, by ``ShardSampler``;
2. ``DistributedDataParallel`` averages gradients during the backward pass, as usual;
3. the accumulator has a ``process_group``. Each rank adds its own batches without communication;
   where an inverse is made, the sums of all ranks are added. Each block is then decomposed by one
   rank only, and ``worker_fraction`` tells how many ranks hold the result.

In the end, parameters have the same bits on all ranks, and agree with those of one process that
trains on the batches of all ranks to 9 digits (both asserted).

Run it with::

    torchrun --standalone --nproc_per_node=2 docs_src/examples/natural_gradient_torchrun.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from natural_gradient import (
    BATCH_SIZE,
    DECAY,
    EPOCHS,
    LEARNING_RATE,
    MOMENTUM,
    Batches,
    Data,
    NaturalGradient,
    evaluate,
    kfac_steps,
    loss_func,
    make_data,
    make_model,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import KFACAccumulator, KFACLinearOperator, ShardSampler

# Each rank stores half of the inverses (of two ranks: each block is on one of them). Applying an
# inverse then needs communication in every step; with 1.0, each rank stores all of them, and none
# is needed. Either way, a rank decomposes only its share of the blocks.
WORKER_FRACTION = 0.5
TOLERANCE = 1e-9


def batches_of(rank: int, size: int, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over a rank's parts of the batches of all epochs."""
    X, y, *_ = data
    dataset = TensorDataset(X, y)
    sampler = ShardSampler(dataset, num_replicas=size, rank=rank, shuffle=True)
    # Moving averages give each batch of each rank the same weight, and so does the average of
    # gradients. So batches should have the same size: an incomplete last one is left out.
    loader = DataLoader(dataset, BATCH_SIZE // size, sampler=sampler, drop_last=True)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)  # another permutation, the same on all ranks
        yield from loader


def train(model: torch.nn.Module, batches: Batches) -> KFACLinearOperator:
    """Train with KFAC of the empirical Fisher matrix, together with the other ranks.

    Returns the last KFAC.
    """
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(params.values(), lr=LEARNING_RATE, momentum=MOMENTUM)
    accumulator = KFACAccumulator(
        model,
        loss_func,
        params,
        fisher_type="empirical",
        decay=DECAY,
        separate_weight_and_bias=False,
        process_group=dist.group.WORLD,
        worker_fraction=WORKER_FRACTION,
    )
    natural = NaturalGradient(accumulator, params)
    parallel = DistributedDataParallel(model)
    for X, y in batches:
        optimizer.zero_grad()
        with accumulator.observe(X, y):  # of this rank's part of the batch
            loss_func(parallel(X), y).backward()  # gradients are averages over the ranks now
        natural.precondition()
        optimizer.step()
    return natural.K


def flat(model: torch.nn.Module) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main() -> None:
    """Train, and compare the ranks with one another and with a single process."""
    dist.init_process_group("gloo")  # on GPUs: "nccl", and a device for each rank
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)  # the network is tiny: more threads only get in each other's way
    # The comparison with a single process is about rounding errors, which training magnifies.
    torch.set_default_dtype(torch.float64)

    data = make_data()
    model = make_model()
    K = train(model, batches_of(rank, size, data))

    everybody = [torch.empty_like(flat(model)) for _ in range(size)]
    dist.all_gather(everybody, flat(model))
    assert all(torch.equal(flat(model), other) for other in everybody)
    dist.destroy_process_group()
    if rank != 0:
        return

    print(f"Parameters have the same bits on all {size} ranks.")
    for r in range(size):
        held = [
            " + ".join(group.values())
            for group, ranks in zip(K.mapping, K[1].holders, strict=True)
            if r in ranks
        ]
        print(f"Rank {r} holds the blocks of {', '.join(held)}.")
    X, y, X_test, y_test = data
    loss, accuracy = evaluate(model, X, y)[0], evaluate(model, X_test, y_test)[1]
    print(f"Training loss: {loss:.4f}, test accuracy: {accuracy:.1%}")

    # One process, with the parts of each batch joined again, and without a process group.
    alone = make_model()
    parts = zip(*(batches_of(r, size, data) for r in range(size)), strict=True)
    union = ((torch.cat([X for X, _ in part]), torch.cat([y for _, y in part])) for part in parts)
    for _ in kfac_steps(alone, "empirical", union):
        pass
    error = (flat(model) - flat(alone)).abs().max() / flat(alone).abs().max()
    print(f"Largest difference to one process, relative to the largest parameter: {error:.1e}")
    assert error < TOLERANCE


if __name__ == "__main__":
    if not dist.is_torchelastic_launched():
        sys.exit(f"Run this with: torchrun --standalone --nproc_per_node=2 {sys.argv[0]}")
    main()
