"""The training loop: everything that changes while a small network trains on a frozen base, one step, and how to stop and go on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.dataset import TrainingOrder
from selfcascade.adaptation.ema import MovingAverage
from selfcascade.adaptation.objective import Objective, Trained
from selfcascade.adaptation.optimizer import learning_rate, optimizer_of
from selfcascade.adaptation.ranks import ALONE, Ranks
from selfcascade.adaptation.sharding import copied, is_sharded, part_for, together, whole
from selfcascade.config import AdaptationSettings
from selfcascade.settings import SettingsError

COLUMNS = ("loss", "lr", "grad_norm")
"""What the log holds of each step: loss, learning rate, norm of the gradient before clipping."""


class Diverged(SettingsError):
    """The loss is no number any more, or float16 holds its gradient at no scale."""


class Trainer:
    """Training of one small network (Algorithm 1): weights, moving average, optimizer, position in the data, random numbers, log.

    What is trained, and against what, is the objective's. All draws of a step come from one CPU generator in a fixed order, for all of its samples at once,
    so that they are the same on every device and however the samples are cut into parts, and continue exactly after :meth:`restore`. Several processes train as
    one: each draws for all samples and takes its share, their gradients are summed, and then each takes the same step: on all weights, or where these are in
    shards on its own.
    """

    def __init__(self, objective: Objective, *, latents: LatentCache, settings: AdaptationSettings, device: torch.device, ranks: Ranks = ALONE) -> None:
        """Start at step 0.

        Args:
            objective: holds the network that trains, kept in float32, and the frozen ones, in the precision of ``settings.compute``.
            latents: cached latents and text embeddings.
            settings: of the run.
            device: where the networks run.
            ranks: who trains it.
        """
        self.settings = settings
        self.device = device
        self.ranks = ranks
        self.dtype: torch.dtype = getattr(torch, settings.compute.dtype)
        self.objective = objective
        self.trained = objective.trained.to(device=device, dtype=torch.float32).train()
        self.latents = latents
        self.order = TrainingOrder(latents.buckets(latents.keys("train")), seed=settings.seed, batch=settings.batch)
        share = ranks.share(settings.batch)
        self.part = len(share) // settings.accumulation
        self.parts = [slice(start, start + self.part) for start in share[:: self.part]]
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.sharded = is_sharded(self.trained)
        self.trainable: list[tuple[str, nn.Parameter]] = [(name, p) for name, p in self.trained.named_parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self._parameters(), settings, weight_decay=objective.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.average = MovingAverage(self.trainable, decay=settings.ema)
        self.step = 0
        self.position = 0
        self._log: list[tuple[float, ...]] = []
        self._unread: list[Tensor] = []

    def advance(self) -> None:
        """One optimizer step on the next batch. In float16 a step whose gradient overflows moves nothing and lowers the scale of those after it."""
        loss = self._gradient()
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.get_total_norm(parameter.grad for parameter in self._parameters() if parameter.grad is not None))
        nn.utils.clip_grads_with_norm_(self._parameters(), self.settings.clip, norm)
        lr = learning_rate(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.trainable)
        self.step += 1
        self.position += self.settings.batch
        self._unread.append(torch.stack([loss, torch.full_like(loss, lr), norm.detach()]))

    def _gradient(self) -> Tensor:
        """The mean loss of the next batch, detached; leaves its gradient, times the scale of float16, on the parameters: of all ranks, before it is clipped."""
        batch = self.settings.batch
        keys = self.order.batch(self.position, batch)
        draws = self.objective.draw((batch, *self.latents.shape(keys[0])), self.generator)
        losses = []
        for part in self.parts:
            samples = self.latents.batch(keys[part])
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.objective.loss(samples, *(drawn[part] for drawn in draws)) * (len(keys[part]) / batch)
            torch.autograd.backward(self.scaler.scale(loss))
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        # Of shards the backward pass has summed the gradients.
        self.ranks.add([loss, *(parameter.grad for parameter in self._parameters() if parameter.grad is not None and not self.sharded)])
        return loss

    def log(self) -> list[tuple[float, ...]]:
        """Of every step so far what :data:`COLUMNS` says. Waits for the device; between calls nothing does.

        Raises:
            Diverged: the loss of a step is not finite; names the step.
        """
        rows = torch.stack(self._unread).tolist() if self._unread else []
        # In float16 a gradient that overflows is skipped; below a scale of 1 there is nothing left to lower.
        skips = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        for step, (loss, _, norm) in enumerate(rows, start=len(self._log) + 1):
            if not (math.isfinite(loss) and (math.isfinite(norm) or skips)):
                raise Diverged(
                    f"training stopped at step {step}: its loss is {loss} and the norm of its gradient {norm}; lower adaptation.lr={self.settings.lr}, "
                    "raise adaptation.warmup or use compute.dtype float32 (checkpoints of earlier steps are kept)"
                )
        self._log += [tuple(row) for row in rows]
        self._unread.clear()
        return self._log

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that :meth:`restore` needs: tensors by name, of shards this rank's, and a JSON record. Raises Diverged rather than hand out a broken state."""
        log = self.log()
        tensors = {f"weights/{name}": parameter.detach() for name, parameter in self.trainable}
        tensors |= {f"ema/{name}": value for name, value in self.average.values.items()}
        tensors |= {f"fitted/{name}": value for name, value in self.trained.named_buffers()}
        counters: dict[str, dict[str, int]] = {}
        for name, parameter in self.trainable:
            for slot, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{slot}"] = value
                else:  # bitsandbytes counts its steps in a number
                    counters.setdefault(name, {})[slot] = value
        tensors |= {"random/draws": self.generator.get_state(), "random/torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        tensors["log"] = torch.tensor(log, dtype=torch.float64).reshape(-1, len(COLUMNS))
        record = {"step": self.step, "position": self.position, "ema_updates": self.average.updates}
        return tensors, record | {"optimizer": counters, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken: every later step is bit for bit the one of an undisturbed run on the same device.

        Tensors are whole; each is looked at once, in an order that is the same on every rank, and a rank keeps its shards of them.
        """
        parameters = dict(self.trainable)
        with torch.no_grad():
            for name, parameter in self.trainable:
                parameter.copy_(part_for(parameter, tensors[f"weights/{name}"]))
                self.average.values[name].copy_(part_for(parameter, tensors[f"ema/{name}"]))
            for name, fitted in self.trained.named_buffers():
                fitted.copy_(tensors[f"fitted/{name}"])
        slots: dict[str, dict[str, Any]] = {name: dict(counters) for name, counters in record["optimizer"].items()}
        for path in tensors:
            if path.startswith("optimizer/"):
                name, slot = path.removeprefix("optimizer/").rsplit("/", 1)
                slots.setdefault(name, {})[slot] = part_for(parameters[name], tensors[path])
        state = self.optimizer.state_dict()
        state["state"] = {index: slots[name] for index, (name, _) in enumerate(self.trainable) if name in slots}
        self.optimizer.load_state_dict(state)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(record["scaler"])
        self.generator.set_state(tensors["random/draws"])
        torch.set_rng_state(tensors["random/torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)
        self.step, self.position, self.average.updates = record["step"], record["position"], record["ema_updates"]
        self._log, self._unread = [tuple(row) for row in tensors["log"].tolist()], []

    def averaged(self) -> Trained:
        """A copy of the network with the moving average for weights: what previews and the artifact hold.

        Of shards all ranks ask for it at the same time, and the first one gets it, in host memory; the others' is on the meta device.
        """
        if self.sharded:
            return together(self.trained, copied(self.average.values, keep=self.ranks.first))
        trained: Trained = copy.deepcopy(self.trained).eval()
        trained.load_state_dict(self.average.values, strict=False)
        return trained

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.trainable]
