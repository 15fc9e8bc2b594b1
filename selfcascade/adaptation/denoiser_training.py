"""Training of the small base's UNet and text encoder: epsilon prediction on cached latents, captions as words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from selfcascade.adaptation.autoencoder_training import cosine, generator_of
from selfcascade.adaptation.loss import min_snr_weights, stratified_timesteps
from selfcascade.adaptation.recorded_step import RecordedStep, follow, step_optimizers
from selfcascade.config import DenoiserSettings

SPECIAL = ("<start>", "<end>", "<pad>", "<unknown>")


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule: T = 1000, scaled linear from 0.00085 to 0.012, epsilon prediction, leading spacing with offset 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def build_tokenizer(captions: Iterable[str], *, max_tokens: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary is the sorted words of ``captions``; a word that it does not know is ``<unknown>``."""
    words = sorted({word for caption in captions for word in caption.lower().split()})
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate((*SPECIAL, *words))}, unk_token=SPECIAL[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    return wrap_tokenizer(tokenizer, max_tokens=max_tokens)


def wrap_tokenizer(tokenizer: Tokenizer, *, max_tokens: int) -> PreTrainedTokenizerFast:
    """The tokenizer as the text encoder's pipeline takes it, with the special tokens of :func:`build_tokenizer`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_tokens,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        unk_token=SPECIAL[3],
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Token ids, int64 (N, max_tokens), padded and cut as :class:`StableDiffusionPipeline` does it."""
    encoded = tokenizer(list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    tokens: Tensor = encoded.input_ids
    return tokens


def build_text_encoder(settings: DenoiserSettings, *, vocabulary: int, seed: int) -> CLIPTextModel:
    """An untrained causal CLIP text encoder over ``vocabulary`` words; fp32, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=settings.text_width,
                intermediate_size=2 * settings.text_width,
                projection_dim=settings.text_width,
                num_hidden_layers=settings.text_layers,
                num_attention_heads=4,
                max_position_embeddings=settings.max_tokens,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )


def build_unet(settings: DenoiserSettings, *, latent_channels: int, latent_side: int, seed: int) -> UNet2DConditionModel:
    """An untrained UNet with one residual layer a level, cross-attention on every level but the first; fp32, seeded."""
    levels = len(settings.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=latent_side,
            in_channels=latent_channels,
            out_channels=latent_channels,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
            block_out_channels=settings.channels,
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=4,
            cross_attention_dim=settings.text_width,
        )


def matrices_of(unet: UNet2DConditionModel) -> dict[nn.Parameter, nn.Parameter]:
    """The UNet's hidden weights as matrices, (out, everything else), each sharing the memory of the parameter that it maps to.

    What enters and leaves the network (first and last convolution, time embedding), norms and biases are not among them: Muon is made for hidden
    matrices, and torch's takes no weight of more than two dimensions.
    """
    outer = ("conv_in.", "conv_out.", "time_embedding.")
    hidden = [parameter for name, parameter in unet.named_parameters() if parameter.ndim > 1 and not name.startswith(outer)]
    return {nn.Parameter(parameter.data.view(len(parameter), -1)): parameter for parameter in hidden}


class DenoiserTraining:
    """Weights, moving average, optimizer and position of the denoiser's training; :meth:`advance` takes one step.

    Hidden weights of the UNet are stepped by Muon, its update scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), all else by AdamW: the noise
    MSE falls to the same level in half the time that AdamW alone needs. Captions go through the text encoder in every step, for it learns along.
    Timesteps are stratified over the batch. At low noise a share of the samples may be crops, in which everything has twice the size: what noise hides last
    then does not depend on how large an object is drawn, as in bases that learnt from photographs, while the layout, settled before, is that of whole pictures.

    Args:
        settings: architecture and training.
        latents: float32 (N, C, h, w), scaled, on the device that trains.
        tokens: int64 (N, max_tokens), the caption of each latent.
        empty: int64 (1, max_tokens), the empty caption.
        vocabulary: size of the tokenizer's vocabulary.
        seed: of initial weights, order, timesteps and noise.
        dtype: autocast precision; the weights stay fp32.
        crops: float32 (N, K, C, h, w), K crops of each picture; needed where ``settings.crops`` is above 0.
    """

    def __init__(
        self,
        settings: DenoiserSettings,
        latents: Tensor,
        tokens: Tensor,
        empty: Tensor,
        *,
        vocabulary: int,
        seed: int,
        dtype: torch.dtype,
        crops: Tensor | None = None,
    ) -> None:
        if (crops is None) != (settings.crops == 0):
            raise ValueError(f"crops are {'missing' if crops is None else 'given'} but settings.crops is {settings.crops}")
        self.settings, self.latents, self.seed, self.dtype, self.device = settings, latents, seed, dtype, latents.device
        self.tokens, self.empty = tokens.to(self.device), empty.to(self.device)
        self.unet = build_unet(settings, latent_channels=latents.shape[1], latent_side=latents.shape[-1], seed=seed).to(self.device).train()
        self.text_encoder = build_text_encoder(settings, vocabulary=vocabulary, seed=seed).to(self.device).train()
        self.parameters: list[Tensor] = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.matrices = matrices_of(self.unet)
        taken = set(map(id, self.matrices.values()))
        rest = [parameter for parameter in self.parameters if id(parameter) not in taken]
        self.optimizers = (
            torch.optim.Muon(list(self.matrices), lr=settings.lr, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True, capturable=self.device.type == "cuda"),
        )
        self.crops = crops
        self.alphas = build_scheduler().alphas_cumprod.to(self.device)
        self.recorded = RecordedStep(self.learn, self.device)
        self.step = 0

    def advance(self) -> Tensor:
        """One optimizer step; returns the plain noise MSE of its batch (the weighted loss is what is minimised), a scalar on the device: whoever reads it
        waits for the step.
        """
        generator = generator_of(self.seed, "denoiser", self.step)
        chosen = self._batch()
        count = len(chosen)
        shape = (count, *self.latents.shape[1:])
        dropped = torch.rand(count, generator=generator) < self.settings.caption_dropout
        timesteps = stratified_timesteps(count, below=len(self.alphas), generator=generator)
        reached = self.recorded(
            chosen=chosen,
            dropped=dropped,
            timesteps=timesteps,
            **self._closer(timesteps, generator),
            noise=torch.randn(shape, generator=generator_of(self.seed, "noise", self.step, device=self.device), device=self.device),
            factor=torch.tensor(cosine(self.step, self.settings.steps, warmup=150, hold=self.settings.hold), dtype=torch.float64),
            decay=torch.tensor(min(self.settings.ema, (2 + self.step) / (11 + self.step)), dtype=torch.float64),
        )
        self.step += 1
        return reached

    def _closer(self, timesteps: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Which samples of the batch are crops, and which one of their picture's."""
        if self.crops is None:
            return {}
        cut = torch.rand(len(timesteps), generator=generator) < self.settings.crops
        which = torch.randint(self.crops.shape[1], (len(timesteps),), generator=generator)
        return {"cut": cut & (timesteps < self.settings.crops_below * len(self.alphas)), "which": which}

    def learn(
        self,
        *,
        chosen: Tensor,
        dropped: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        factor: Tensor,
        decay: Tensor,
        cut: Tensor | None = None,
        which: Tensor | None = None,
    ) -> Tensor:
        """What a step computes, given its draws on the device that trains.

        Args:
            chosen: int64 (B,), samples of the batch.
            dropped: bool (B,), which of them lose their caption.
            timesteps: int64 (B,).
            noise: float32 (B, C, h, w).
            factor: scalar, of the learning rate.
            decay: scalar, of the moving average.
            cut: bool (B,), which of them are crops; with crops alone.
            which: int64 (B,), the crop of the picture.
        """
        clean, tokens = self.latents[chosen], torch.where(dropped[:, None], self.empty, self.tokens[chosen])
        if self.crops is not None and cut is not None and which is not None:
            clean = torch.where(cut[:, None, None, None], self.crops[chosen, which], clean)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            states = self.text_encoder(tokens).last_hidden_state
            predicted = self.unet(noisy, timesteps, states).sample
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * self._weights(timesteps)).mean()
        self.unet.zero_grad(set_to_none=True)
        self.text_encoder.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for matrix, parameter in self.matrices.items():
            matrix.grad = parameter.grad.reshape(matrix.shape) if parameter.grad is not None else None
        step_optimizers(self.optimizers, self.settings.lr, factor)
        follow(self.average, self.parameters, decay)
        reached: Tensor = errors.detach().mean()
        return reached

    def _batch(self) -> Tensor:
        """Indices of the step's samples, int64 (B,): each epoch is its own permutation, the last ragged batch is left out."""
        batch = min(self.settings.batch, len(self.latents))
        per_epoch = len(self.latents) // batch
        epoch, position = divmod(self.step, per_epoch)
        order = torch.randperm(len(self.latents), generator=generator_of(self.seed, "order", epoch))
        return order[position * batch : (position + 1) * batch]

    def _weights(self, timesteps: Tensor) -> Tensor:
        """Of the samples' errors, float (B,)."""
        if self.settings.snr_gamma is None:
            return torch.ones(len(timesteps), device=self.device)
        return min_snr_weights(timesteps, self.alphas, gamma=self.settings.snr_gamma)

    @torch.no_grad()
    def averaged(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """Copies of the UNet and the text encoder that hold the moving average, on the CPU."""
        unet = UNet2DConditionModel.from_config(self.unet.config).eval()
        text_encoder = CLIPTextModel(self.text_encoder.config).eval()
        for target, source in zip([*unet.parameters(), *text_encoder.parameters()], self.average, strict=True):
            target.copy_(source)
        return unet, text_encoder
