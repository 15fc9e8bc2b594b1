"""Self-Cascade sampling as a diffusers pipeline: a base picture, then stage upon stage of twice the size (paper section 4, algorithm 2)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from os import PathLike
from typing import Any, Literal, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, UNet3DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.video_processor import VideoProcessor
from torch import Generator, Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from selfcascade.bases import NEEDED, resolve_base
from selfcascade.cascade.conditioning import encode
from selfcascade.cascade.decoding import TILE_ABOVE, decode
from selfcascade.cascade.denoiser import Residuals
from selfcascade.cascade.encoding import pivot_of
from selfcascade.cascade.families import BaseSpec, spec_of
from selfcascade.cascade.guidance import guided
from selfcascade.cascade.latent_upscaler import LatentUpscaler, load_latent_upscaler
from selfcascade.cascade.noise import draw_noise
from selfcascade.cascade.requirements import (
    CALLBACK_INPUTS,
    as_texts,
    check_call,
    check_image_prompts,
    check_kinds,
    check_residuals,
    check_shape,
    check_text,
    count_prompts,
    stage_above,
)
from selfcascade.cascade.sampling import Recipe, count_steps, sample_stage
from selfcascade.cascade.schedule import Size, stage_sizes
from selfcascade.cascade.solver import solver_of
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.cascade.upsampler_set import Upsamplers, UpsamplerSet, gather
from selfcascade.cascade.upscaling import upscale_of
from selfcascade.cascade.video import VideoOutput
from selfcascade.config import Upscale
from selfcascade.settings import SettingsError
from selfcascade.storage import Store


class SelfCascadePipeline(DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin, StableDiffusionXLLoraLoaderMixin):
    """Pictures of any size from a base of one size (arXiv 2402.10491); of a text-to-video base, videos, which grow in space and keep their frames.

    Stage 0 is ordinary sampling at the base's own area. Every later stage enlarges the clean latent of the one below (the pivot), noises it to step K and
    denoises it with the same UNet; with an ``upsampler`` the pivot's features guide that. The text encoders' stock names serve SD, SDXL and
    text-to-video alike.

    Args:
        vae: autoencoder of the base.
        text_encoder: of the base.
        tokenizer: of the base.
        unet: of the base; it is not modified, hooks are on it only while a call runs.
        scheduler: one of :data:`~.solver.SOLVERS`; every stage works on a copy.
        text_encoder_2: SDXL's second encoder.
        tokenizer_2: and its tokenizer.
        upsampler: Phi of the tuned cascade, one for the stages that it was trained for, or an ``UpsamplerSet`` of one a stage, which is saved with the
            pipeline as one component; None is the tuning-free cascade.
        latent_upscaler: how the pivot grows where a call asks for ``upscale="learned"``.
        force_zeros_for_empty_prompt: SDXL's rule for an empty negative prompt.
        base: ``name@version`` of the base where that is known.

    Raises:
        SettingsError: the base is of no known family, or the upsampler was made for another one.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _exclude_from_cpu_offload = ["upsampler", "latent_upscaler"]  # noqa: RUF012 (diffusers' name and type): the first works in the middle of the UNet's pass
    _optional_components = ["text_encoder_2", "tokenizer_2", "upsampler", "latent_upscaler"]  # noqa: RUF012
    _callback_tensor_inputs = list(CALLBACK_INPUTS)  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel | UNet3DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        upsampler: FeatureUpsampler | UpsamplerSet | None = None,
        latent_upscaler: LatentUpscaler | None = None,
        force_zeros_for_empty_prompt: bool = True,
        base: str | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            upsampler=upsampler,
            latent_upscaler=latent_upscaler,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, base=base)
        self.image_processor = VideoProcessor(vae_scale_factor=self.spec.pixels)  # diffusers' processor of pictures, which knows frames too
        if upsampler is not None:
            upsampler.check_fits(self.spec, base)
        if latent_upscaler is not None:
            latent_upscaler.check_fits(self.spec, base)

    @classmethod
    def from_pretrained(
        cls,
        base: str | PathLike[str],
        *,
        upsampler: Upsamplers = None,
        latent_upscaler: LatentUpscaler | str | PathLike[str] | None = None,
        store: Store | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> Self:
        """A pipeline of a base, tuned where an upsampler is given. A base's own scheduler that cannot start in the middle, such as PNDM, gives way to DDIM.

        Args:
            base: shipped base, folder, hub id, or artifact, as :func:`selfcascade.bases.resolve_base` takes it.
            upsampler: the module, or folder, hub id or artifact of one; or a list or mapping of these by stage, see :func:`~.upsampler_set.gather`.
            latent_upscaler: the module, or folder, hub id or artifact of one.
            store: where artifacts are looked up.
            torch_dtype: of UNet, text encoders and upsampler; autoencoder and latent upscaler are loaded in fp32.
            kwargs: of ``DiffusionPipeline.from_pretrained``.

        Raises:
            SettingsError: base or upsampler is not found, or the two do not belong together.
        """
        resolved = resolve_base(str(base), store)
        upsampler = gather(upsampler, store, dtype=torch_dtype)
        if upsampler is not None:
            kwargs["upsampler"] = upsampler
        if isinstance(latent_upscaler, str | PathLike):
            latent_upscaler = load_latent_upscaler(str(latent_upscaler), store)
        if latent_upscaler is not None:
            kwargs["latent_upscaler"] = latent_upscaler
        saved_as = cls.load_config(resolved.location).get("base")
        dtypes = {"default": torch_dtype, "vae": torch.float32, "latent_upscaler": torch.float32}
        try:
            pipeline = super().from_pretrained(resolved.location, base=saved_as or str(resolved), dtype=dtypes, use_safetensors=True, **kwargs)
        except OSError as error:
            raise SettingsError(f"base {resolved.name!r} does not load: {' '.join(str(error).split())[:300]}") from None
        if "scheduler" not in kwargs:
            pipeline.scheduler = solver_of(pipeline.scheduler)
        return pipeline

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        upsampler: Upsamplers = None,
        latent_upscaler: LatentUpscaler | str | PathLike[str] | None = None,
        store: Store | None = None,
        **components: Any,
    ) -> Self:
        """The very networks of a loaded pipeline in a cascade: LoRA, precision, offload and scheduler stay as the user set them.

        Args:
            pipeline: a Stable Diffusion, SDXL or text-to-video pipeline, or another cascade.
            upsampler: the module as it is; or folder, hub id or artifact of one, which then goes to the UNet's device and precision; or a list or mapping of
                these by stage, see :func:`~.upsampler_set.gather`.
            latent_upscaler: the module, or folder, hub id or artifact of one, which then goes to the UNet's device.
            store: where artifacts are looked up.
            components: in place of the pipeline's own, such as ``scheduler=``.

        Raises:
            SettingsError: the pipeline has no UNet of a known family, or the upsampler was made for another base.
        """
        if not isinstance(getattr(pipeline, "unet", None), torch.nn.Module):
            raise SettingsError(f"a {type(pipeline).__name__} has no UNet; the cascade needs {NEEDED}")
        if not isinstance(upsampler, torch.nn.Module | None):
            upsampler = gather(upsampler, store, dtype=pipeline.unet.dtype)
            upsampler = upsampler and upsampler.to(pipeline._execution_device)
        if isinstance(latent_upscaler, str | PathLike):
            latent_upscaler = load_latent_upscaler(str(latent_upscaler), store).to(pipeline._execution_device)
        given = {name: module for name, module in (("upsampler", upsampler), ("latent_upscaler", latent_upscaler)) if module is not None}
        wanted, optional = cls._get_signature_keys(cls)
        own = {name: pipeline.components[name] for name in wanted if name in pipeline.components}
        settings = {name: pipeline.config[key] for name in optional for key in (name, f"_{name}") if key in pipeline.config}  # private where it was not its own
        return cls(**own | settings | components | given)

    @property
    def spec(self) -> BaseSpec:
        """What the cascade knows of the base."""
        return spec_of(self.unet, self.vae, self.scheduler)

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the call under way, over all its stages."""
        return self._num_timesteps

    def sizes(self, height: int, width: int) -> tuple[Size, ...]:
        """Height and width in pixels of every stage of a picture of that size, from the base to the target."""
        spec = self.spec
        return stage_sizes(height, width, native=spec.native, step=spec.step)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        sizes: Sequence[Size] | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        start: float = 0.7,
        later_steps: int | None = None,
        guidance_scale: float = 7.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        joint_branches: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        upscale: Upscale = "bilinear",
        t_min: int = 0,
        strength: float = 1.0,
        pivot_every: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        pivot: Tensor | None = None,
        image: PipelineImageInput | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        residuals: Residuals | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        tile_above: int = TILE_ABOVE,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | VideoOutput | tuple[Any]:
        """Sample pictures, or videos where the base makes these.

        Args:
            prompt: one, or a list; or ``prompt_embeds``.
            height: of the result in pixels; the base's own where unset.
            width: of the result in pixels; the base's own where unset.
            sizes: height and width in pixels of every stage, in place of those that :meth:`sizes` derives: ``pipe.sizes(h, w)[:1]`` samples the base alone.
            num_frames: of a video, 16 where unset; a base that makes pictures takes none.
            num_inference_steps: denoising steps of a full pass.
            start: K / T, in (0, 1]: where the later stages enter the diffusion.
            later_steps: denoising steps of a full pass in the stages above the base, of which they take those from K on; unset: as many as the base.
            guidance_scale: classifier-free guidance; 1 and below is off.
            guidance_interval: shares of T between which guidance is on in the stages above the base; at other steps their conditional branch runs alone
                (arXiv 2404.07724).
            joint_branches: both branches of guidance in one pass of the UNet; False runs one after the other, in half the memory.
            negative_prompt: what guidance steers away from, one for all or one a prompt.
            num_images_per_prompt: samples of each prompt, next to each other in the batch.
            eta: DDIM's; other schedulers ignore it.
            upscale: how the pivot grows: bilinear (the paper), bicubic (the released code), pixel (decode, resize, encode), or learned (``latent_upscaler``).
            t_min: the upsampler guides while t is above this.
            strength: factor on what the upsampler adds, in [0, 1].
            pivot_every: steps that one pass of the pivot serves; at 1 its features are those of the current timestep. An upsampler made for pivot time 0
                needs a single pass anyway.
            generator: one a sample, so that a sample does not depend on its batch; one for all draws for the samples in turn. See :func:`~.noise.draw_noise`.
            latents: standard normal of stage 0 in place of the drawn, (B, C, h, w), for video (B, C, F, h, w).
            pivot: clean scaled latent, (B, C, h, w), for video (B, C, F, h, w), of the stage whose size it has; sampling goes on with the next stage.
            image: one for all samples or one each, to start from in place of the base: Pillow, numpy or torch as diffusers takes them. It becomes the pivot of
                the biggest stage below the target that it fills, or of the base stage where it is smaller than that: scaled to cover it by Lanczos, then
                cropped at the centre.
            prompt_embeds: and the following, text that was encoded before, (P, L, D).
            negative_prompt_embeds: (P, L, D).
            pooled_prompt_embeds: SDXL, (P, W).
            negative_pooled_prompt_embeds: SDXL, (P, W).
            ip_adapter_image_embeds: one an IP-Adapter, as its pipeline's ``prepare_ip_adapter_image_embeds`` makes them: (1 or B, N, D), with guidance
                (2 or 2 B, N, D), the unconditional half first.
            cross_attention_kwargs: of the UNet's attention, in every pass; a LoRA's ``scale`` holds for the text encoders too.
            residuals: what a ControlNet adds to the UNet in every step of every stage, such as a :class:`~.control.Control`; the pivot's pass has none.
            output_type: "latent" returns the clean scaled latent of the last stage, (B, C, h, w), for video (B, C, F, h, w), fp32.
            tile_above: pixels of a picture above which it is decoded, or encoded, in tiles.
            return_dict: an ``ImagePipelineOutput`` with ``images``, for video a ``VideoOutput`` with ``frames``, or a tuple.
            callback_on_step_end: called as ``callback(pipe, i, t, tensors)`` after every step, i counting on through the stages; may return changed tensors.
            callback_on_step_end_tensor_inputs: names of those tensors, of "latents" and "prompt_embeds".

        Raises:
            ValueError: a value is out of range, before any network runs; names it and what would be accepted.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        texts, negative = as_texts(prompt), as_texts(negative_prompt)
        check_kinds(
            pixels={"height": height, "width": width},
            sizes=sizes,
            texts={"prompt": texts, "negative_prompt": negative},
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            tensors={"latents": latents, "pivot": pivot},
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            attention=cross_attention_kwargs,
        )
        spec, device = self.spec, self._execution_device
        recipe = Recipe(num_inference_steps, start, guidance_scale, eta, upscale, t_min, strength, later_steps, guidance_interval, joint_branches, pivot_every)
        sizes = self.sizes(height or spec.native[0], width or spec.native[1]) if sizes is None else tuple(sizes)
        prompts = count_prompts(texts, prompt_embeds)
        negative = negative * prompts if isinstance(negative_prompt, str) and negative is not None else negative
        batch = prompts * num_images_per_prompt
        generators = generator if isinstance(generator, list) else [generator] * batch
        shapes = [spec.latent_shape(size, num_frames) for size in sizes]
        if self.upsampler is not None:
            self.upsampler.check_stages(len(sizes) - 1)
        check_call(spec, sizes, batch, texts, negative, generators, output_type, {"pivot": pivot, "image": image})
        if image is not None:
            pivot = pivot_of(self.vae, image, sizes, batch=batch, device=device, tile_above=tile_above)
        first = 0 if pivot is None else stage_above(pivot, [(shape[-2], shape[-1]) for shape in shapes])
        check_shape("latents", latents, (batch, *shapes[0]))
        check_shape("pivot", pivot, (batch, *shapes[first - 1]))
        check_image_prompts(self.unet, ip_adapter_image_embeds, batch, guided=guided(guidance_scale))
        check_residuals(self.unet, residuals, batch)
        embeds = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        check_text(spec, self.unet, negative, embeds, prompts=prompts)
        base_steps, later_steps = count_steps(self.scheduler, recipe)

        enlarge = upscale_of(upscale, vae=self.vae, learned=self.latent_upscaler, tile_above=tile_above)
        conditioning = encode(
            self,
            spec.family,
            prompt=texts,
            negative_prompt=negative,
            per_prompt=num_images_per_prompt,
            guided=guided(guidance_scale),
            **embeds,
            image_embeds=ip_adapter_image_embeds,
            attention=cross_attention_kwargs,
        )
        noise = draw_noise(generators, spec.latent_channels, [shape[1:] for shape in shapes], device)
        if latents is not None:
            noise[0] = replace(noise[0], entry=latents.to(device, torch.float32))
        if pivot is not None:
            pivot = pivot.to(device, torch.float32)
        self._num_timesteps = sum(later_steps if stage else base_steps for stage in range(first, len(sizes)))
        step = count()
        with self.progress_bar(total=self._num_timesteps) as bar:

            def on_step(t: Tensor, latents: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
                bar.update()
                if callback_on_step_end is None:
                    return latents, prompt_embeds
                tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                tensors |= callback_on_step_end(self, next(step), t, wanted)
                return tensors["latents"], tensors["prompt_embeds"]

            for stage in range(first, len(sizes)):
                pivot = z = sample_stage(
                    self.unet,
                    self.scheduler,
                    recipe,
                    noise=noise[stage],
                    text=conditioning.text,
                    conditioning=conditioning.of_stage(sizes[stage]),
                    pivot=pivot,
                    upsampler=self.upsampler and self.upsampler.of(stage),
                    upscale=enlarge,
                    on_step=on_step,
                    residuals=residuals,
                )

        if output_type != "latent":
            processed = self.image_processor.postprocess if spec.family.frames is None else self.image_processor.postprocess_video
            z = processed(decode(self.vae, z, tile_above=tile_above), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (z,)
        return ImagePipelineOutput(images=z) if spec.family.frames is None else VideoOutput(frames=z)
