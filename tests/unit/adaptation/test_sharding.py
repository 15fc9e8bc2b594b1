"""Full fine-tuning in shards: two real ranks, each with its part of weights, gradients and averages, take the steps of one process that holds all."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from pair import Pair, frozen, hashed, run_of, steps, steps_on
from safetensors import safe_open
from tiny_run import tiny_settings
from torch import Tensor
from torch.distributed.tensor import DTensor

from selfcascade.adaptation import adapt as stage
from selfcascade.adaptation import start
from selfcascade.adaptation.adapt import plan_adaptation, publish_adaptation
from selfcascade.adaptation.checkpoint import Checkpoint
from selfcascade.adaptation.ranks import ALONE, Ranks
from selfcascade.adaptation.sharding import copied, units, whole
from selfcascade.adaptation.training_run import TrainingRun
from selfcascade.cascade.compilation import compile_blocks
from selfcascade.cascade.published import PUBLISHED
from selfcascade.config import AdaptationSettings, ComputeSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, resolve

SHARDED = {"trainable": "full", "processes": 2, "sharded": True}
PAGE = Path(__file__).parents[3] / "docs/adaptation.md"
Arrays = dict[str, NDArray[Any]]
KINDS: dict[str, dict[str, Any]] = {
    "parts": {"accumulation": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "compiled": {"compiled": True},
    "bfloat16": {"compute": ComputeSettings(dtype="bfloat16", threads=1)},
}


def sharded_settings(base: Path, **changes: Any) -> AdaptationSettings:
    return tiny_settings(base, **(SHARDED | changes))


def unsharded(settings: AdaptationSettings, **changes: Any) -> AdaptationSettings:
    """The same run in one process."""
    return settings.model_copy(update={"processes": 1, "sharded": False} | changes)


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the shape of SD 2.1: four levels, two layers each."""
    return models.saved_base(tmp_path_factory.mktemp("deep") / "sd21", "sd21")


def traced_run(settings: AdaptationSettings, ranks: Ranks) -> TrainingRun:
    """A run whose compiled blocks, if it has any, are what torch traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "compile_blocks", partial(compile_blocks, backend="eager"))
        return run_of(settings, ranks)


def gradient_on(ranks: Ranks, settings: AdaptationSettings) -> tuple[float, NDArray[np.float32]]:
    """Loss and whole gradient of the next step."""
    run = traced_run(settings, ranks)
    loss = float(run.trainer._gradient())
    return loss, torch.cat([whole(parameter.grad).flatten() for _, parameter in run.trainer.trainable]).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_two_shards_have_the_gradient_of_the_whole_batch(pair: Pair, deep_base: Path, tiny_base: Path, kind: str) -> None:
    """Loss and every gradient of 4 samples in one process; in bfloat16 to what rounding leaves of a float32 gradient."""
    settings = sharded_settings(deep_base if kind == "parts" else tiny_base, **KINDS[kind])
    half = kind == "bfloat16"
    loss, expected = gradient_on(ALONE, unsharded(settings, accumulation=1, gradient_checkpointing=False, compiled=False))
    (ours, found), (theirs, also) = pair.run(gradient_on, settings)
    assert (ours, found.tobytes()) == (theirs, also.tobytes())
    assert ours == pytest.approx(loss, rel=1e-5)
    assert np.linalg.norm(found - expected) < (3e-2 if half else 1e-5) * np.linalg.norm(expected)
    if not half:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())


def begun_on(ranks: Ranks, settings: AdaptationSettings, count: int) -> tuple[Arrays, dict[str, Any]]:
    """What a checkpoint after some steps holds, without torch's own generator, which training leaves where the process had it."""
    run = steps(run_of(settings, ranks), count)
    tensors, record = run.state()
    return {name: tensor.numpy() for name, tensor in copied(tensors).items() if name != "random/torch"}, record


@pytest.mark.parametrize("clip", [1e-2, 1e3])
def test_steps_are_those_of_one_process(pair: Pair, tiny_base: Path, clip: float) -> None:
    """Weights, moving averages, AdamW's averages, losses and norms after three steps, where every gradient is clipped and where none is: by the norm of the
    whole. Equal to float tolerance, and the same bits on both ranks.
    """
    settings = sharded_settings(tiny_base, clip=clip, lr=1e-3)
    expected, _ = begun_on(ALONE, unsharded(settings), 3)
    (ours, _), (theirs, _) = pair.run(begun_on, settings, 3)
    assert ours.keys() == theirs.keys() == expected.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    norms = expected["log"][:, 2]
    assert (norms > clip).all() if clip < 1 else (norms < clip).all()
    assert [(name, array.dtype, array.shape) for name, array in ours.items()] == [(name, array.dtype, array.shape) for name, array in expected.items()]
    np.testing.assert_allclose(ours["log"], expected["log"], rtol=1e-4)
    for kind in ("weights/", "ema/", "/exp_avg", "/exp_avg_sq"):
        # Of all tensors at once: AdamW makes steps of any size of a gradient that is rounding alone.
        found, wanted = (np.concatenate([each[name].ravel() for name in expected if kind in name]) for each in (ours, expected))
        assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted), kind


