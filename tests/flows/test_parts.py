"""How the chunks of samples that are left are given to tasks."""

import pytest

from selfcascade.config import ExecutionSettings, GenerationSettings, PromptSettings
from selfcascade_tasks.generate import MOST, SHARES, parts, plan


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("left", [0, 1, 40, 140])
def test_every_chunk_that_is_left_is_in_one_part(store, tmp_path, left, workers):
    """Whatever is left, also nothing: a run that was killed between its last shard and its manifest has only to publish."""
    (tmp_path / "prompts.txt").write_text("".join(f"{number} apples\n" for number in range(140)))
    settings = GenerationSettings(method="base", prompts=PromptSettings(file=tmp_path / "prompts.txt"), chunk=1)
    whole = plan.fn(settings, store.settings)
    assert len(whole.todo) == 140
    planned = whole.model_copy(update={"done": whole.todo[: 140 - left], "todo": whole.todo[140 - left :]})
    found = list(parts(settings, store.settings, planned, ExecutionSettings(workers=workers)))
    assert [index for part in found for index in part.chunks] == list(planned.todo)
    assert all(1 <= len(part.chunks) <= MOST for part in found)
    assert len(found) >= min(left, SHARES * workers // 2)
