"""Who holds the others up, from where each process says it is."""

from collections.abc import Mapping

State = tuple[int, str]  # step, what is done in it


def behind(states: Mapping[int, State | None]) -> str:
    """Which processes hold the others up, as words; empty where all are at the same place."""
    known = {process: state for process, state in states.items() if state is not None}
    if len(set(known.values())) < 2:
        return ""
    step = min(state[0] for state in known.values())
    at = {what: [p for p, state in known.items() if state == (step, what)] for _, what in known.values()}
    what = min((what for what in at if at[what]), key=lambda what: len(at[what]))  # the few, where steps are equal
    names = ", ".join(f"process {p}" for p in sorted(at[what])[:4]) + (" and more" if len(at[what]) > 4 else "")
    return f"{names}: {what} {step}, the others are elsewhere"