def held_on(ranks: Ranks, settings: AdaptationSettings) -> dict[str, tuple[int, int]]:
    """Of everything that trains, how many numbers there are, and how many this rank holds."""
    run = run_of(settings, ranks)
    trainer = run.trainer
    trainer._gradient()
    found = {"gradients": [parameter.grad for _, parameter in trainer.trainable]}
    trainer.optimizer.zero_grad()
    steps(run, 1)
    assert run.validation.look()
    run.early_stop.take()
    for name, tensor in run.state()[0].items():
        if tensor.ndim and name.split("/")[0] in ("weights", "ema", "optimizer", "best"):
            found.setdefault(name.split("/")[0], []).append(tensor)
    return {name: (sum(t.numel() for t in given), sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in given)) for name, given in found.items()}


def test_each_rank_holds_its_half(pair: Pair, tiny_base: Path) -> None:
    """Of weights, gradients, AdamW's two averages, the moving average and the best one: together all, and neither more than a hundredth over the half."""
    ours, theirs = pair.run(held_on, sharded_settings(tiny_base, validation_steps=1, early_stop=2))
    assert set(ours) == {"gradients", "weights", "ema", "optimizer", "best"}
    for name, (numbers, here) in ours.items():
        assert here + theirs[name][1] == numbers
        assert max(here, theirs[name][1]) < 0.51 * numbers


@pytest.mark.parametrize("base", ["sd-2.1", "sdxl"])
def test_the_page_on_training_says_what_a_rank_holds(base: str) -> None:
    """Counted on the published UNet: 20 bytes for each number of the largest shards, and at a time, in float32, weights and gradients of two of the largest
    blocks and of what is in none.
    """
    published = PUBLISHED[base]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(published.unet))
    blocks = [sum(parameter.numel() for parameter in unit.parameters()) for unit in units(unet)[:-1]]
    gathered = published.parameters - sum(blocks) + 2 * max(blocks)
    shards = [sum(math.ceil(parameter.shape[0] / count) * parameter[0].numel() for parameter in unet.parameters()) for count in (2, 4, 8)]
    cells = [f"{bytes_ / 2**30:.1f} GiB" for bytes_ in (*(20 * numbers for numbers in shards), 2 * 4 * gathered)]
    row = f"| {published.title} | {published.parameters:,} | {' | '.join(cells)} |"
    assert row in PAGE.read_text(encoding="utf-8"), row


def resumed_on(ranks: Ranks, settings: AdaptationSettings, tensors: Arrays, record: dict[str, Any], count: int) -> tuple[str, str]:
    """Goes on from a checkpoint that only the first rank reads: the state at once, and after more steps."""
    run = run_of(settings, ranks)
    read = {name: torch.tensor(value) for name, value in tensors.items()} | {"random/torch": torch.get_rng_state()}
    run.begin(Checkpoint(record["step"], read, record) if ranks.first else None)
    return hashed(run), hashed(steps(run, count))


def test_a_checkpoint_of_shards_goes_on_bit_for_bit(pair: Pair, tiny_base: Path) -> None:
    """Two steps, a checkpoint, two steps: the bits of four."""
    settings = sharded_settings(tiny_base)
    assert {found for _, found in pair.run(resumed_on, settings, *pair.run(begun_on, settings, 2)[0], 2)} == set(pair.run(steps_on, settings, 4))


def test_a_checkpoint_is_that_of_any_number_of_processes(pair: Pair, tiny_base: Path) -> None:
    """One of shards is what one process goes on from, and the other way round, every bit of it."""
    settings = sharded_settings(tiny_base)
    alone = unsharded(settings)
    of_shards, of_one = pair.run(begun_on, settings, 2)[0], begun_on(ALONE, alone, 2)
    at_once, _ = resumed_on(ALONE, alone, *of_shards, 1)
    assert {at_once} == {found for found, _ in pair.run(resumed_on, settings, *of_shards, 1)}
    at_once, _ = resumed_on(ALONE, alone, *of_one, 1)
    assert {at_once} == {found for found, _ in pair.run(resumed_on, settings, *of_one, 1)}


def validated_on(ranks: Ranks, settings: AdaptationSettings) -> tuple[Any, str, str]:
    """Validations before and after steps, and the state with and without them."""
    run = steps(run_of(settings, ranks), 1)
    assert run.validation.look()
    rows = list(run.validation.rows)
    run.validation.rows.clear()
    looked = hashed(steps(run, 2))
    assert run.validation.look()
    return [rows, run.validation.rows], looked, hashed(steps(run_of(settings, ranks), 3))


