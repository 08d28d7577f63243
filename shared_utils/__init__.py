"""What is not about any paper: the run, checkpoints, data plumbing, processes, mini data, results tables."""


class UserError(Exception):
    """A mistake in the input: its message is one line that names the thing and the cure; scripts exit with code 2."""
