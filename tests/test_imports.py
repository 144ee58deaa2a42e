"""What importing the library does and does not do, and which file may know of which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.source
ROOT = Path(__file__).parent.parent
# a file may import what stands before it
ORDER = ("layout", "ranges", "hops", "work", "cost", "hlo", "kernels", "ring", "attention", "mla", "models", "train")
FOLDERS = {name: ROOT / "zigzag_jax" for name in ORDER} | {"models": ROOT, "train": ROOT}
KINDS = ("flash", "grouped")  # of kernels
COLLECTIVES = {"ppermute", "pshuffle", "all_gather", "psum_scatter", "all_to_all", "ragged_all_to_all"}


def files(name: str) -> list[Path]:
    """The files of one entry of ORDER; none where it is not written yet."""
    folder = FOLDERS[name] / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [p for p in [folder.with_suffix(".py")] if p.exists()]


LIBRARY = [path for name in ORDER[: ORDER.index("models")] for path in files(name)]
EVERYTHING = [path for name in ORDER for path in files(name)]
relative = lambda path: str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def names(path: Path) -> set[str]:
    """Identifiers and attributes that a file's code uses; not its prose."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}


def test_the_files_are_found():
    assert {"layout.py", "ranges.py", "ring.py", "attention.py"} <= {path.name for path in LIBRARY}
    assert any(path.parent.name == "flash" for path in LIBRARY)


def test_importing_touches_no_device_and_only_jax_and_numpy():
    code = (
        "import sys; import zigzag_jax; from jax._src import xla_bridge; "
        "print(sorted(xla_bridge._backends), sorted({m.split('.')[0] for m in sys.modules} & "
        "{'flax', 'optax', 'orbax', 'grain', 'tyro', 'torch', 'tokenizers', 'jax_triton'}), "
        "[m for m in sys.modules if m.startswith(('zigzag_jax.models', 'zigzag_jax.train'))])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] [] []"


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    at = ORDER.index(name)
    for path in files(name):
        for imported in imports(path):
            first, *rest = imported.split(".")
            if first != "zigzag_jax":
                continue
            assert rest, f"{relative(path)}: import what is needed, not the package"
            if rest[0] in ORDER:
                assert ORDER.index(rest[0]) <= at, f"{relative(path)} imports {imported}, which stands after {name}"
            elif at < ORDER.index("models"):
                pytest.fail(f"{relative(path)} imports {imported}, which is not in the order of design.md")


def test_the_map_of_the_tree_names_every_folder_and_this_order():
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    folders = {f"{relative(path.parent)}/" for path in EVERYTHING} - {f"zigzag_jax/kernels/{x}/" for x in KINDS}
    assert not [folder for folder in folders if f"`{folder}`" not in text]
    assert all(f"`{kind}/`" in text for kind in KINDS)
    assert f"`{' < '.join(ORDER)}`" in text


@pytest.mark.parametrize("path", EVERYTHING, ids=relative)
def test_no_file_imports_models_or_train_as_top_level_names(path):
    assert not {name for name in imports(path) if re.match(r"(models|train)(\.|$)", name)}


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_only_the_ring_moves_data_between_ranks(path):
    used = names(path) & COLLECTIVES
    assert used == ({"ppermute", "all_gather", "psum_scatter"} if path.name == "ring.py" else set())


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_no_environment_variable_is_read(path):
    assert not names(path) & {"environ", "getenv", "environb"}


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_the_library_needs_jax_and_numpy_only(path):
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    # jaxlib is jax's own half. An optional kernel may bring jax_triton; the subprocess above shows that importing the
    # library does not
    assert outside <= {"jax", "jaxlib", "numpy", "zigzag_jax", "jax_triton", "triton"}
