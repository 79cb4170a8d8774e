"""One of several processes that train together; writes its gradient down."""

import sys

import torch
from torch import distributed, nn

from slivo.distill import gathered, relations


def main() -> None:
    rank, world, address, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    torch.manual_seed(0)
    student, x, y = nn.Linear(3, 4), torch.randn(8, 3), torch.randn(8, 5)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found = {}
    for name, loss in (("distance", relations.rkd_distance), ("cka", relations.cka)):
        value = gathered(loss)(student(x[part]), y[part])
        (gradient,) = torch.autograd.grad(value, student.weight)
        distributed.all_reduce(gradient)  # as data-parallel training does, which takes the mean
        found[name] = (value.detach(), gradient / world)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
