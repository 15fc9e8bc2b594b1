"""What a number was measured with: without it two numbers cannot be compared, so it stands under every table."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from pydantic import BaseModel, ConfigDict, Field

from selfcascade.config import EvaluationSettings, FurtherFeatures
from selfcascade.evaluation import cmmd, inception_score, layout, manifold, objects, spectrum
from selfcascade.evaluation.crops import crop_rule
from selfcascade.evaluation.distances import kid_subset
from selfcascade.evaluation.networks.network import NetworkKind
from selfcascade.evaluation.resize import RULES
from selfcascade.settings import SettingsError, digest_of

FRECHET = "Fréchet distance of Gaussians with unbiased covariances in float64"

FURTHER_RULES = {"clip": cmmd.RULE, "dinov2": FRECHET, "inception-v3": inception_score.RULE}


class FurtherProtocol(BaseModel):
    """What the metrics of a further network were measured with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    setting: str = Field(description="name in the settings")
    network: str
    weights_sha256: str
    num_features: int
    classes: int = Field(0, description="logits beside the features")
    input: str
    licence: str = Field(description="of the published weights")
    resize: str = RULES["clean"]
    rule: str = Field(description="how its features become numbers")
    batch: int
    threads: int

    @classmethod
    def of(cls, settings: FurtherFeatures, kind: NetworkKind, weights_sha256: str) -> FurtherProtocol:
        """Of one network of the settings."""
        return cls(
            setting=settings.network,
            network=kind.name,
            weights_sha256=weights_sha256,
            num_features=kind.num_features,
            classes=kind.classes,
            input=_input(kind),
            licence=kind.licence,
            resize=RULES[settings.resize],
            rule=FURTHER_RULES[settings.network],
            batch=settings.batch,
            threads=settings.threads,
        )

    def caption(self) -> str:
        """What stands under a table that has its numbers."""
        resize = "" if self.resize == RULES["clean"] else f", resize: {self.resize}"
        return f"{self.network}, weights {self.weights_sha256[:12]}, {self.num_features} features, input {self.input}{resize}"

    def feature_digest(self, device: str) -> str:
        """Digest of what shapes the features, on a kind of device: the address of cached ones."""
        shared = ("weights_sha256", "input", "resize", "batch", "threads")
        return digest_of({name: getattr(self, name) for name in shared} | {"device": device, "torch": torch.__version__})


class Protocol(BaseModel):
    """How pictures become numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(description="feature network")
    weights_sha256: str = Field(description="digest of its weights")
    num_features: int = Field(description="width of a feature")
    input: str = Field(description="size and scaling of the network's input")
    resize: str = Field(description="how a picture gets that size")
    crop: str = Field(description="how the pictures of the patch metrics are cut")
    kid: str = Field(description="kernel and estimator of KID")
    fid: str = Field(description="estimator of FID")
    layout: str
    objects: str
    manifold: str = Field(description="precision, recall, density and coverage")
    detail: str
    intervals: str
    seed: int
    batch: int
    threads: int
    device: str = Field(description="kind of device that the features were computed on")
    libraries: dict[str, str]
    further: tuple[FurtherProtocol, ...] = ()

    @classmethod
    def of(
        cls,
        settings: EvaluationSettings,
        kind: NetworkKind,
        weights_sha256: str,
        *,
        pictures: int,
        real: int,
        device: str,
        further: tuple[FurtherProtocol, ...] = (),
    ) -> Protocol:
        """The protocol that ``settings`` stand for, with ``pictures`` a method and ``real`` reference pictures."""
        subset = kid_subset(settings.kid_subset, pictures, real)
        return cls(
            network=kind.name,
            weights_sha256=weights_sha256,
            num_features=kind.num_features,
            input=_input(kind),
            resize=RULES[settings.features.resize],
            crop=crop_rule(side=settings.crop, count=settings.crops_per_image, seed=settings.seed),
            kid=f"unbiased squared MMD, kernel (x.y / d + 1)^3, mean over {settings.kid_subsets} seeded subsets of {subset} without replacement (torchmetrics)",
            fid=FRECHET,
            layout=layout.RULE,
            objects=objects.RULE,
            manifold=manifold.RULE,
            detail=spectrum.RULE,
            intervals=(
                f"standard error from {settings.half_samples} half-samples of prompts and of real pictures without replacement, the same for every method; "
                "95 % interval by the normal distribution, for each comparison by itself"
            ),
            seed=settings.seed,
            batch=settings.features.batch,
            threads=settings.features.threads,
            device=device,
            libraries=_libraries(),
            further=further,
        )

    def feature_digest(self) -> str:
        """Digest of what shapes the features, and nothing else: the address of cached features."""
        shared = ("weights_sha256", "input", "resize", "crop", "batch", "threads", "device")
        return digest_of({name: getattr(self, name) for name in shared} | {"torch": torch.__version__})

    def caption(self, counts: str) -> str:
        """One sentence for the caption of a table; ``counts`` says how many pictures are compared."""
        network = f"{self.network}, weights {self.weights_sha256[:12]}, {self.num_features} features"
        return f"{network}; {counts}; input {self.input}; resize: {self.resize}; crops: {self.crop}."


def _input(kind: NetworkKind) -> str:
    return f"{kind.side} x {kind.side}, {kind.scaling}"


def _libraries() -> dict[str, str]:
    found = {}
    for package in ("torch", "torchmetrics", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            raise SettingsError(f"evaluation needs {package}; install the evaluation extra: pip install 'selfcascade[eval]'") from None
    return found
