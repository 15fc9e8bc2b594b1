"""Two processes that train as one: real ones, over gloo, kept for all tests of this file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import Pair, hashed, run_of, steps, steps_on
from tiny_run import tiny_settings

from selfcascade.adaptation import adapt as stage
from selfcascade.adaptation.adapt import plan_adaptation, publish_adaptation
from selfcascade.adaptation.checkpoint import Checkpoint, newest_step
from selfcascade.adaptation.ranks import ALONE, Ranks
from selfcascade.adaptation.training_run import TrainingRun
from selfcascade.adaptation.validation import Validation
from selfcascade.config import AdaptationSettings, ComputeSettings, UpsamplerSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store

KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "weighted": {"upsampler": UpsamplerSettings(variant="B", inject="main", final="identity"), "snr_gamma": 5.0, "timesteps": "stratified"},
    "checkpointed": {"upsampler": UpsamplerSettings(variant="C"), "gradient_checkpointing": True, "caption_dropout": 0.5},
    "latent-upscaler": {"trainable": "latent-upscaler"},
    "lora": {"trainable": "lora"},
    "full": {"trainable": "full", "gradient_checkpointing": True},
}


def gradient(run: TrainingRun) -> tuple[float, list[float]]:
    """Loss and gradient of the next step."""
    loss = float(run.trainer._gradient())
    return loss, torch.cat([p.grad.flatten() for _, p in run.trainer.trainable if p.grad is not None]).tolist()


def gradient_on(ranks: Ranks, settings: AdaptationSettings) -> tuple[float, list[float]]:
    return gradient(run_of(settings, ranks))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_step_of_one(pair: Pair, tiny_base: Path, kind: str) -> None:
    """Loss and gradient of 2 samples on each of two ranks: to float tolerance those of 4 on one, and the same bits on both ranks."""
    settings = tiny_settings(tiny_base, batch=4, **KINDS[kind])
    loss, expected = gradient(run_of(settings))
    ours, theirs = pair.run(gradient_on, settings)
    assert ours == theirs
    assert ours[0] == pytest.approx(loss, rel=1e-5)
    whole = torch.tensor(expected)
    torch.testing.assert_close(torch.tensor(ours[1]), whole, rtol=1e-3, atol=1e-6 * float(whole.abs().max()) + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_two_parts_bit_for_bit(pair: Pair, tiny_base: Path, kind: str) -> None:
    """After three steps the state of either rank, weights, averages, optimizer, random numbers and log, is that of one process with ``accumulation=2``:
    two summands have one order.
    """
    settings = tiny_settings(tiny_base, batch=2, **KINDS[kind])
    expected = hashed(steps(run_of(settings.model_copy(update={"accumulation": 2})), 3))
    assert pair.run(steps_on, settings, 3) == [expected, expected]


def test_ranks_pass_their_share_in_parts(pair: Pair, tiny_base: Path) -> None:
    """Two ranks of two parts each have the gradient of four parts, to float tolerance."""
    settings = tiny_settings(tiny_base, batch=8, accumulation=2)
    loss, expected = gradient(run_of(settings.model_copy(update={"accumulation": 4})))
    found, _ = pair.run(gradient_on, settings)
    assert found[0] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected), rtol=1e-3, atol=1e-8)


def resumed_on(ranks: Ranks, settings: AdaptationSettings, tensors: dict[str, Any], record: dict[str, Any], count: int) -> tuple[str, Any, Any]:
    """Goes on from a checkpoint that only the first rank reads."""
    run = run_of(settings, ranks)
    read = {name: torch.tensor(value, dtype=getattr(torch, kind)) for name, (value, kind) in tensors.items()} if ranks.first else {}
    run.begin(Checkpoint(record["step"], read, record) if ranks.first else None)
    hash_ = hashed(steps(run, count))
    return hash_, plain(run), run.state()[1]


def plain(run: TrainingRun) -> dict[str, Any]:
    """A run's tensors in a form that goes through a pipe; numbers come out as they went in."""
    return {name: (tensor.tolist(), str(tensor.dtype).removeprefix("torch.")) for name, tensor in run.state()[0].items()}


