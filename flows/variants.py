"""From a run to the samples that it compares, direct sampling once for each eta and the tuned baselines once each, and to what is trained for them."""

from __future__ import annotations

from selfcascade.baselines.finetune import KINDS
from selfcascade.config import AdaptationSettings, FinetuneSettings, GenerationSettings, Method, PipelineSettings
from selfcascade.settings import SettingsError
from selfcascade_tasks.artifacts import artifact_key


def variant(run: PipelineSettings, method: Method, eta: float | None = None) -> GenerationSettings:
    """What samples by ``method`` in this run; they are named after run and method, whichever command makes them.

    Methods tuned, lora and full take what `selfcascade adapt` trains in this run, unless the settings name something else.
    """
    if method == "direct" and eta is None:
        eta = run.generation.cascade.eta
    label = method if eta is None else label_of(method, eta)
    cascade = run.generation.cascade if eta is None else run.generation.cascade.model_copy(update={"eta": eta})
    upsampler = (run.generation.upsampler or f"upsamplers/{run.adaptation.name}") if method == "tuned" else None
    finetuned = (run.generation.finetuned or f"{KINDS[method]}/{run.adaptation.name}") if method in ("lora", "full") else None
    changes = {"name": artifact_key(run.generation.name, label), "method": method, "upsampler": upsampler, "finetuned": finetuned, "cascade": cascade}
    return run.generation.model_copy(update=changes)


def variants(run: PipelineSettings) -> dict[str, GenerationSettings]:
    """Every set of samples of the run by the label that the report gives it.

    Raises:
        SettingsError: the upsampler would be trained for another base than the one that samples, or something else than an upsampler would be trained, or a
            tuned baseline is asked for that ``finetunes`` does not hold.
    """
    if run.adaptation.base != run.generation.base:
        raise SettingsError(f"adaptation.base is {run.adaptation.base!r} but generation.base is {run.generation.base!r}; set both to one base")
    if "tuned" in run.methods and run.generation.upsampler is None and run.adaptation.trainable != "upsampler":
        raise SettingsError(
            f"method 'tuned' needs an upsampler but adaptation.trainable is {run.adaptation.trainable!r}; set it to 'upsampler', set generation.upsampler, or "
            "leave 'tuned' out of methods"
        )
    found: dict[str, GenerationSettings] = {}
    for method in run.methods:
        if method == "direct":
            found |= {label_of(method, eta): variant(run, method, eta) for eta in run.direct_etas}
        elif method in ("lora", "full"):
            found |= {finetune.label: _finetuned(run, finetune) for finetune in _finetunes(run, method)}
        else:
            found[method] = variant(run, method)
    return found


def trainings(run: PipelineSettings) -> dict[str, AdaptationSettings]:
    """What the run trains, by the label of the samples that are made with it.

    Raises:
        SettingsError: as :func:`variants`.
    """
    found = {"tuned": run.adaptation} if "tuned" in run.methods and run.generation.upsampler is None else {}
    for finetune in (each for method in run.methods if method in ("lora", "full") for each in _finetunes(run, method)):
        changes = {"trainable": finetune.way, "rank": finetune.rank, "steps": finetune.steps or run.adaptation.steps, "lr": finetune.lr}
        found[finetune.label] = run.adaptation.model_copy(update={"name": artifact_key(run.adaptation.name, finetune.label), **changes})
    return found


def sampled_with(sampling: GenerationSettings, trained: str | None) -> GenerationSettings:
    """The settings that sample with the artifact that was trained for them; as they are where none was."""
    return sampling if trained is None else sampling.model_copy(update={"upsampler" if sampling.method == "tuned" else "finetuned": trained})


def label_of(method: Method, eta: float) -> str:
    """How direct sampling with an eta is called."""
    return f"{method} eta {eta:g}"


def _finetunes(run: PipelineSettings, method: Method) -> list[FinetuneSettings]:
    found = [finetune for finetune in run.finetunes if finetune.way == method]
    if not found:
        raise SettingsError(f"methods hold {method!r} but finetunes have none of that way; add one, or leave {method!r} out of methods")
    return found


def _finetuned(run: PipelineSettings, finetune: FinetuneSettings) -> GenerationSettings:
    artifact = f"{KINDS[finetune.way]}/{artifact_key(run.adaptation.name, finetune.label)}"
    changes = {"name": artifact_key(run.generation.name, finetune.label), "finetuned": artifact}
    return variant(run, finetune.way).model_copy(update=changes)
