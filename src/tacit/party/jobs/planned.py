"""A job as something that tickets are dealt for."""

from __future__ import annotations

from tacit.party.dealing import Dealable, Draw, draw
from tacit.party.jobs.description import Job
from tacit.program.run import Cost


class PlannedJob(Dealable):
    """What a ticket of a job takes: the correlated randomness of one step. No masks last longer than that.

    Args:
        job: the job.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    @property
    def digest(self) -> str:
        """The job's."""
        return self.job.digest

    def plan(self, batch: int) -> Cost:
        """What a step costs.

        Raises:
            InputError: the job takes batches of another size.
        """
        return self.job.cost(batch)

    def draw(self, batch: int) -> Draw:
        """Draw a ticket.

        Raises:
            InputError: the job takes batches of another size.
        """
        return draw(self.cost(batch).correlations)

    def __repr__(self) -> str:
        return f"PlannedJob({self.job})"
