"""LoRA on every linear layer of the UNet (arXiv 2106.09685), sampled directly at the size that it was trained at: the paper's rows LoRA-R4 and LoRA-R32.

The paper's counts, 1.9M and 15M on SD 2.1, are those of every ``nn.Linear``: attention, feed-forward, projections and time embeddings, 484,608 numbers a
rank. It lists 1.2 times the inference time of the base, so its LoRA was not merged; neither is ours.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from diffusers import ImagePipelineOutput, ModelMixin, StableDiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError
from torch import Tensor, nn

from selfcascade.baselines import direct
from selfcascade.baselines.baseline import Baseline
from selfcascade.baselines.finetune import FILES, Finetune, Record, find_finetune
from selfcascade.cascade.families import BaseSpec
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError

NAME = "default"
"""peft's name of an adapter that has none; it is no part of what diffusers saves."""


class Lora(nn.Module):
    """The trained numbers alone: of every linear layer from m to n, A (rank, m) and B (n, rank), which add ``B A x`` to its output.

    In training the parameters are those inside a UNet that runs with them, see :meth:`on`. A parameter is called as diffusers calls it in a file, with
    slashes for dots, which torch does not allow in names.
    """

    def __init__(self, weights: dict[str, nn.Parameter], record: Record) -> None:
        """Hold ``weights`` by their names in a UNet, such as ``mid_block.resnets.0.time_emb_proj.lora_A.weight``."""
        super().__init__()
        self.record = record
        for name, parameter in weights.items():
            self.register_parameter(name.replace(".", "/"), parameter)

    @classmethod
    def on(cls, unet: ModelMixin, rank: int, *, base: str | None = None, size: tuple[int, int] | None = None) -> Self:
        """Add a fresh LoRA to a UNet, by diffusers' and peft's own means; from then on gradients reach it alone.

        A is normal with standard deviation 1 / rank and comes from torch's default generator; B is zero, so that the UNet's output is what it was, bit for
        bit. The factor on ``B A`` is 1.

        Args:
            unet: of the base; its modules change.
            rank: of A and B.
            base: ``name@version`` of it.
            size: height and width in pixels of the pictures to train on.

        Raises:
            SettingsError: peft is not installed.
        """
        check_peft()
        from peft import LoraConfig

        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=linear_layers(unet)), NAME)
        added = {name.replace(f".{NAME}.", "."): parameter for name, parameter in unet.named_parameters() if ".lora_" in name}
        return cls(added, Record(way="lora", base=base, size=size, rank=rank))

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **_: Any) -> Self:
        """As :meth:`save_pretrained` left it."""
        found = find_finetune(str(folder), "lora")
        weights = {name.removeprefix("unet."): nn.Parameter(tensor) for name, tensor in safetensors.torch.load_file(found.weights).items()}
        return cls(weights, found.record)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the file that ``load_lora_weights`` of a stock diffusers pipeline takes, and what it was trained for.

        It carries no LoraConfig, whose sets come in another order each time: diffusers reads rank and factor from the tensors alone.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {f"unet.{name}": tensor.contiguous() for name, tensor in self.weights().items()}
        safetensors.torch.save_file(tensors, Path(folder, *FILES["lora"]), metadata={"format": "pt"})
        self.record.save(Path(folder))

    def weights(self) -> dict[str, Tensor]:
        """Every A and B by its name in a UNet, detached."""
        return {name.replace("/", "."): parameter.detach() for name, parameter in self.named_parameters()}

    def added_to(self, unet: ModelMixin) -> ModelMixin:
        """A UNet of its own with these numbers added, see :func:`adapted`."""
        return _loaded(unet, {f"unet.{name}": tensor for name, tensor in self.weights().items()})


def linear_layers(unet: nn.Module) -> list[str]:
    """Names of all ``nn.Linear`` inside."""
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]


