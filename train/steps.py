"""The loop over the steps of a run.

    batch -> the compiled step -> is it finite? -> its numbers -> a checkpoint, if due -> the held-out loss, if due

The watchdog hears what begins before it does. A stop that is asked for ends the loop between two steps, with the state
saved; so does the last of --steps.
"""

import jax
import numpy as np

from zigzag_jax.train.checkpoint import Checkpoints
from zigzag_jax.train.hosts.watchdog import PATIENT, Watchdog
from zigzag_jax.train.logs.display import Display
from zigzag_jax.train.logs.experts import expert_numbers
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.logs.observe import Observer
from zigzag_jax.train.logs.replay import check_finite
from zigzag_jax.train.logs.trace import Profile
from zigzag_jax.train.optim import schedule
from zigzag_jax.train.origin import origin
from zigzag_jax.train.saving import Saver
from zigzag_jax.train.setup import Run
from zigzag_jax.train.step import StepMetrics, TrainState
from zigzag_jax.train.stop import StopRequest


class Steps:
    """The steps of one start of a run."""

    def __init__(
        self, this: Run, checkpoints: Checkpoints, log: MetricsLog, display: Display, stop: StopRequest,
        watchdog: Watchdog, profile: Profile,
    ) -> None:  # fmt: skip
        """Everything is entered already, and closed by who entered it."""
        config = this.config
        self.this, self.checkpoints, self.log, self.display = this, checkpoints, log, display
        self.stop, self.watchdog, self.profile = stop, watchdog, profile
        self.observer = Observer(this.sizes, this.batches, this.mesh, profile)
        self.rate = schedule(config.optim, config.steps)
        about = (this.identity, this.config_json, origin(config))
        self.saver = Saver(checkpoints, config.save_every, about, display.say, alone=watchdog.link is None)

    def train(self, first: int, state: TrainState) -> tuple[int, TrainState]:
        """From `first` finished steps to --steps, or until a stop is asked for: (finished steps, state), saved.

        RunError where a step is not finite, and what Saver raises.
        """
        config, step, stopping = self.this.config, first, False
        while step < config.steps and not stopping:
            step += 1
            # the first step compiles; in the one after a trace the others wait for process 0, which sums it up
            patience = PATIENT if step - 1 in (first, self.profile.last) else 1
            batch = self._batch(step, patience)
            state, result = self._compute(step, state, batch, patience)
            self._trace(step)
            check_finite(step, result, batch, config.folder, self.checkpoints.newest_said)
            self._tell(step, result)
            stopping = self.stop.after(step) and step < config.steps
            self._saving(step)
            self.saver.after(step, state, now=stopping or step == config.steps)
            if step % config.eval_every == 0 and step < config.steps and not stopping:
                self._evaluate(step, state)
        self.saver.finish(step, state, lambda: self._saving(step))
        return step, state

    def _batch(self, step: int, patience: float) -> dict[str, jax.Array]:
        self.watchdog.doing(step, "reading the batch of step", patience)
        self.observer.begin(step)
        batch = self.this.batches.at(step - 1)
        self.observer.timer.data_ready()
        return batch

    def _compute(
        self, step: int, state: TrainState, batch: dict[str, jax.Array], patience: float
    ) -> tuple[TrainState, StepMetrics]:
        """The new state, in the old one's buffers, and the step's numbers on the host."""
        self.watchdog.doing(step, "computing step", patience)
        if self.profile.program is None:
            self.profile.program = self.this.step.lower(state, batch).compile()
        state, result = self.profile.program(state, batch)
        result = jax.device_get(result)  # waits: hundreds of steps in flight at once can hang CPU devices
        self.observer.timer.finished()
        return state, result

    def _trace(self, step: int) -> None:
        if step == self.profile.last:
            self.watchdog.doing(step, "summing up the trace of step", PATIENT)
        self.profile.after(step)

    def _tell(self, step: int, result: StepMetrics) -> None:
        losses, loss = result.losses, float(result.losses.loss)
        seen = self.observer.values(step, float(losses.tokens))
        numbers = seen | expert_numbers(step, np.asarray(losses.load), self.this.sizes.sparse_layers)
        if self.this.config.optim.z_loss:
            numbers["z_loss"] = float(losses.z_loss)
        self.log.step(
            step, loss=loss, aux_loss=float(losses.aux_loss), grad_norm=float(result.grad_norm),
            learning_rate=float(jax.device_get(self.rate(step - 1))), **numbers,
        )  # fmt: skip
        self.display.step(step, loss, seen["tokens_per_second"])

    def _saving(self, step: int) -> None:
        self.watchdog.doing(step, "saving after step", PATIENT)

    def _evaluate(self, step: int, state: TrainState) -> None:
        self.watchdog.doing(step, "evaluating after step", PATIENT)
        loss = self.this.held_out.loss(self.this.losses, state.params)
        self.log.step(step, eval_loss=loss)
        self.display.say(f"step {step}: held-out loss {loss:.4f}")
