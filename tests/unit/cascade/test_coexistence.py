"""What users do to a pipeline goes on working in a cascade: LoRAs, image prompts, ControlNets, textual inversions, and diffusers' own switches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import accelerate
import models
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import ImageProjection
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image
from test_cascade_pipeline import PROMPTS, generators, quiet, sample
from test_injection import case, hooks, normal
from test_upsampler import randomised

from selfcascade import SelfCascadePipeline
from selfcascade.baselines.attention_scaling import scaled_attention
from selfcascade.cascade.control import Control
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import attached, pivot_features, unet_with_pivot
from selfcascade.cascade.upsampler import FeatureUpsampler


def stock_base(kind: models.Kind) -> DiffusionPipeline:
    """A whole base, sampled with DDIM, that the test may change."""
    pipeline = models.base(kind)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    return quiet(pipeline)


def cascade(stock: DiffusionPipeline, inject: str = "skip", **components) -> SelfCascadePipeline:
    """The stock pipeline's networks with an upsampler that is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        upsampler = randomised(FeatureUpsampler.for_base(spec_of(stock.unet), variant="C", inject=inject))
    return quiet(SelfCascadePipeline.from_pipe(stock, upsampler=upsampler, **components))


def bits(pipeline: SelfCascadePipeline, **call) -> torch.Tensor:
    """Two stages, three steps, guided by text and pivot."""
    return sample(pipeline, steps=3, **call)


def base_bits(pipeline: DiffusionPipeline, text: tuple | None = None, **call) -> torch.Tensor:
    """The base's own size, by whichever pipeline, of a prompt or of what ``encode_prompt`` made of it."""
    prompt = {"prompt": PROMPTS[0]} if text is None else {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    return pipeline(**prompt, height=64, width=64, num_inference_steps=2, guidance_scale=7.5, generator=generators(0), output_type="latent", **call).images


@contextmanager
def watched(unet: torch.nn.Module, watch: Callable[[dict], object]):
    """What ``watch`` makes of the arguments of every forward pass, with the latent's side."""
    seen: list[tuple[int, object]] = []
    handle = unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0].shape[-1], watch(kwargs))), with_kwargs=True)
    yield seen
    handle.remove()


# ---- LoRA, by diffusers and peft ----