def adapted(unet: ModelMixin, found: Finetune) -> ModelMixin:
    """A UNet with the LoRA added and not merged; the UNet that is given stays as it is and shares its weights with it.

    Args:
        unet: of the base, without a LoRA.
        found: by :func:`~.finetune.find_finetune`; also one that others trained.

    Raises:
        SettingsError: peft is not installed, the UNet has a LoRA already, or the file holds something else, or does not fit; one line.
    """
    check_peft()
    try:
        state = StableDiffusionPipeline.lora_state_dict(found.folder, weight_name=found.weights.name, use_safetensors=True, unet_config=unet.config)
        return _loaded(unet, *state)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"LoRA {found.reference!r} does not load into the base's UNet: {' '.join(str(error).split())[:300]}") from None


def shared(unet: ModelMixin) -> ModelMixin:
    """The same weights, in memory once, in modules of their own; frozen. What is added to the one is not added to the other.

    Raises:
        SettingsError: the UNet has a LoRA already.
    """
    if getattr(unet, "peft_config", None):
        raise SettingsError("the pipeline's UNet has a LoRA already; unload it (unload_lora_weights), or leave adapter out")
    with torch.device("meta"):
        own = type(unet).from_config(unet.config)
    own.load_state_dict(unet.state_dict(), assign=True)
    return own.eval().requires_grad_(False)


def sample(
    pipeline: SelfCascadePipeline,
    prompt: str | list[str] | None = None,
    *,
    height: int,
    width: int,
    settings: BaselineSettings = BaselineSettings(),
    adapter: str | PathLike[str] | None = None,
    **call: Any,
) -> ImagePipelineOutput:
    """Pictures of that size in a single stage, by the base with its LoRA, arguments as in :mod:`~.baseline`.

    ``adapter`` is a folder or artifact of the LoRA, loaded for this call into a UNet of its own. Without it the pipeline's UNet has one already
    (``load_lora_weights`` of the stock pipeline that it was made from).

    Raises:
        SettingsError: there is no LoRA, it was trained for another base, or peft is not installed; or as the pipeline's call.
    """
    if adapter is not None:
        found = find_finetune(str(adapter), "lora")
        found.check_base(pipeline.config.base)
        pipeline = pipeline.from_pipe(pipeline, unet=adapted(pipeline.unet, found))
    elif not getattr(pipeline.unet, "peft_config", None):
        raise SettingsError("method 'lora' needs a LoRA in the UNet; set generation.finetuned (adapters/NAME or a folder), or give adapter=")
    return direct.sample(pipeline, prompt, height=height, width=width, **{"eta": settings.eta} | call)


def refusal(spec: BaseSpec, height: int, width: int, settings: BaselineSettings) -> str | None:
    """Why a LoRA cannot be used here, or None."""
    try:
        check_peft()
    except SettingsError as error:
        return str(error)
    return None


def _loaded(unet: ModelMixin, state: dict[str, Tensor], alphas: dict[str, float] | None = None) -> ModelMixin:
    elsewhere = sorted({name.partition(".")[0] for name in state if not name.startswith("unet.")})
    if elsewhere or not state:
        raise SettingsError(f"this LoRA holds weights of {', '.join(elsewhere) or 'nothing'}; the baseline takes one of the UNet alone")
    own = shared(unet)
    layers = {name.removeprefix("unet."): tensor for name, tensor in state.items()}
    if not any(".lora_A." in name for name in layers):
        layers = convert_unet_state_dict_to_peft(layers)  # other trainers' names, as diffusers reads them below
    unknown = {name.partition(".lora_")[0] for name in layers} - {name for name, _ in own.named_modules()}
    if unknown:
        raise SettingsError(f"this LoRA is for layers that the base's UNet does not have, such as {min(unknown)}; choose one of this base")
    # This way peft takes the tensors as they are, where otherwise it first draws weights from torch's own generator.
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, own, low_cpu_mem_usage=True)
    for name, parameter in own.named_parameters():
        if ".lora_" in name:
            # Copied: tensors that lie inside a mapped file are not aligned, and kernels then sum in another order.
            parameter.data = parameter.data.to(device=unet.device, dtype=unet.dtype, copy=True)
    return own.eval().requires_grad_(False)


def check_peft() -> None:
    """Refuse to go on where peft is not installed.

    Raises:
        SettingsError: names the extra that installs it.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise SettingsError("LoRA needs the package peft, which is not installed; pip install 'selfcascade[lora]'") from None


LORA = Baseline("lora", "the target size from noise by the base with a LoRA on every linear layer", refusal, sample)
