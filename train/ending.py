"""How a finished run ends: its held-out loss beside the baselines, what the model writes, its loss curve."""

from collections.abc import Callable

import jax

from zigzag_jax.models.decode import write
from zigzag_jax.train.data.mixture import shares
from zigzag_jax.train.logs import metrics
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.logs.report import draw_loss, prompts
from zigzag_jax.train.setup import Run
from zigzag_jax.train.step import TrainState

_PROMPT, _WRITTEN = 24, 72  # tokens of a prompt, tokens the model adds


def report(this: Run, step: int, state: TrainState, log: MetricsLog, part: Callable[[], None]) -> None:
    """Say and draw it all, after `step` steps; `part` is called after each part that needs all processes."""
    config, say = this.config, this.say
    loss = this.held_out.loss(this.losses, state.params, part)
    log.step(step, eval_loss=loss)
    for line in shares(this.dataset.train, this.batches.plan, step * config.batch):
        say(line)
    unigram, bigram = this.held_out.baselines(this.dataset)
    say(f"held-out loss {loss:.3f} nats a token; unigram model {unigram:.3f}, bigram model {bigram:.3f}")
    given = prompts(this.dataset, 2, min(_PROMPT, config.seq_len - 1)).tolist()
    told = lambda tokens: part()
    texts = write(this.writer, state.params, given, _WRITTEN, seed=config.seed, temperature=0.7, told=told)
    decode = this.dataset.tokenizer.decode
    for prompt, text in zip(given, texts, strict=True):
        say(f"\n--- given:\n{decode(prompt)}\n--- the model goes on:\n{decode(text)}")
    picture, numbers = config.folder / "loss.png", config.folder / metrics.FILE
    if jax.process_index() == 0:
        draw_loss(numbers, (unigram, bigram), picture, say)
    say(f"\nloss curve {picture}, numbers {numbers}, TensorBoard events {config.folder / 'tensorboard'}")
    say(f"To go on, give the same command with a larger --steps: it resumes from step {step}.")
