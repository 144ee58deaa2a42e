"""The tables made on paper: their numbers are the model's, mistakes are named."""

import pytest
import scale_compile
import scale_on_paper

pytestmark = pytest.mark.source


def test_the_table_and_the_picture(tmp_path, capsys):
    assert scale_on_paper.main(["--lengths", "32768", "65536", "--png", str(tmp_path / "scale.png")]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    names, _, *rows = lines
    cells = {(row[0], int(row[1])): dict(zip(names, row, strict=True)) for row in rows}
    assert set(cells) == {("32k", 2**n) for n in range(8)} | {("64k", 2**n) for n in range(9)}  # 256 tokens a rank
    assert {row["lock step"] for row in cells.values()} == {"1.00"}
    assert cells["32k", 1]["ring % of ideal"] == "100"
    assert int(cells["32k", 4]["ring % of ideal"]) > int(cells["32k", 64]["ring % of ideal"])
    assert float(cells["32k", 4]["hop ms"]) == pytest.approx(8192 * 1024 * 2 / 200e9 * 1e3, abs=5e-4)
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_documents_are_not_balanced(capsys):
    assert scale_on_paper.main(["--lengths", "32768", "--documents", "8"]) == 0
    row = capsys.readouterr().out.splitlines()[5].split("|")
    assert row[2].strip() == "8"
    assert float(row[4]) > 1.5


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (scale_on_paper.main, ["--link", "0"], "--link must be > 0 bytes a second, got 0.0"),
        (scale_on_paper.main, ["--lengths", "1000"], "--lengths must be multiples of 512, got 1000"),
        (scale_on_paper.main, ["--documents", "0"], "--documents must be 1 to 32768, got 0"),
        (scale_compile.main, ["--cp", "4", "0"], "--cp must be >= 1, got 0"),
        (scale_compile.main, ["--length", "3"], "--length must be even, got 3"),
    ],
)
def test_mistakes(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
