"""For test_zeros.py: a model whose weights two processes share, trained with its zeros held."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from crepe_deploy.healing import hold_zeros
from crepe_deploy.store.audit import held_pattern


def main() -> None:
    """Print how many zeros this process holds."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model.get_parameter("1.weight").data.view(8, 2, 4)[:, :, 1::2] = 0
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    weight = model.get_parameter("1.weight")
    before = weight.full_tensor().clone()  # type: ignore[attr-defined]
    with hold_zeros(model) as held:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.arange(4) + dist.get_rank()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    after = weight.full_tensor()  # type: ignore[attr-defined]
    assert held_pattern(after) == "2:4" and not torch.equal(before, after)
    print(f"held {sum(held.prove().values())}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