def lora_weights(pipeline: DiffusionPipeline, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on UNet and text encoder as it lies in a file."""
    peft = pytest.importorskip("peft", reason="LoRAs need the extra `lora` (peft)")
    weights = {}
    for part, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj", "v_proj"])):
        network = models.base("small").text_encoder if part == "text_encoder" else type(pipeline.unet).from_config(pipeline.unet.config)
        adapted = peft.get_peft_model_state_dict(peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets), network))
        random = torch.Generator().manual_seed(seed)
        filled = {name: 0.2 * torch.randn(value.shape, generator=random) for name, value in adapted.items()}
        weights |= {f"{part}.{name}": value for name, value in convert_state_dict_to_diffusers(filled).items()}
    return weights


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_a_lora_acts_in_the_cascade_as_its_merged_weights_do(kind):
    """Loaded on the stock pipeline, before or after the cascade is made of it: every pass, the pivot's included, is that of the base with the LoRA fused."""
    stock = stock_base(kind)
    pipeline = cascade(stock)
    plain = bits(pipeline)
    stock.load_lora_weights(lora_weights(stock, seed=1), adapter_name="one")
    adapted = bits(pipeline)
    assert (adapted - plain).abs().max() > 0.01
    assert torch.equal(bits(cascade(stock)), adapted)
    stock.fuse_lora()
    torch.testing.assert_close(bits(pipeline), adapted, atol=1e-3, rtol=1e-3)
    stock.unfuse_lora()
    torch.testing.assert_close(bits(pipeline), adapted, atol=1e-3, rtol=1e-3)
    stock.unload_lora_weights()
    torch.testing.assert_close(bits(pipeline), plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_the_cascade_loads_loras_itself(kind):
    """The same calls on the cascade are those on the stock pipeline: adapters, their weights, switching off, and on again."""
    stock, pipeline = stock_base(kind), cascade(stock_base(kind))
    plain = bits(pipeline)
    for each in (stock, pipeline):
        for name, seed in (("one", 1), ("two", 2)):
            each.load_lora_weights(lora_weights(each, seed), adapter_name=name)
        each.set_adapters(["one", "two"], adapter_weights=[0.5, 0.25])
    assert pipeline.get_active_adapters() == stock.get_active_adapters() == ["one", "two"]
    adapted = bits(pipeline)
    assert torch.equal(adapted, bits(cascade(stock)))
    pipeline.set_adapters("one")
    assert (bits(pipeline) - adapted).abs().max() > 0.01
    pipeline.disable_lora()
    torch.testing.assert_close(bits(pipeline), plain, rtol=1e-4, atol=1e-4)  # peft's layers call the same kernels on memory that lies elsewhere
    pipeline.enable_lora()
    pipeline.set_adapters(["one", "two"], adapter_weights=[0.5, 0.25])
    assert torch.equal(bits(pipeline), adapted)


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_a_loras_scale_is_that_of_the_stock_pipeline_and_holds_in_every_pass(kind):
    """At the base bit for bit the stock pipeline's; in the cascade the same as weights scaled beforehand. The encoder's early end, an exception, undoes its
    share of the scale too: were it left, the scale would decay with every pivot's pass."""
    stock = stock_base(kind)
    pipeline = cascade(stock)
    stock.load_lora_weights(lora_weights(stock, seed=1), adapter_name="one")
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    assert torch.equal(base_bits(quiet(SelfCascadePipeline.from_pipe(stock)), **half), base_bits(stock, **half))
    scaled, full = bits(pipeline, **half), bits(pipeline)
    assert (scaled - full).abs().max() > 0.01
    stock.set_adapters("one", 0.5)
    assert torch.equal(bits(pipeline), scaled)
    stock.set_adapters("one", 1.0)
    assert torch.equal(bits(pipeline), full)


def test_an_error_in_the_middle_leaves_a_lora_at_its_own_scale():
    stock = stock_base("small")
    pipeline = cascade(stock)
    stock.load_lora_weights(lora_weights(stock, seed=1))
    expected = bits(pipeline)

    def stop(*_):
        raise KeyboardInterrupt

    for callback in ({"callback_on_step_end": stop}, {"residuals": stop}):
        with pytest.raises(KeyboardInterrupt):
            bits(pipeline, cross_attention_kwargs={"scale": 0.5}, **callback)
        assert torch.equal(bits(pipeline), expected)
    handle = pipeline.text_encoder.get_input_embeddings().register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        bits(pipeline, cross_attention_kwargs={"scale": 0.5})
    handle.remove()
    assert torch.equal(bits(pipeline), expected)


# ---- image prompts ----


def with_image_prompts(stock: DiffusionPipeline, adapters: int = 1) -> list[torch.Tensor]:
    """IP-Adapters in the UNet, by diffusers' own loader, and embeddings for a guided call, one an adapter."""
    unet, width = stock.unet, 24
    states = []
    for seed in range(adapters):
        random = torch.Generator().manual_seed(seed)
        text = unet.config.cross_attention_dim
        projection = ImageProjection(cross_attention_dim=text, image_embed_dim=width, num_image_text_embeds=4)
        names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
        weights = {}
        for name in names:
            linear = unet.get_submodule(name.removesuffix(".processor")).to_k
            index = 2 * list(unet.attn_processors).index(name) // 2
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{index}.{key}.weight"] = 0.3 * torch.randn(linear.out_features, text, generator=random)
        image_proj = {"proj.weight": projection.image_embeds.weight.data, "proj.bias": projection.image_embeds.bias.data}
        image_proj |= {"norm.weight": projection.norm.weight.data, "norm.bias": projection.norm.bias.data}
        states.append({"image_proj": {k: v.clone() for k, v in image_proj.items()}, "ip_adapter": weights})
    unet._load_ip_adapter_weights(states)
    return [torch.cat([torch.zeros(1, 1, width), normal(1, 1, width, seed=seed)]) for seed in range(adapters)]


@pytest.mark.parametrize(("kind", "adapters"), [("small", 1), ("sd21", 2), ("sdxl", 1)])
def test_image_prompts_act_in_every_pass(kind, adapters):
    """At the base bit for bit the stock pipeline's. In the cascade every pass has them, the pivot's too, with the rows of its branches, jointly and apart."""
    stock = stock_base(kind)
    embeds = with_image_prompts(stock, adapters)
    call = {"ip_adapter_image_embeds": embeds}
    assert torch.equal(base_bits(quiet(SelfCascadePipeline.from_pipe(stock)), **call), base_bits(stock, **call))
    pipeline = cascade(stock)
    with watched(stock.unet, lambda kwargs: kwargs["added_cond_kwargs"]["image_embeds"]) as seen:
        joint = bits(pipeline, **call)
    assert [side for side, _ in seen] == [8, 8, 8] + [8, 16] * 3
    assert all(torch.equal(given, wanted) for _, images in seen for given, wanted in zip(images, embeds, strict=True))
    torch.testing.assert_close(bits(pipeline, joint_branches=False, **call), joint, atol=1e-4, rtol=1e-4)
    other = [embedding.flip(-1) for embedding in embeds]
    assert (bits(pipeline, ip_adapter_image_embeds=other) - joint).abs().max() > 1e-3


def test_an_image_prompt_of_each_sample_stays_with_it():
    stock = stock_base("small")
    (first,) = with_image_prompts(stock)
    pipeline, second = cascade(stock), first.flip(-1)
    each = torch.stack([first[0], second[0], first[1], second[1]])
    together = bits(pipeline, prompt=PROMPTS[:2], seeds=(0, 1), ip_adapter_image_embeds=[each])
    for row, embeds in enumerate((first, second)):
        alone = bits(pipeline, prompt=PROMPTS[row], seeds=(row,), ip_adapter_image_embeds=[embeds])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_an_unloaded_image_prompt_is_gone():
    """The cascade asks for none any more, and samples as before."""
    stock = stock_base("small")
    pipeline = cascade(stock)
    plain = bits(pipeline)
    with_image_prompts(stock)
    stock.unload_ip_adapter()
    assert torch.equal(bits(pipeline), plain)


def test_masks_of_an_image_prompt_are_not_cut_into_rows():
    """One mask, (1, 1, H, W), serves both branches and every stage: all ones is no mask, all zeros no image prompt."""
    stock = stock_base("small")
    embeds = with_image_prompts(stock)
    pipeline = cascade(stock)
    call = {"ip_adapter_image_embeds": embeds, "joint_branches": False}
    ones, zeros = (
        bits(pipeline, cross_attention_kwargs={"ip_adapter_masks": [mask]}, **call) for mask in (torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 64, 64))
    )
    torch.testing.assert_close(ones, bits(pipeline, **call), atol=1e-5, rtol=1e-5)
    assert (ones - zeros).abs().max() > 1e-3


# ---- ControlNets ----


def controlnet_for(unet: torch.nn.Module, seed: int = 0) -> ControlNetModel:
    """A ControlNet of the UNet's shape whose zero convolutions are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16)).eval()
        for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, controlnet.controlnet_cond_embedding.conv_out]:
            torch.nn.init.normal_(block.weight, std=0.3)
    return controlnet


def edges(seed: int = 0, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["small", "sd21", "sdxl"])
def test_control_at_the_base_is_diffusers_own(kind):
    """Bit for bit the stock ControlNet pipeline's latents, at a scale of 0.7."""
    stock = stock_base(kind)
    controlnet = controlnet_for(stock.unet)
    checker = {} if kind == "sdxl" else {"requires_safety_checker": False}
    theirs = StableDiffusionXLControlNetPipeline if kind == "sdxl" else StableDiffusionControlNetPipeline
    reference = quiet(theirs(**{name: part for name, part in stock.components.items() if name != "image_encoder"}, controlnet=controlnet, **checker))
    expected = base_bits(reference, image=edges(), controlnet_conditioning_scale=0.7)
    ours = quiet(SelfCascadePipeline.from_pipe(stock))
    assert torch.equal(base_bits(ours, residuals=Control(controlnet, edges(), scale=0.7)), expected)
    assert (expected - base_bits(ours)).abs().max() > 0.01


@pytest.mark.parametrize("inject", ["skip", "main"])
@pytest.mark.parametrize("kind", ["small", "sd21", "sdxl"])
@torch.no_grad()
def test_residuals_and_pivot_features_add_up(kind, inject):
    """A pass with both: the residuals join in the latent's pass, and the pivot's features are the bits that they are without any; also where a hook of the
    user's gives every pass residuals of the latent's size, which would not fit the pivot."""
    unet, call = models.unet(kind), case(kind)
    added = call.get("added_cond_kwargs")
    control = Control(controlnet_for(unet), edges())
    residuals = control(call["z"], call["t"], call["encoder_hidden_states"], {"added_cond_kwargs": added})
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C", inject=inject))
    condition = {name: value for name, value in call.items() if name not in ("z", "pivot")}
    features = pivot_features(unet, call["pivot"], inject=inject, **condition)
    with_residuals = pivot_features(unet, call["pivot"], inject=inject, **condition, **residuals)
    assert all(torch.equal(a, b) for a, b in zip(features, with_residuals, strict=True))
    out = unet_with_pivot(unet, upsampler=upsampler, **call, **residuals)
    assert torch.equal(out, unet_with_pivot(unet, upsampler=upsampler, features=features, **call | {"pivot": None}, **residuals))
    assert (out - unet_with_pivot(unet, upsampler=upsampler, **call)).abs().max() > 0.01

    handle = unet.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | residuals), with_kwargs=True)
    assert torch.equal(unet_with_pivot(unet, upsampler=upsampler, **call), out)
    handle.remove()


