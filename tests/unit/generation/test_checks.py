"""The checks for users: they pass on every family, and each defect that they are there for makes one fail."""

from __future__ import annotations

import models
import pytest
import torch

from selfcascade import SelfCascadePipeline
from selfcascade.cascade import denoiser, pivot, sampling
from selfcascade.generation import checks
from selfcascade.generation.checks import CHECKS, run_checks


def failures(kind: str = "small") -> dict[str, str]:
    outcomes = list(run_checks(SelfCascadePipeline.from_pipe(models.base(kind))))
    assert [outcome.claim for outcome in outcomes] == [check.claim for check in checks.CHECKS]
    return {outcome.claim: outcome.found for outcome in outcomes if not outcome.passed}


@pytest.mark.parametrize("kind", models.KINDS)
def test_every_check_passes_on_every_family(kind):
    assert not failures(kind)


def test_a_check_leaves_the_pipeline_as_it_was():
    pipeline = SelfCascadePipeline.from_pipe(models.base("small"))
    pipeline.unet.requires_grad_(True)
    scheduler = pipeline.scheduler
    list(run_checks(pipeline))
    assert pipeline.scheduler is scheduler
    assert pipeline.upsampler is None
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipeline.unet.parameters())


DEFECTS = {
    "the pivot stays as it is": lambda monkeypatch: monkeypatch.setattr(
        denoiser, "_repeat", lambda latent, rows: torch.cat([latent.mul_(0.5)] * ((rows.stop - rows.start) // len(latent)))
    ),
    "guidance jointly and separately": lambda monkeypatch: monkeypatch.setattr(
        denoiser, "_repeat", lambda latent, rows: latent.repeat_interleave((rows.stop - rows.start) // len(latent), 0)
    ),
    "a small K returns the pivot": lambda monkeypatch: monkeypatch.setattr(
        sampling, "renoise_pivot", lambda pivot_, size, scheduler, **options: pivot.renoise_pivot(0 * pivot_, size, scheduler, **options)
    ),
    "attention scaling": lambda monkeypatch: (
        monkeypatch.setattr(checks, "attention_factor", lambda tokens, ratio: 1.0)
        or monkeypatch.setattr(checks, "scaled_attention", lambda unet, ratio: torch.no_grad())
    ),
    "training changes the upsampler alone": lambda monkeypatch: monkeypatch.setattr(
        checks,
        "unet_with_pivot",
        lambda unet, z, t, text, *, upsampler, pivot, **rest: (
            unet(z, t, text, **rest).sample
            + 0 * upsampler(0, z.new_zeros(1, upsampler.config.channels[0], 4, 4), t=t, emb=z.new_zeros(1, upsampler.config.time_width), size=(4, 4)).sum()
        ),
    ),
}


@pytest.mark.parametrize("claim", DEFECTS)
def test_a_defect_fails_its_check(claim, monkeypatch):
    """That check alone is made: all of them take ten times as long."""
    DEFECTS[claim](monkeypatch)
    monkeypatch.setattr(checks, "CHECKS", [check for check in CHECKS if check.claim == claim])
    assert list(failures()) == [claim]


def test_want_of_memory_is_a_failed_check_and_the_others_go_on(monkeypatch):
    def explode(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(checks, "scaled_attention", explode)
    assert failures() == {"attention scaling": "out of memory; set --dtype to a half precision"}
