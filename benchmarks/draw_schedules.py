"""Draw every learning-rate schedule: docs/schedules.svg. Plain SVG, the same bytes each time.

python benchmarks/draw_schedules.py
"""

from pathlib import Path

from moss_rlhf.strategy import SCHEDULES, Schedule

TOTAL, WARMUP = 200, 0.1
WIDTH, HEIGHT, GAP, COLUMNS = 240, 120, 44, 3
PLACE = Path(__file__).parents[1] / "docs" / "schedules.svg"
FACTOR, REDUCED_AT = 0.5, (90, 130, 170)  # an example: where evaluations found nothing better


def picture() -> str:
    panels = [_panel(index, name, _values(name, schedule)) for index, (name, schedule) in enumerate(SCHEDULES.items())]
    rows = -(-len(panels) // COLUMNS)
    size = f'width="{COLUMNS * (WIDTH + GAP)}" height="{rows * (HEIGHT + GAP)}"'
    style = 'font-family="sans-serif" font-size="13" fill="none" stroke="none"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(panels) + "\n</svg>\n"


def _values(name: str, schedule: Schedule) -> list[float]:
    values = [schedule(step, TOTAL, WARMUP) for step in range(TOTAL + 1)]
    if name == "reduce_on_plateau":
        return [value * FACTOR ** sum(step >= at for at in REDUCED_AT) for step, value in enumerate(values)]
    return values


def _panel(index: int, name: str, values: list[float]) -> str:
    left, top = GAP / 2 + index % COLUMNS * (WIDTH + GAP), GAP / 2 + index // COLUMNS * (HEIGHT + GAP)
    points = " ".join(
        f"{left + WIDTH * step / TOTAL:.1f},{top + 18 + (HEIGHT - 18) * (1 - value):.1f}"
        for step, value in enumerate(values)
    )
    frame = f'<path d="M{left} {top + 18}v{HEIGHT - 18}h{WIDTH}" stroke="#888"/>'
    text = f'<text x="{left}" y="{top + 8}" fill="#666">{name}</text>'
    return f'{text}{frame}<polyline points="{points}" stroke="#2b6cb0" stroke-width="2"/>'


if __name__ == "__main__":
    PLACE.write_text(picture(), encoding="utf-8")
    print(PLACE)
