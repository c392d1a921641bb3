"""MLflow: a run in the experiment `eff` (or MLFLOW_EXPERIMENT_NAME), through the client alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from eff.run import Run
from eff_tracking.follow import options_of, run_name

DEFAULT_PLACE = "sqlite:///mlflow.db"
EXPERIMENT = "eff"
FOLDER_TAG = "eff.folder"
FLUSH_S = 2.0
"""A batch is sent after this time, so that training does not wait for a server at every step."""
BATCH = 500
"""Figures in a batch; a server takes 1000."""
LONGEST_VALUE = 500


def _alone_with(place: str) -> AbstractContextManager[object]:
    """Let one process at a time make the tables of a SQLite file: the trials of a sweep all find none."""
    _, found, path = place.partition("sqlite:///")
    return FileLock(f"{path}.lock") if found and path else nullcontext()


class MlflowTracker:
    """A run on an MLflow server or in its database; a resumed run goes on as the same one."""

    def __init__(self, run: Run, place: str, resumed: bool):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default tries for minutes
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        assert run.folder is not None
        self.metric = Metric
        self.waiting: list[Any] = []
        self.sent = time.monotonic()
        place = place or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_PLACE
        with _alone_with(place):
            self.client = MlflowClient(tracking_uri=place)
            experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)
        self.id = self._earlier(experiment, run.folder) if resumed else None
        if self.id is not None:
            self.client.update_run(self.id, status="RUNNING")
            return
        tags = {FOLDER_TAG: str(run.folder.resolve())}
        self.id = self.client.create_run(experiment, run_name=run_name(run.folder), tags=tags).info.run_id
        options = [Param(name, str(value)[:LONGEST_VALUE]) for name, value in options_of(run).items()]
        self.client.log_batch(self.id, params=options[:100])  # a server takes 100

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except MlflowException:  # another run was quicker
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _earlier(self, experiment: str, folder: Path) -> str | None:
        """Return the run that an interrupted one in the same folder made."""
        wanted = f"tags.`{FOLDER_TAG}` = '{folder.resolve()}'"
        runs = self.client.search_runs([experiment], wanted, order_by=["attributes.start_time DESC"], max_results=1)
        return runs[0].info.run_id if runs else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Put figures into the batch and send it when it is due."""
        now = int(1000 * time.time())
        self.waiting += [self.metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self.sent > FLUSH_S or len(self.waiting) >= BATCH:
            self._send()

    def _send(self) -> None:
        for start in range(0, len(self.waiting), BATCH):
            self.client.log_batch(self.id, metrics=self.waiting[start : start + BATCH])
        self.waiting = []
        self.sent = time.monotonic()

    def close(self, status: str) -> None:
        """Send the rest and end the run; a second call does nothing."""
        if self.id is not None:
            self._send()
            self.client.set_terminated(self.id, status)
            self.id = None
