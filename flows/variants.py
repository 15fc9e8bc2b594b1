"""From a run to the samples that it compares: one set of settings for each method, direct sampling once for each eta."""

from __future__ import annotations

from selfcascade.config import GenerationSettings, Method, PipelineSettings
from selfcascade.settings import SettingsError
from selfcascade_tasks.artifacts import artifact_key


def variant(run: PipelineSettings, method: Method, eta: float | None = None) -> GenerationSettings:
    """What samples by ``method`` in this run; they are named after run and method, whichever command makes them.

    The tuned method takes the upsampler that the run trains, unless the settings name one.
    """
    if method == "direct" and eta is None:
        eta = run.generation.cascade.eta
    label = method if eta is None else label_of(method, eta)
    cascade = run.generation.cascade if eta is None else run.generation.cascade.model_copy(update={"eta": eta})
    upsampler = (run.generation.upsampler or f"upsamplers/{run.adaptation.name}") if method == "tuned" else None
    changes = {"name": artifact_key(run.generation.name, label), "method": method, "upsampler": upsampler, "cascade": cascade}
    return run.generation.model_copy(update=changes)


def variants(run: PipelineSettings) -> dict[str, GenerationSettings]:
    """Every set of samples of the run by the label that the report gives it.

    Raises:
        SettingsError: the upsampler would be trained for another base than the one that samples, or something else than an upsampler would be trained.
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
        else:
            found[method] = variant(run, method)
    return found


def label_of(method: Method, eta: float) -> str:
    """How direct sampling with an eta is called."""
    return f"{method} eta {eta:g}"