def begun_on(ranks: Ranks, settings: AdaptationSettings, count: int) -> tuple[Any, Any]:
    run = steps(run_of(settings, ranks), count)
    return plain(run), run.state()[1]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on(pair: Pair, tiny_base: Path, before: int, after: int) -> None:
    """Two steps, a checkpoint, two steps: the bits of four undisturbed ones of two ranks, whose sums are those of one process with two parts."""
    settings = tiny_settings(tiny_base, batch=4, upsampler=UpsamplerSettings(variant="C"))
    alone = settings.model_copy(update={"accumulation": 2})
    whole, _ = pair.run(steps_on, settings, 4)
    checkpoint = pair.run(begun_on, settings, 2)[0] if before == 2 else begun_on(ALONE, alone, 2)
    ends = pair.run(resumed_on, settings, *checkpoint, 2) if after == 2 else [resumed_on(ALONE, alone, *checkpoint, 2)]
    assert [end[0] for end in ends] == [whole] * after


def test_a_run_of_one_goes_on_with_two(pair: Pair, tiny_base: Path) -> None:
    """Where sums have another order: losses and weights after two steps alone and two together are, to float tolerance, those of four alone."""
    settings = tiny_settings(tiny_base, batch=4, lr=1e-3, trainable="latent-upscaler")
    whole = steps(run_of(settings), 4)
    (_, tensors, _), _ = pair.run(resumed_on, settings, *begun_on(ALONE, settings, 2), 2)
    for name, tensor in whole.state()[0].items():
        if name.startswith(("weights/", "ema/")) or name == "log":
            torch.testing.assert_close(torch.tensor(tensors[name][0], dtype=tensor.dtype), tensor.detach(), rtol=1e-3, atol=1e-5)


def overflowing_on(ranks: Ranks, settings: AdaptationSettings) -> tuple[str, str, float, list[bool]]:
    """A step in which the second rank alone overflows, and one in which none does."""
    run = run_of(settings, ranks)
    trainer = run.trainer
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**12})
    before = {name: parameter.tolist() for name, parameter in trainer.trainable}
    handle = trainer.trainable[0][1].register_hook(lambda gradient: gradient + (0.0 if ranks.first else math.inf))
    trainer.advance()
    assert {name: parameter.tolist() for name, parameter in trainer.trainable} == before
    scale = trainer.scaler.get_scale()
    skipped = hashed(run)
    handle.remove()
    trainer.advance()
    assert {name: parameter.tolist() for name, parameter in trainer.trainable} != before
    return skipped, hashed(run), scale, [math.isfinite(norm) for _, _, norm in trainer.log()]


def test_all_ranks_leave_out_a_step_in_which_one_overflows(pair: Pair, tiny_base: Path) -> None:
    """In float16 the infinity of one rank is everybody's: nobody's weights move, every scale is halved, and states stay equal."""
    settings = tiny_settings(tiny_base, upsampler=UpsamplerSettings(variant="C"), compute=ComputeSettings(dtype="float16", threads=1))
    ours, theirs = pair.run(overflowing_on, settings)
    assert ours == theirs
    assert ours[2:] == (2.0**11, [False, True])


def validated_on(ranks: Ranks, settings: AdaptationSettings) -> tuple[Any, list[int]]:
    run = run_of(settings, ranks)
    seen: list[int] = []
    unet = run.trainer.objective.unet  # type: ignore[attr-defined]
    unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])) if args[0].shape[-1] == 16 else None)
    validation = Validation(run.trainer)
    assert validation.look()
    assert not validation.look(stop=lambda: ranks.first)
    return validation.rows, seen


