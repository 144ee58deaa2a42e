"""The pages that the tests of the docs read; none where the tests run without a checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [page for name in ("README", "CONTRIBUTING", "CHANGELOG") if (page := ROOT / f"{name}.md").exists()] + PAGES


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))
