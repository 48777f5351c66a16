"""Every link between the guides leads somewhere, and the book's index has every guide.

    python3 tests/docs.py
"""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))


def anchors(page: pathlib.Path) -> set[str]:
    """Names of its headings, as GitHub and mdBook make them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), flags=re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


wrong, links = [], 0
for page in PAGES:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        links += 1
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists():
            wrong.append(f"{page.name}: {target} is not there")
        elif anchor and anchor not in anchors(to):
            wrong.append(f"{page.name}: {to.name} has no heading #{anchor}")
        elif page.parent.name == "docs" and ROOT / "docs" not in to.parents:
            wrong.append(f"{page.name}: {target} is outside of the book")
indexed = set(re.findall(r"\]\(([^)]+)\)", (ROOT / "docs" / "SUMMARY.md").read_text()))
wrong += [f"SUMMARY.md lacks {page.name}" for page in PAGES if page.parent.name == "docs" and page.name not in indexed | {"SUMMARY.md"}]
assert links > 50 and not wrong, "\n".join(wrong)
print(f"{links} links in {len(PAGES)} pages lead somewhere")
