"""What Serve says of the application that this replica belongs to. Both ask Serve's controller, and block."""

from __future__ import annotations

from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

BEING_DEPLOYED = {ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING, ApplicationStatus.DEPLOY_FAILED}


def is_being_deployed() -> bool:
    """True from a deploy until the application is RUNNING for the first time after it."""
    application = _application()
    return application is None or application.status in BEING_DEPLOYED


def has_running_replica(deployment: str) -> bool:
    """Another is there, of this deploy or of the one before."""
    application = _application()
    found = application.deployments.get(deployment) if application else None
    return found is not None and found.replica_states.get("RUNNING", 0) > 0


def _application() -> ApplicationStatusOverview | None:
    return serve.status().applications.get(serve.get_replica_context().app_name)
