"""Write docs/catalogue.md from the installed methods' cards."""

from pathlib import Path

from eff.errors import EffError
from eff.registry import FAMILIES, discover, load_method

LINES = ["# Catalogue", "", "Made from the cards of the installed methods.", ""]


def main() -> None:
    """Write one section per family that has methods."""
    lines = list(LINES)
    family = ""
    for row in discover():
        if row.family != family:
            family = row.family
            lines += [*([""] if lines[-1] else []), f"## {family}: {FAMILIES.get(family, family)}", ""]
        try:
            card = load_method(row.name).card
        except EffError as error:
            lines += [f"- **{row.name}**: {error}"]
            continue
        lines += [
            f"- **{row.name}** {row.version}: {row.summary}. [{card.title}]({card.url}), {card.venue} {card.year}."
        ]
    Path(__file__).with_name("catalogue.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