@pytest.mark.parametrize("samples", [3, 1])
def test_a_validation_looks_at_the_average_and_changes_nothing(pair: Pair, tiny_base: Path, samples: int) -> None:
    """Also where a rank has fewer pictures than the other, or none: the losses of one process, and steps after it with the bits of steps without it."""
    settings = sharded_settings(tiny_base, validation_samples=samples, lr=1e-3)
    expected, _, _ = validated_on(ALONE, unsharded(settings))
    ours, theirs = pair.run(validated_on, settings)
    assert ours == theirs
    rows, looked, without = ours
    assert looked == without
    for found, wanted in zip(rows, expected, strict=True):
        assert found[0].bins == pytest.approx(wanted[0].bins, rel=1e-3)


def weights(run: TrainingRun) -> dict[str, bytes]:
    return {name: tensor for name, tensor in frozen(run)[0].items() if name.startswith("weights/")}


def overflowing_on(ranks: Ranks, settings: AdaptationSettings) -> tuple[bool, bool, float, list[bool]]:
    """A step in which one rank's part of the gradient overflows, and one in which none does: whether weights moved."""
    run = run_of(settings, ranks)
    trainer = run.trainer
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**12})
    before = weights(run)
    inner = trainer._gradient

    def overflowing() -> Tensor:
        loss = inner()
        if not ranks.first:
            trainer.trainable[0][1].grad.to_local().fill_(math.inf)  # type: ignore[union-attr]
        return loss

    trainer._gradient = overflowing  # type: ignore[method-assign]
    trainer.advance()
    first = weights(run) != before
    scale = trainer.scaler.get_scale()
    trainer._gradient = inner  # type: ignore[method-assign]
    trainer.advance()
    return first, weights(run) != before, scale, [math.isfinite(norm) for _, _, norm in trainer.log()]


def test_all_ranks_leave_out_a_step_in_which_the_shard_of_one_overflows(pair: Pair, tiny_base: Path) -> None:
    """In float16: nobody's weights move, every scale is halved."""
    settings = sharded_settings(tiny_base, compute=ComputeSettings(dtype="float16", threads=1))
    assert pair.run(overflowing_on, settings) == [(False, True, 2.0**11, [False, True])] * 2


def trained_on(ranks: Ranks, settings: AdaptationSettings, store: Store, plan: Any) -> list[int]:
    """The whole of what a rank does."""
    reported: list[int] = []
    stage._train(settings, store, plan, ranks=ranks, progress=lambda reached: reported.append(reached.step))
    return reported


def test_the_artifact_is_that_of_one_process(pair: Pair, fresh: Callable[[], Store], tiny_base: Path, tmp_path: Path) -> None:
    """Previews and checkpoints on the way, then published by one process: the same address, objects, configuration and record, and a file of weights that
    differs in its numbers alone, by float tolerance.
    """
    settings = sharded_settings(tiny_base, previews=1, validation_steps=3, early_stop=2, lr=1e-4)
    store, other = fresh(), fresh()
    plan = plan_adaptation(settings, store, device="cpu")
    assert pair.run(trained_on, settings, store, plan) == [[1, 2, 3, 4, 5, 6], []]
    assert sum(info.key.endswith("step-000004.png") for info in store.list("cache/previews/")) == 1
    ref = publish_adaptation(settings, store, plan)
    alone = unsharded(settings)
    assert stage.adapt(alone, other, device="cpu").version == ref.version
    found, wanted = (resolve(each, f"unets/tiny@{ref.version}").manifest() for each in (store, other))
    assert {entry.key for entry in found.objects} == {entry.key for entry in wanted.objects}
    same = {entry.key for entry in found.objects} & {entry.key for entry in wanted.objects if entry in found.objects}
    assert {"config.json", "finetune.json"} <= {key.rsplit("/", 1)[-1] for key in same}
    assert (found.settings, found.inputs, found.counts.keys()) == (wanted.settings, wanted.inputs, wanted.counts.keys())
    files = []
    for number, each in enumerate((store, other)):
        path = tmp_path / f"{number}.safetensors"
        resolve(each, f"unets/tiny@{ref.version}").download("diffusion_pytorch_model.safetensors", path)
        with safe_open(path, "pt") as file:
            files.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
    assert [(name, tensor.dtype, tensor.shape) for name, tensor in files[0].items()] == [(n, t.dtype, t.shape) for n, t in files[1].items()]
    for name, tensor in files[0].items():
        torch.testing.assert_close(tensor, files[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainable": "lora", "processes": 2},
            "sharded=true is for trainable=full; trainable=lora trains little beside its activations; set sharded to false",
        ),
        ({"trainable": "full"}, "sharded=true leaves each process a part of the weights, but processes=1; raise processes, or set sharded to false"),
        (
            {"trainable": "full", "processes": 2, "optimizer": "adamw-8bit"},
            "sharded=true steps shards by adamw, but optimizer=adamw-8bit takes whole tensors alone; set optimizer to adamw",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        AdaptationSettings.from_tree({"sharded": True} | changes)


def test_shards_are_no_part_of_the_address(tiny_base: Path) -> None:
    assert sharded_settings(tiny_base).digest() == unsharded(sharded_settings(tiny_base)).digest()
