"""The trace reader: hops, steps and bubbles, of a made trace of two GPUs and of one cut out of a real run."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import pytest
import read_trace
from trace_events import Event, clip, length, overlap, read, union, without
from trace_hops import REST, busiest, by_kernel, hops, steps, summary
from trace_picture import LANES, lanes

pytestmark = pytest.mark.source
REAL = Path(__file__).parent / "traces" / "h100_two_layers.textproto"
SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
# a ring of two, forward, as it runs: the first hop is posted before its kernel is launched
RING = {
    "Stream #13(Compute)": [("flash_fwd_mosaic_gpu_kernel", 30.0, 800.0), ("loop_add_fusion", 840.0, 10.0),
                            ("flash_fwd_mosaic_gpu_kernel", 900.0, 850.0)],
    "Stream #20(Compute)": [(SEND, 0.0, 90.0)],
    "Stream #21(Compute)": [(SEND, 10.0, 75.0), (SEND, 830.0, 40.0)],
    "XLA Ops": [("fusion", 0.0, 5000.0)],
}  # fmt: skip


def write(folder: Path, text: str) -> Path:
    """A folder with one trace."""
    folder.mkdir(exist_ok=True)
    (folder / "host.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    return folder


def plane(name: str, lines: dict, late: float = 0.0) -> str:
    """An XPlane in text form of {line: [(event, start us, length us)]}, shifted by `late` us."""
    names = list(dict.fromkeys(event for events in lines.values() for event, *_ in events))
    text = [f'planes {{ name: "{name}"']
    for line, events in lines.items():
        text.append(f'lines {{ name: "{line}" timestamp_ns: 7000')
        for event, start, took in events:
            offset = round((start + late) * 1e6)
            text.append(
                f"events {{ metadata_id: {names.index(event) + 1} offset_ps: {offset} duration_ps: {took * 1e6:.0f} }}"
            )
        text.append("}")
    keys = enumerate(names, 1)
    return "\n".join([*text, *(f'event_metadata {{ key: {n} value {{ id: {n} name: "{x}" }} }}' for n, x in keys), "}"])


@pytest.fixture
def ring(tmp_path):
    """A folder with a trace of two GPUs, of which the second is 5 us late."""
    both = [plane("/device:GPU:0", RING), plane("/device:GPU:1", RING, 5.0), plane("/host:CPU", RING)]
    return write(tmp_path / "trace", "\n".join(both))


@pytest.fixture
def real(tmp_path):
    """The forward of two layers on one H100."""
    return write(tmp_path / "real", REAL.read_text())


def test_arithmetic_of_spans():
    spans = union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (3.0, 4.0)])
    assert spans == [(0.0, 4.0), (5.0, 6.0)]
    assert clip(spans, (1.0, 5.5)) == [(1.0, 4.0), (5.0, 5.5)]
    assert clip(spans, (4.0, 5.0)) == []
    holes = [(-1.0, 0.5), (2.0, 3.0), (5.0, 9.0)]
    assert without(spans, holes) == [(0.5, 2.0), (3.0, 4.0)]
    assert length(without(spans, holes)) == pytest.approx(length(spans) - overlap(spans, holes))


def test_what_is_read_are_the_streams_of_gpus(ring):
    gpus = read(ring)
    assert list(gpus) == ["GPU:0", "GPU:1"]
    assert [event.start for event in gpus["GPU:0"]] == [0.0, 10.0, 30.0, 830.0, 840.0, 900.0]
    assert gpus["GPU:1"][0] == Event(SEND, 5.0, 95.0)


def test_hops_and_their_exposed_time(ring):
    first, second = hops(read(ring)["GPU:0"])
    # k and v fly together, for 30 us before the kernel is there
    assert (first.start, first.end, first.transfers, first.exposed) == (0.0, 90.0, 2, 30.0)
    assert first.beside == "flash_fwd_mosaic_gpu_kernel"
    assert (second.transfers, second.exposed, second.beside) == (1, 30.0, "loop_add_fusion")
    apart = [Event("nccl", 0.0, 5.0), Event("nccl", 5.0, 9.0)]  # one after the other: two hops, beside nothing
    assert [(hop.exposed, hop.beside) for hop in hops(apart)] == [(5.0, ""), (4.0, "")]


def test_a_step_is_kernel_other_exposed_and_bubble(ring):
    events = read(ring)["GPU:0"]
    first, second = steps(events)
    assert first[1:] == (0.0, 830.0, 800.0, 0.0, 30.0, 0.0)
    # the hop that was late: 10 us alone, 10 beside the addition, 20 alone; then 30 us of nothing
    assert second[1:] == (830.0, 1750.0, 850.0, 10.0, 30.0, 30.0)
    (row,) = by_kernel(steps(events))
    assert (row["kernel ms"], row["all exposed ms"], row["all bubbles ms"]) == (0.825, 0.06, 0.03)
    more = [*events, Event("fusion", 1800.0, 1900.0)]
    assert steps(more)[-1] == (REST, 1750.0, 1900.0, 0.0, 100.0, 0.0, 50.0)
    assert [step.kernel for step in steps([Event("fusion", 0.0, 1.0)])] == [REST]
    assert steps([]) == []


def test_a_summary_of_a_gpu():
    events = [
        Event("flash_fwd", 0.0, 100.0),
        Event(SEND, 20.0, 130.0),  # 30 us stand alone, 10 of them beside ...
        Event("fusion.3", 120.0, 125.0),  # ... a small kernel of 5
        Event("MemcpyP2P", 150.0, 160.0),
        Event("flash_bwd", 155.0, 200.0),
    ]
    row = summary(events)
    assert row["transfers"] == 2
    expected = {"trace": 0.2, "kernels": 0.15, "communication": 0.12, "exposed": 0.03, "idle": 0.02}
    for name, ms in expected.items():
        assert row[f"{name} ms"] == pytest.approx(ms)
    assert summary([])["trace ms"] == 0.0
    assert not Event("MemcpyD2D", 0.0, 1.0).moves_data  # inside one GPU
    lines = busiest([*events, Event("flash_fwd", 300.0, 350.0)], count=2).splitlines()
    assert [line.split()[:5] for line in lines] == [
        ["0.15", "ms", "2", "x", "flash_fwd"],
        ["0.11", "ms", "1", "x", SEND],
    ]


def test_a_real_trace(real):
    """Of an H100: no hop, all of the time accounted for, and every kernel by its name."""
    (events,) = read(real).values()
    found = steps(events)
    assert [step.kernel for step in found] == ["flash_fwd_mosaic_gpu_kernel"] * 3
    assert all(11_500 < step.attention < 12_500 for step in found)
    parts = sum(step.attention + step.other + step.exposed + step.bubble for step in found)
    assert parts == pytest.approx(summary(events)["trace ms"] * 1e3)
    assert hops(events) == []
    assert sum(step.bubble for step in found) == pytest.approx(summary(events)["idle ms"] * 1e3)
    names = {event.name for event in events}
    assert {"grouped_mosaic_gpu_kernel", "MemcpyD2D"} < names
    assert summary(events)["transfers"] == 0


def test_the_lanes_of_the_picture_cover_the_trace_once(ring, real):
    for events in (*read(ring).values(), *read(real).values()):
        attention, other, hidden, exposed, nothing = lanes(events)
        row = summary(events)
        assert length(attention) + length(other) == pytest.approx(row["kernels ms"] * 1e3)
        assert length(hidden) + length(exposed) == pytest.approx(row["communication ms"] * 1e3)
        assert length(exposed) == pytest.approx(row["exposed ms"] * 1e3)
        assert length(nothing) == pytest.approx(row["idle ms"] * 1e3)
    assert len(LANES) == 5


def test_tables_numbers_and_picture(ring, tmp_path, capsys):
    png, numbers = tmp_path / "timeline.png", tmp_path / "numbers.json"
    assert read_trace.main([str(ring), "--png", str(png), "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert "| GPU   | trace ms | kernels ms | communication ms | exposed ms | idle ms | transfers |" in printed
    assert "GPU:1, 2 hops" in printed
    found = json.loads(numbers.read_text())["GPU:0"]
    assert [hop["exposed us"] for hop in found["hops"]] == [30.0, 30.0]
    assert [step["bubble"] for step in found["steps"]] == [0.0, 30.0]
    assert matplotlib.image.imread(png).std() > 0.05
    assert read_trace.main([str(ring), "--ms", "0.8:2", "--json", str(numbers)]) == 0
    found = json.loads(numbers.read_text())["GPU:0"]
    assert [hop["hop"] for hop in found["hops"]] == [1]
    assert found["trace ms"] == 0.92


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ms", "3"], "--ms must be BEGIN:END with 0 <= BEGIN < END, got 3"),
        (["--ms", "3:1"], "--ms must be BEGIN:END with 0 <= BEGIN < END, got 3:1"),
        (["--ms", "50:60"], "--ms must name a part of the trace in which something ran, got 50:60"),
    ],
)
def test_mistakes(ring, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        read_trace.main([str(ring), *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_gpu_trace_is_said_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        read_trace.main([str(tmp_path)])
    assert "must hold a trace" in capsys.readouterr().err
    with jax.profiler.trace(str(tmp_path)):
        jnp.ones(3).sum().block_until_ready()
    with pytest.raises(SystemExit):
        read_trace.main([str(tmp_path)])
    assert "trace of a GPU" in capsys.readouterr().err
