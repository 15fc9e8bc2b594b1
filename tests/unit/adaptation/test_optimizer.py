from __future__ import annotations

import builtins
from collections.abc import Callable

import pytest
import torch
from diffusers.optimization import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_trainer import state
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade.adaptation.optimizer import learning_rate, optimizer_of
from selfcascade.adaptation.requirements import check_precision
from selfcascade.config import ComputeSettings
from selfcascade.settings import SettingsError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCHEDULES: dict[str, Callable[..., torch.optim.lr_scheduler.LambdaLR]] = {
    "constant": lambda optimizer, warmup, steps: get_constant_schedule_with_warmup(optimizer, warmup),
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


def test_learning_rates_are_their_closed_forms() -> None:
    """Two steps of warm-up to 1e-3, then four: constant, by quarters to zero, or by half a cosine to zero."""
    tail = {"constant": [1, 1, 1, 1], "linear": [3 / 4, 1 / 2, 1 / 4, 0], "cosine": [(2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4, 0]}
    for schedule, factors in tail.items():
        settings = tiny_settings("b", lr=1e-3, warmup=2, steps=6, schedule=schedule)
        assert [learning_rate(step, settings) for step in range(6)] == pytest.approx([5e-4, 1e-3, *(1e-3 * factor for factor in factors)], abs=1e-12)


@given(schedule=st.sampled_from(sorted(SCHEDULES)), steps=st.integers(1, 60), warmup=st.integers(0, 70))
def test_learning_rates_are_those_of_diffusers_one_step_on(schedule: str, steps: int, warmup: int) -> None:
    """Of its own schedules at every step, also where the warm-up is longer than the run (of just its length they disagree with each other)."""
    assume(warmup != steps)
    settings = tiny_settings("b", lr=2e-3, warmup=warmup, steps=steps, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    factor = SCHEDULES[schedule](optimizer, warmup, steps).lr_lambdas[0]
    rates = [learning_rate(step, settings) for step in range(steps)]
    assert rates == pytest.approx([2e-3 * factor(step + 1) for step in range(steps)], abs=1e-15)


@pytest.mark.parametrize("name", ["accumulation", "optimizer", "schedule", "timesteps", "snr_gamma"])
def test_other_settings_are_another_version(name: str) -> None:
    """So that no checkpoint of one run is gone on from by another."""
    other = {"accumulation": 2, "optimizer": "adamw-8bit", "schedule": "cosine", "timesteps": "stratified", "snr_gamma": 5.0}[name]
    assert tiny_settings("b", **{name: other}).digest() != tiny_settings("b").digest()


def test_parts_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValidationError, match="batch=4 does not divide into accumulation=3 equal parts; change either"):
        tiny_settings("b", accumulation=3)


def test_eight_bits_need_cuda_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, that names the setting and the way out."""
    settings = tiny_settings("b", optimizer="adamw-8bit")
    with pytest.raises(SettingsError, match=r"adaptation\.optimizer=adamw-8bit needs a CUDA device, not cpu; use adamw$"):
        check_precision(settings, CPU)

    def without(name: str, *args: object, real: Callable[..., object] = builtins.__import__) -> object:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    for refuse in (lambda: check_precision(settings, CUDA), lambda: optimizer_of([], settings, weight_decay=0.0)):
        with pytest.raises(SettingsError, match=r"bitsandbytes, which is not installed; pip install 'selfcascade\[8bit\]', or use adamw$"):
            refuse()


def test_eight_bits_go_on_where_they_were() -> None:
    """Interrupted equals uninterrupted bit for bit; most of the averages are bytes, and the steps that they count are restored."""
    pytest.importorskip("bitsandbytes")
    latents, settings = synthetic_latents(), tiny_settings("b", optimizer="adamw-8bit", steps=3)
    whole = tiny_trainer(latents, settings)
    whole.advance()
    tensors, record = whole.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    assert torch.uint8 in {tensor.dtype for name, tensor in tensors.items() if name.endswith("/state1")}
    assert {slots["step"] for slots in record["optimizer"].values()} == {1}
    resumed = tiny_trainer(latents, settings)
    resumed.restore(saved, record)
    for trainer in (whole, resumed):
        while trainer.step < settings.steps:
            trainer.advance()
    assert state(resumed) == state(whole)


def test_float16_trains_on_cuda_alone() -> None:
    """Elsewhere it is refused with the reason and the way out."""
    half = tiny_settings("b", compute=ComputeSettings(dtype="float16", threads=1))
    check_precision(half, CUDA)
    with pytest.raises(SettingsError, match=r"float16 has too small a range for gradients; use bfloat16 or float32, or a CUDA device") as error:
        check_precision(half, CPU)
    assert "\n" not in str(error.value)
