"""A stage by the name of its configuration: what a schedule starts, an event, or a hand in the UI."""

from __future__ import annotations

from prefect import flow

from selfcascade.storage import ArtifactRef
from selfcascade_flows import configuration
from selfcascade_flows.stages import Stage, flow_of
from selfcascade_flows.store_access import StoreAccess
from selfcascade_tasks.stage import logged


@flow(name="scheduled", flow_run_name="{stage} {config}", validate_parameters=True)
def scheduled(stage: Stage = "run", config: str = "demo", overrides: tuple[str, ...] = (), store: str | None = None) -> ArtifactRef:
    """Run a stage as ``selfcascade STAGE --config CONFIG --set …`` does, where the worker runs.

    Args:
        stage: a stage, or run for all of them.
        config: a shipped run, or a settings file that the worker can read.
        overrides: what differs from it, such as ``adaptation.steps=400``.
        store: block with the store and its keys (``selfcascade-store``); unset: as the settings and the worker's environment have it.
    """
    settings = configuration.load(config, list(overrides))
    if store is not None:
        access = StoreAccess.load(store)
        assert isinstance(access, StoreAccess)
        settings = settings.model_copy(update={"store": access.over(settings.store)})
    chosen, arguments = flow_of(stage, settings)
    with logged(settings.store, settings.execution):
        ref: ArtifactRef = chosen(**arguments)
    return ref
