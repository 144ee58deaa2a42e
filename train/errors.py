"""How a run ends, and the one error a person can mend: a field, the rule it breaks, the value it had."""

DONE, USER_ERROR, PREEMPTED = 0, 2, 75  # exit codes: finished, a user's mistake, interrupted and saved


class UserError(ValueError):
    """A user's mistake; the command line prints `error: FIELD: RULE, got VALUE` and exits with 2."""

    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(f"{field}: {rule}, got {value}")
        self.field, self.rule, self.value = field, rule, value
