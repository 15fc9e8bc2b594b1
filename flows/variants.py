"""From a run to the samples that it compares, direct sampling once for each eta and the tuned baselines once each, and to what is trained for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from selfcascade.adaptation.kinds import KINDS
from selfcascade.config import AdaptationSettings, FinetuneSettings, GenerationSettings, Method, PipelineSettings, RowSettings
from selfcascade.settings import SettingsError
from selfcascade_tasks.artifacts import artifact_key

Trained = Literal["upsampler", "upscaler", "finetuned"]
"""Settings of sampling that name what was trained."""


def variant(run: PipelineSettings, method: Method, eta: float | None = None) -> GenerationSettings:
    """What samples by ``method`` in this run; they are named after run and method, whichever command makes them.

    Methods tuned, lora and full take what `selfcascade adapt` trains in this run, unless the settings name something else.
    """
    if method == "direct" and eta is None:
        eta = run.generation.cascade.eta
    label = method if eta is None else label_of(method, eta)
    cascade = run.generation.cascade if eta is None else run.generation.cascade.model_copy(update={"eta": eta})
    upsampler = (run.generation.upsampler or reference(run.adaptation, "upsampler")) if method == "tuned" else None
    finetuned = (run.generation.finetuned or reference(run.adaptation, method)) if method in ("lora", "full") else None
    changes = {"name": artifact_key(run.generation.name, label), "method": method, "upsampler": upsampler, "finetuned": finetuned, "cascade": cascade}
    return run.generation.model_copy(update=changes)


def variants(run: PipelineSettings) -> dict[str, GenerationSettings]:
    """Every set of samples of the run by the label that the report gives it.

    Raises:
        SettingsError: the upsampler would be trained for another base than the one that samples, or something else than an upsampler would be trained, or a
            tuned baseline is asked for that ``finetunes`` does not hold, or two rows have one name.
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
    trained = _trained_for_rows(run)
    for row in run.rows:
        taken = {sampling.name for sampling in found.values()}
        found[row.label] = _of_row(run, row, trained.get(row.label))
        if found[row.label].name in taken:
            raise SettingsError(f"rows hold {row.label!r}, but another row's samples are called {found[row.label].name} already; give it another label")
    return found


def trainings(run: PipelineSettings) -> dict[str, AdaptationSettings]:
    """What the run trains, each once, by the reference that the samples made with it have.

    Raises:
        SettingsError: as :func:`variants`.
    """
    found = [run.adaptation] if "tuned" in run.methods and run.generation.upsampler is None else []
    for finetune in (each for method in run.methods if method in ("lora", "full") for each in _finetunes(run, method)):
        found.append(_finetuning(run, finetune))
    found += [training for _, training in _trained_for_rows(run).values()]
    return {reference(training, training.trainable): training for training in found}


def sampled_with(sampling: GenerationSettings, trained: Mapping[str, str]) -> GenerationSettings:
    """The settings with the very artifacts that were trained for them, ``trained`` by reference, in place of the references."""
    return sampling.model_copy(update={setting: trained[value] for setting, value in references(sampling).items() if value in trained})


def references(sampling: GenerationSettings) -> dict[Trained, str]:
    """What sampling names of all that can be trained, by the setting that names it."""
    named: dict[Trained, str | None] = {"upsampler": sampling.upsampler, "upscaler": sampling.upscaler, "finetuned": sampling.finetuned}
    return {setting: value for setting, value in named.items() if value is not None}


def reference(training: AdaptationSettings, trainable: str) -> str:
    """How sampling names what ``training`` makes of a trainable."""
    return f"{KINDS[trainable]}/{training.name}"


def label_of(method: Method, eta: float) -> str:
    """How direct sampling with an eta is called."""
    return f"{method} eta {eta:g}"


def _finetunes(run: PipelineSettings, method: Method) -> list[FinetuneSettings]:
    found = [finetune for finetune in run.finetunes if finetune.way == method]
    if not found:
        raise SettingsError(f"methods hold {method!r} but finetunes have none of that way; add one, or leave {method!r} out of methods")
    return found


def _finetuning(run: PipelineSettings, finetune: FinetuneSettings) -> AdaptationSettings:
    changes = {"trainable": finetune.way, "rank": finetune.rank, "steps": finetune.steps or run.adaptation.steps, "lr": finetune.lr}
    return run.adaptation.model_copy(update={"name": artifact_key(run.adaptation.name, finetune.label), **changes})


def _finetuned(run: PipelineSettings, finetune: FinetuneSettings) -> GenerationSettings:
    artifact = reference(_finetuning(run, finetune), finetune.way)
    changes = {"name": artifact_key(run.generation.name, finetune.label), "finetuned": artifact}
    return variant(run, finetune.way).model_copy(update=changes)


def _of_row(run: PipelineSettings, row: RowSettings, trained: tuple[Trained, AdaptationSettings] | None) -> GenerationSettings:
    changes: dict[str, str] = {"name": artifact_key(run.generation.name, row.label)}
    if trained is not None:
        setting, training = trained
        changes[setting] = reference(training, training.trainable)
    return run.of_row(row).generation.model_copy(update=changes)


def _trained_for_rows(run: PipelineSettings) -> dict[str, tuple[Trained, AdaptationSettings]]:
    """By label of the row: the setting that names what is trained for it, and the training. Equal trainings have one name, that of the first."""
    found: dict[str, tuple[Trained, AdaptationSettings]] = {}
    known = [run.adaptation]
    for row in run.rows:
        own = run.of_row(row)
        needed = _needed(own.generation)
        if needed is None:
            continue
        setting, trainable = needed
        if own.adaptation.trainable != trainable:
            raise SettingsError(f"row {row.label!r} needs adaptation.trainable {trainable!r}, not {own.adaptation.trainable!r}; add it to its changes")
        same = next((each for each in known if each.model_copy(update={"name": own.adaptation.name}) == own.adaptation), None)
        training = same or own.adaptation.model_copy(update={"name": artifact_key(run.adaptation.name, row.label)})
        known.append(training)
        found[row.label] = (setting, training)
    return found


def _needed(sampling: GenerationSettings) -> tuple[Trained, str] | None:
    """The setting that names what must be trained, and what that is; None where nothing must, or it is named."""
    match sampling.method:
        case "tuned":
            return None if sampling.upsampler else ("upsampler", "upsampler")
        case "lora" | "full":
            return None if sampling.finetuned else ("finetuned", sampling.method)
    if sampling.method == "latent-sr" or (sampling.method == "tuning-free" and sampling.cascade.upscale == "learned"):
        return None if sampling.upscaler else ("upscaler", "latent-upscaler")
    return None
