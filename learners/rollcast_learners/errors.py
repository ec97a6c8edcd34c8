"""What can go wrong with learners as processes, for whoever has to notice it without loading one."""


class LearnerLost(RuntimeError):
    """A learner is gone, and with it all that was learned since the last checkpoint. Says why."""
