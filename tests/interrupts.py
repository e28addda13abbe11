"""A callback that breaks a run off, as Ctrl-C or a killed process would."""


class Interrupt:
    """Raises KeyboardInterrupt after a step; 0 lets the run end."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, run):
        if run.step == self.at:
            raise KeyboardInterrupt

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
