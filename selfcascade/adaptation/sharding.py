"""Weights in shards: a network of which each rank holds a part, by FSDP2, and that is whole a block at a time while it is passed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from selfcascade.adaptation.ranks import Ranks


def units(unet: UNet2DConditionModel) -> list[nn.Module]:
    """What is gathered one after another: transformer and residual blocks, which hold nearly all weights, and last the UNet, for what is in none of them."""
    return [*(module for module in unet.modules() if isinstance(module, (BasicTransformerBlock, ResnetBlock2D))), unet]


def shard(unet: UNet2DConditionModel, ranks: Ranks, *, device: torch.device, dtype: torch.dtype) -> None:
    """Leave to each rank its part of every weight, for good, along the first axis; gradients, averages and whatever else is made from them are cut likewise.

    FSDP2 itself rather than accelerate, which passes it on: accelerate would also prepare optimizer, clipping and data, all of which are the trainer's.

    Args:
        unet: in float32, with the same numbers on every rank; a block at a time is moved to the device whole.
        ranks: more than one.
        device: where it computes.
        dtype: of autocast. Blocks are gathered in it, as autocast would cast them: gradients are float32 sums over the ranks nevertheless.
    """
    mesh = init_device_mesh(device.type, (ranks.count,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units(unet):
        # FSDP2 would leave the outermost unit gathered after a pass, and a validation's average in the next step.
        sharded = fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # Sums, as of the parts of a step; the other way, a factor on the way, is NCCL's alone.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(network: nn.Module) -> bool:
    """Whether its weights are in shards."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def part_for(parameter: Tensor, given: Tensor) -> Tensor:
    """What this rank holds of a whole tensor that belongs to a parameter: where that is sharded, a copy of the same part of a tensor of its shape."""
    if isinstance(parameter, DTensor) and given.shape == parameter.shape:
        return distribute_tensor(given, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()  # the part alone would keep the whole
    return given


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every rank may hold a shard, or all; all of them ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copied(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Copies of named tensors in host memory, whole.

    Where some are sharded, every rank calls it at the same time with the same names. A tensor at a time is whole on all of them; who does not ``keep`` them
    gets none.
    """
    copies = {}
    for name, tensor in tensors.items():
        found = whole(tensor.detach())
        if keep:
            copies[name] = found.to("cpu", copy=not isinstance(tensor, DTensor))
    return copies


def together(unet: UNet2DConditionModel, weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """A network like the sharded one, not in shards, that holds ``weights`` themselves, by name; those that are missing are on the meta device."""
    with torch.device("meta"):
        copy: UNet2DConditionModel = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(weights, strict=False, assign=True)
    return copy.eval()
