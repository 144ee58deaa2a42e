"""A user's mistake, as every command line here tells it."""


class UserError(ValueError):
    """A user's mistake; the command line prints `error: FIELD: RULE, got VALUE` and exits with 2."""

    def __init__(self, field: str, rule: str, value: object) -> None:
        super().__init__(f"{field}: {rule}, got {value}")
        self.field, self.rule, self.value = field, rule, value

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, object]]:
        return UserError, (self.field, self.rule, self.value)  # so that a process can send it to another
