"""What one device holds during a step, as the compiler says it of the compiled step.

    parameters, optimiser, batch    the step's arguments; the state is donated, so the new one takes the old one's place
    temporary                       everything else, which XLA lays into one block by who lives when: gradients, what
                                    the layers keep, the loss's logits, what travels

Some parts of `temporary` follow from shapes, but not when each of them lives: they need not add up to it.
"""

from collections import Counter
from dataclasses import dataclass

from zigzag_jax import hlo
from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.train.config import Config
from zigzag_jax.train.data.batches import abstract_batch
from zigzag_jax.train.dry_run import bytes_a_device
from zigzag_jax.train.loss import CHUNK
from zigzag_jax.train.memory.kept import Kept, kept_by_layers
from zigzag_jax.train.memory.traffic import Travel, travels
from zigzag_jax.train.program import Program


@dataclass(frozen=True)
class Footprint:
    """Bytes of one device."""

    parameters: int
    """Float32."""
    optimiser: int
    """Its moments."""
    batch: int
    """One of them; the trainer reads another ahead."""
    temporary: int
    """XLA's block of temporaries, and the little that it could not write into what it was given."""
    host: int
    """The same in the host's pinned memory."""
    kept: Counter[Kept]
    """What the layers keep for the backward, by kind: in `temporary` or `host`."""
    travels: tuple[Travel, ...]
    """What the device gives to transfers; docs/schedule.md tells what flies above what."""

    @property
    def state(self) -> int:
        """What is there between steps, too."""
        return self.parameters + self.optimiser

    @property
    def peak(self) -> int:
        """Device memory of the step."""
        return self.state + self.batch + self.temporary


def measure(config: Config, program: Program) -> Footprint:
    """Compile the step for the program's mesh and read what it needs. Minutes for a large model; nothing is run."""
    mesh = program.task.sharding.mesh
    batch = abstract_batch(config.batch, config.seq_len, mesh)
    traced = program.step.trace(program.state, batch)
    compiled = traced.lower().compile()
    needs = compiled.memory_analysis()
    assert needs is not None  # CPUs and GPUs know
    given = bytes_a_device(program.state.params), bytes_a_device(program.state.opt_state), bytes_a_device(batch)
    total = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    rest = total + needs.temp_size_in_bytes - sum(given)
    kept = kept_by_layers(traced.jaxpr, mesh.size)
    moved = travels(hlo.Program(compiled.as_text() or ""))
    return Footprint(*given, rest, needs.host_temp_size_in_bytes, kept, moved)


def known_parts(config: Config, sizes: ModelConfig, program: Program) -> dict[str, int]:
    """Parts of Footprint.temporary that follow from shapes, in bytes of one device."""
    mesh, itemsize = program.task.sharding.mesh, program.task.dtype.itemsize
    batch = next(iter(abstract_batch(config.batch, config.seq_len, mesh).values()))
    tokens = batch.size // (mesh.size * config.accumulate)
    chunk, words = min(CHUNK, tokens), sizes.vocab_size
    hop = tokens * max(sizes.hop_values.values())
    found = {
        "gradients": bytes_a_device(program.state.params) * (1 if config.accumulate == 1 else 2),
        f"logits of {chunk} tokens and their gradient": chunk * words * (4 + itemsize),
        "the head and its gradient, whole": sizes.hidden_size * words * (4 + itemsize),
        "the ring's payload and gradient, two of each": 2 * hop * (itemsize + 4) if mesh.shape["cp"] > 1 else 0,
    }
    return {name: size for name, size in found.items() if size}