def test_ranks_share_a_validation_and_know_its_losses(pair: Pair, tiny_base: Path) -> None:
    """Three pictures in five bins, two on the first rank and one on the second: the losses of one process to float tolerance, the same bits on both. Where
    the first rank is asked to leave, both do.
    """
    settings = tiny_settings(tiny_base, upsampler=UpsamplerSettings(variant="C"))
    (expected,), _ = validated_on(ALONE, settings)
    (ours, seen), (theirs, also) = pair.run(validated_on, settings)
    assert ours == theirs
    assert ours[0].bins == pytest.approx(expected.bins, rel=1e-5)
    assert (seen, also) == ([2] * 5, [1] * 5)


def trained_on(ranks: Ranks, settings: AdaptationSettings, store: Store, plan: Any) -> tuple[list[str], list[int], str]:
    """The whole of what a rank does: what it writes, what it reports, and its weights."""
    written: list[str] = []
    reported: list[int] = []
    runs: list[TrainingRun] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("put_cache", "put_new", "delete"):
            patch.setattr(Store, name, noted(getattr(Store, name), written))
        patch.setattr(stage, "TrainingRun", lambda trainer: runs.append(TrainingRun(trainer)) or runs[-1])  # type: ignore[func-returns-value]
        stage._train(settings, store, plan, ranks=ranks, progress=lambda reached: reported.append(reached.step))
    return written, reported, hashed(runs[0])


def noted(write: Callable[..., Any], written: list[str]) -> Callable[..., Any]:
    def put(self: Store, key: Any, *arguments: Any, **options: Any) -> Any:
        written.append(str(key))
        return write(self, key, *arguments, **options)

    return put


def test_the_first_rank_alone_writes_previews_and_reports(pair: Pair, fresh: Callable[[], Store], tiny_base: Path, tmp_path: Path) -> None:
    """A whole run, with latents that are missing at first: the second rank puts, deletes and reports nothing and ends with the weights of the first."""
    settings = tiny_settings(tiny_base, processes=2, upsampler=UpsamplerSettings(variant="D"), previews=1, validation_steps=3, tensorboard=tmp_path / "board")
    store = fresh()
    plan = plan_adaptation(settings, store, device="cpu")
    (written, reported, ours), (nothing, silence, theirs) = pair.run(trained_on, settings, store, plan)
    assert (nothing, silence) == ([], [])
    assert theirs == ours
    assert reported == [1, 2, 3, 4, 5, 6]
    assert sum("cache/latents/" in key for key in written) == 2
    assert sum("cache/previews/" in key for key in written) == 1
    assert newest_step(store, plan.ref.version) == 6
    assert len(list((tmp_path / "board").rglob("events*"))) == 1
    publish_adaptation(settings, store, plan)
    again = plan_adaptation(settings.model_copy(update={"processes": 1}), store, device="cpu")
    assert again.published
    assert again.ref == plan.ref


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"batch=6 does not divide into accumulation=1 equal parts for each of processes=4; change any"):
        AdaptationSettings.from_tree({"batch": 6, "processes": 4})
    AdaptationSettings.from_tree({"batch": 8, "accumulation": 2, "processes": 4})


def test_more_processes_than_gpus_are_refused_before_anything_starts(world: Store, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both numbers; a device that is one is no place for two."""
    monkeypatch.setattr(stage, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = tiny_settings(tiny_base, processes=2)
    with pytest.raises(SettingsError, match=r"adaptation\.processes=2 train on a GPU each, but 1 are here; lower it to 1 or below"):
        plan_adaptation(settings, world, device="cuda")
    for name in ("cuda:0", "mps"):
        with pytest.raises(SettingsError, match=f"adaptation.processes=2 train on a device each, but execution.device={name} is one; set it to cuda or to cpu"):
            plan_adaptation(settings, world, device=name)


def test_processes_are_no_part_of_the_address(tiny_base: Path) -> None:
    """Another number of them goes on with the same run."""
    assert tiny_settings(tiny_base, processes=2).digest() == tiny_settings(tiny_base).digest()
