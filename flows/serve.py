"""Serving: the flows as deployments that the Prefect UI can start, in this process until Ctrl-C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfcascade.config import PipelineSettings, StoreSettings
from selfcascade_flows.server import PrefectServer

if TYPE_CHECKING:
    from prefect import Flow


def serve(settings: PipelineSettings, *, port: int) -> None:
    """Serve every flow with the values of ``settings`` as defaults of its form, and the UI on ``port`` unless ``PREFECT_API_URL`` names a server."""
    with PrefectServer(port) as server:
        from prefect import serve as serve_deployments

        server.wait()
        serve_deployments(*deployments(settings), print_starting_message=True, limit=1)


def deployments(settings: PipelineSettings) -> list[Any]:
    """One deployment a flow, named after the run. Secrets stay out: a flow takes them from the environment that it runs in."""
    from prefect.types.entrypoint import EntrypointType

    from selfcascade_flows.adapt import adapt
    from selfcascade_flows.curate import curate
    from selfcascade_flows.evaluate import evaluate
    from selfcascade_flows.generate import generate
    from selfcascade_flows.pipeline import pipeline
    from selfcascade_flows.pretrain import pretrain
    from selfcascade_flows.variants import variant, variants

    samples = {label: f"samples/{sampling.name}" for label, sampling in variants(settings).items()}
    plain = settings.model_copy(update={"store": _without_secrets(settings.store)}).model_dump(mode="json")
    common = {"store": plain["store"], "execution": plain["execution"]}
    parameters: dict[Flow[..., Any], dict[str, Any]] = {
        curate: {"settings": plain["curation"], **common},
        pretrain: {"settings": plain["pretraining"], **common},
        adapt: {"settings": plain["adaptation"], **common},
        generate: {"settings": variant(settings, settings.generation.method).model_dump(mode="json"), **common},
        evaluate: {"settings": plain["evaluation"], "samples": samples, **common},
        pipeline: {"settings": plain},
    }
    return [
        flow.to_deployment(settings.name, parameters=values, tags=["selfcascade", settings.name], entrypoint_type=EntrypointType.MODULE_PATH)
        for flow, values in parameters.items()
    ]


def _without_secrets(store: StoreSettings) -> StoreSettings:
    return store.model_copy(update={"access_key": None, "secret_key": None})