@torch.no_grad()
def test_an_adapters_residuals_are_for_the_latent_alone():
    """A T2I adapter's join inside the down blocks. The pivot's pass has none and its list is not used up; the latent's pass has them all."""
    unet, call = models.unet("sd21"), case("sd21")
    upsampler = randomised(FeatureUpsampler.for_base(spec_of(unet), variant="C"))
    maps = [normal(2, channels, side, side, seed=side) for channels, side in ((32, 16), (48, 8), (64, 4), (64, 2))]
    condition = {name: value for name, value in call.items() if name not in ("z", "pivot")}
    features = pivot_features(unet, call["pivot"], **condition)
    expected = unet_with_pivot(unet, upsampler=upsampler, features=features, **call | {"pivot": None}, down_intrablock_additional_residuals=list(maps))
    given = unet_with_pivot(unet, upsampler=upsampler, **call, down_intrablock_additional_residuals=list(maps))
    assert torch.equal(given, expected)
    assert (given - unet_with_pivot(unet, upsampler=upsampler, **call)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_control_follows_the_stages(kind):
    """Every step of every stage has residuals of its own latent's size, jointly or apart; the pivot's pass has none; each sample keeps its picture."""
    stock = stock_base(kind)
    pipeline, controlnet = cascade(stock), controlnet_for(stock.unet)
    control = Control(controlnet, [edges(0), edges(1)])
    call = {"prompt": PROMPTS[:2], "seeds": (0, 1), "size": 128}
    pivot_or_latent = lambda kwargs: kwargs.get("mid_block_additional_residual") is not None  # noqa: E731
    with watched(stock.unet, pivot_or_latent) as seen:
        together = bits(pipeline, residuals=control, **call)
    assert seen == [(8, True)] * 3 + [(8, False), (16, True)] * 3
    torch.testing.assert_close(bits(pipeline, residuals=control, joint_branches=False, **call), together, atol=1e-4, rtol=1e-4)
    for row in range(2):
        alone = bits(pipeline, prompt=PROMPTS[row], seeds=(row,), residuals=Control(controlnet, edges(row)))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    assert (together - bits(pipeline, **call)).abs().max() > 0.01


# ---- textual inversion ----


def test_a_textual_inversion_is_read_as_its_words():
    """A concept whose vectors are those of "a red cat": its token samples as the words do, in both ways of loading it."""
    stock = stock_base("small")
    ours = cascade(stock_base("small"))
    words = stock.tokenizer("red cat", add_special_tokens=False).input_ids
    vectors = stock.text_encoder.get_input_embeddings().weight[words].detach().clone()
    expected = bits(ours, prompt="a red cat")
    for loader, pipeline in ((stock, cascade(stock)), (ours, ours)):
        loader.load_textual_inversion({"concept": vectors}, token="concept")
        assert torch.equal(bits(pipeline, prompt="a concept"), expected)


# ---- offloading ----


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_model_offload_changes_no_bit(kind):
    """Diffusers' own, with the CPU as its accelerator: every network has its hook, which moves it before its turn, and has it again after the call."""
    pipeline = cascade(stock_base(kind))
    expected = all_ways(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(all_ways(pipeline), expected, strict=True))
        assert all(hasattr(network, "_hf_hook") for network in (pipeline.text_encoder, pipeline.unet, pipeline.vae))
    assert not hasattr(pipeline.upsampler, "_hf_hook")


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_sequential_offload_changes_no_bit(tmp_path, kind):
    """All weights on the meta device, where nothing can be computed; accelerate's hooks load those of a layer when it runs, here from files. Text, both
    passes, decoding, encoding of a user's picture and of a pivot through pixels find the device where layers run; afterwards the weights are away again."""
    pipeline = cascade(stock_base(kind))
    expected = all_ways(pipeline)
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        if getattr(pipeline, name) is not None:
            accelerate.disk_offload(getattr(pipeline, name), str(tmp_path / name), execution_device=torch.device("cpu"))
    assert pipeline.unet.device.type == "meta"
    assert all(torch.equal(a, b) for a, b in zip(all_ways(pipeline), expected, strict=True))
    assert {parameter.device.type for parameter in pipeline.unet.parameters()} == {"meta"}


def all_ways(pipeline: SelfCascadePipeline) -> list[torch.Tensor]:
    """Pictures that take text, UNet, decoder and encoder: from noise, from a user's picture, and with a pivot that goes through pixels."""
    call = {"prompt": "a cat", "height": 128, "width": 128, "num_inference_steps": 2, "output_type": "pt"}
    return [pipeline(**call, **extra, generator=generators(0)).images for extra in ({}, {"image": edges(0, 128)}, {"upscale": "pixel"})]


# ---- diffusers' own switches: each changes the cascade as it changes the UNet's plain pass, and back ----


def test_freeu_acts_on_every_pass_and_goes():
    stock = stock_base("small")
    pipeline = cascade(stock)
    plain = bits(pipeline)
    for each in (pipeline, stock):
        each.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        assert (bits(pipeline) - plain).abs().max() > 1e-3
        each.disable_freeu()
        assert torch.equal(bits(pipeline), plain)


@pytest.mark.parametrize("kind", ["small", "sd21"])
def test_fused_projections_and_other_processors_compute_the_same(kind):
    """Fused projections, sliced attention, the processor without a fused kernel: to float tolerance what the cascade was before, and then it is again."""
    pipeline = cascade(stock_base(kind))
    plain = bits(pipeline)
    processors = pipeline.unet.attn_processors

    pipeline.fuse_qkv_projections()
    torch.testing.assert_close(bits(pipeline), plain, atol=1e-3, rtol=1e-3)
    pipeline.unfuse_qkv_projections()
    assert torch.equal(bits(pipeline), plain)
    for change in (pipeline.enable_attention_slicing, lambda: pipeline.unet.set_attn_processor(AttnProcessor())):
        change()
        torch.testing.assert_close(bits(pipeline), plain, atol=1e-3, rtol=1e-3)
        pipeline.unet.set_attn_processor(dict(processors))
        assert torch.equal(bits(pipeline), plain)


def test_a_processor_of_the_users_sees_every_pass():
    """Its number of tokens tells the stage; attention scaling reaches it too, and it stays."""
    pipeline = cascade(stock_base("small"))
    tokens = []

    class Halving(AttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            tokens.append(hidden_states.shape[1])
            return 0.5 * super().__call__(attn, hidden_states, *args, **kwargs)

    plain = bits(pipeline)
    pipeline.unet.set_attn_processor(Halving())
    halved = bits(pipeline)
    assert (halved - plain).abs().max() > 1e-3
    assert set(tokens) == {2 * 2, 4 * 4, 8 * 8}
    base = base_bits(pipeline)
    with scaled_attention(pipeline.unet, 2.0):
        assert (base_bits(pipeline) - base).abs().max() > 1e-4
    assert torch.equal(bits(pipeline), halved)
    assert all(type(processor) is Halving for processor in pipeline.unet.attn_processors.values())


@pytest.mark.parametrize("switch", ["slicing", "tiling"])
def test_the_users_vae_settings_stay(switch):
    """On before a call is on afterwards, whether or not the call itself tiles; off stays off. What the user tiles is tiled."""
    pipeline = cascade(stock_base("small"))
    call = {"prompt": "a cat", "height": 128, "width": 128, "num_inference_steps": 1, "output_type": "pt"}
    whole, tiled = (pipeline(**call, tile_above=above, generator=generators(0)).images for above in (10**9, 1))
    assert (whole - tiled).abs().max() > 1e-5
    for above in (10**9, 1):
        assert not getattr(pipeline.vae, f"use_{switch}")
        getattr(pipeline.vae, f"enable_{switch}")()
        pictures = pipeline(**call, tile_above=above, generator=generators(0)).images
        assert torch.equal(pictures, tiled if switch == "tiling" or above == 1 else whole)
        assert getattr(pipeline.vae, f"use_{switch}")
        getattr(pipeline.vae, f"disable_{switch}")()


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_scheduler_of_the_users_is_taken_and_given_back(kind):
    """Set on the cascade, it samples as in a cascade that was made with it; the old one set again gives the old bits."""
    stock = stock_base("small")
    pipeline = cascade(stock)
    plain, before = bits(pipeline), pipeline.scheduler
    pipeline.scheduler = kind.from_config(before.config)
    assert torch.equal(bits(pipeline), bits(cascade(stock, scheduler=kind.from_config(before.config))))
    assert (bits(pipeline) - plain).abs().max() > 1e-3
    pipeline.scheduler = before
    assert torch.equal(bits(pipeline), plain)


@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_a_pipeline_moved_to_another_precision_samples_in_it(kind):
    """``pipe.to(bfloat16)`` takes networks and upsampler along: near the full precision's latents, and pictures come out; back in fp32, it works on."""
    pipeline = cascade(stock_base(kind))
    exact = bits(pipeline)
    pipeline.to(torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.upsampler.dtype == torch.bfloat16
    near = bits(pipeline)
    assert near.dtype == torch.float32
    assert (near - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert pipeline("a cat", 128, 128, num_inference_steps=2, output_type="pt").images.isfinite().all()
    pipeline.to(torch.float32)
    assert (bits(pipeline) - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.full
def test_a_compiled_unet_samples_in_the_cascade():
    """Compiled inside ``attached``, the plain cascade's latents; the tuning-free cascade needs no ceremony."""
    pipeline = cascade(stock_base("small"))
    expected, unet = bits(pipeline), pipeline.unet
    free = quiet(SelfCascadePipeline.from_pipe(pipeline))
    free.register_modules(upsampler=None)
    plain = bits(free)
    torch.compiler.reset()
    with attached(unet):
        pipeline.unet = torch.compile(unet, backend="eager")
        torch.testing.assert_close(bits(pipeline), expected, atol=1e-4, rtol=1e-4)
    pipeline.unet = unet
    torch.compiler.reset()
    free.unet = torch.compile(unet, backend="eager")
    torch.testing.assert_close(bits(free), plain, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()
    assert hooks(unet) == hooks(models.unet("small"))
