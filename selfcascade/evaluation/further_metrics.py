"""Numbers of networks beside the one that KID and FID rest on: CMMD and CLIP score of CLIP, FD-DINOv2 of DINOv2, the Inception score."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.evaluation.cmmd import CmmdBlock
from selfcascade.evaluation.distances import fid
from selfcascade.evaluation.embeddings import Embeddings
from selfcascade.evaluation.inception_score import Classified
from selfcascade.evaluation.measured import LARGEST_GRAM, Measured, Shared, blank, frechet_number, mean_number, put
from selfcascade.evaluation.results import Number

_NO_HEAD = "the weights have no classes: their file ends with features, and this score is made of class probabilities"
_TOO_MANY = f"more than {LARGEST_GRAM:,} pictures: their kernel does not fit the memory that an evaluation may take"


def measure_further(shared: Shared, measured: Measured, label: str, why: str) -> None:
    """The numbers of every further network for the set ``label``; ``why`` says, where it is not empty, why there are none against the base."""
    rows, columns = shared.halves.rows, shared.halves.columns
    for name, further in shared.further.items():
        table = further.tables[label]
        if name == "inception-v3":
            _inception_score(shared, measured, table)
            continue
        own = torch.from_numpy(table.features)
        distance, into = (_frechet, "fd_dinov2") if name == "dinov2" else (_cmmd, "cmmd")
        distance(shared, measured, f"{into}_r", own, further.real, rows, columns)
        if why or further.base is None:
            blank(measured, why, f"{into}_b")
        else:
            distance(shared, measured, f"{into}_b", own, further.base, rows, rows)
        if name == "clip":
            mean_number(shared, measured, "clip_score", clip_scores(table))


def further_floor(name: str, table: Embeddings, some: NDArray[np.int64], others: NDArray[np.int64], *, seed: int) -> dict[str, Number]:
    """Of real pictures against other real ones, of real pictures beside their own captions, and of as many real ones by themselves."""
    if name == "inception-v3":
        if table.logits is None:
            return {"inception_score": Number(why=_NO_HEAD)}
        scores = Classified.of(torch.from_numpy(table.logits[some]), seed=seed).scores()
        return {"inception_score": Number(value=float(scores.mean()), spread=float(scores.std(correction=0)))}
    one, rest = torch.from_numpy(table.features[some]), torch.from_numpy(table.features[others])
    if name == "dinov2":
        return {"fd_dinov2_r": Number(value=fid(rest, one))}
    return {"cmmd_r": Number(value=float(CmmdBlock.of(one, rest).distance())), "clip_score": Number(value=float(clip_scores(table)[some].mean()))}


def clip_scores(table: Embeddings) -> NDArray[np.float64]:
    """``100 max(cos(picture, prompt), 0)`` of each picture, (n,) (Hessel et al., 2021, in the scale that torchmetrics gives it)."""
    assert table.agreement is not None
    scores: NDArray[np.float64] = 100 * np.maximum(table.agreement.astype(np.float64), 0)
    return scores


def _inception_score(shared: Shared, measured: Measured, table: Embeddings) -> None:
    name = "inception_score"
    if table.logits is None:
        blank(measured, _NO_HEAD, name)
        return
    classified = Classified.of(torch.from_numpy(table.logits), seed=shared.settings.seed)
    scores = classified.scores()
    rows = shared.halves.rows
    put(shared, measured, name, float(scores.mean()), None if rows is None else classified.halves(rows), spread=float(scores.std(correction=0)))


def _frechet(shared: Shared, measured: Measured, name: str, own: Tensor, reference: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    frechet_number(shared, measured, name, shared.block(own, reference), own, reference, rows, columns)


def _cmmd(shared: Shared, measured: Measured, name: str, own: Tensor, reference: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    if max(len(own), len(reference)) > LARGEST_GRAM:
        blank(measured, _TOO_MANY, name)
        return
    block = CmmdBlock.of(own, reference)
    put(shared, measured, name, float(block.distance()), None if rows is None or columns is None else block.distance(rows, columns))
