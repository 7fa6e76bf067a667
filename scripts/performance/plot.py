"""Line charts as SVG, with nothing but the standard library."""

import math
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 74, 176, 52, 62
INK, FAINT, GRID = "#222222", "#666666", "#e3e3e3"


@dataclass
class Series:
    label: str
    points: list  # of (x, y); a y of None is left out
    colour: str = INK
    dash: str = ""  # as SVG has it; none for a solid line

    def __post_init__(self):
        self.points = [(x, y) for x, y in self.points if y is not None]


@dataclass
class Chart:
    title: str
    x_label: str
    y_label: str
    series: list = field(default_factory=list)
    log_x: bool = True
    log_y: bool = True
    note: str = ""

    def svg(self):
        lines = [s for s in self.series if s.points]
        x = Axis([x for s in lines for x, _ in s.points], self.log_x, LEFT, WIDTH - RIGHT, snug=True)
        y = Axis([y for s in lines for _, y in s.points], self.log_y, HEIGHT - BOTTOM, TOP)
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13" fill="{INK}" role="img">',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            f'<text x="{LEFT}" y="26" font-size="16" font-weight="600">{escape(self.title)}</text>',
        ]
        for at, label in x.ticks():
            out.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
            out.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="{FAINT}">{label}</text>')
        for at, label in y.ticks():
            out.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="{GRID}"/>')
            out.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{FAINT}">{label}</text>')
        out.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="{FAINT}"/>')
        out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 18}" text-anchor="middle">{escape(self.x_label)}</text>')
        out.append(f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(self.y_label)}</text>')
        for s in lines:
            out += self.line(s, x, y)
        out += self.names(lines, y)
        if self.note:
            out.append(f'<text x="{LEFT}" y="43" font-size="11.5" fill="{FAINT}">{escape(self.note)}</text>')
        return "\n".join([*out, "</svg>", ""])

    @staticmethod
    def line(s, x, y):
        at = [(x.at(a), y.at(b)) for a, b in s.points]
        dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
        yield f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in at)}" fill="none" stroke="{s.colour}" stroke-width="2"{dash}/>'
        for a, b in at:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{"#ffffff" if s.dash else s.colour}" stroke="{s.colour}" stroke-width="1.5"/>'

    @staticmethod
    def names(lines, y):
        """Each line's name at the right, at the height of its end, moved apart where two would touch."""
        wanted = sorted(lines, key=lambda s: y.at(s.points[-1][1]))
        places, last = [], TOP - 18
        for s in wanted:
            last = max(last + 18, y.at(s.points[-1][1]) + 4)
            places.append(last)
        over = max(0, last - (HEIGHT - BOTTOM))
        x = WIDTH - RIGHT + 12
        for s, place in zip(wanted, places):
            dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
            yield f'<line x1="{x}" y1="{place - over - 4:.1f}" x2="{x + 20}" y2="{place - over - 4:.1f}" stroke="{s.colour}" stroke-width="2"{dash}/>'
            yield f'<text x="{x + 26}" y="{place - over:.1f}" fill="{s.colour}">{escape(s.label)}</text>'


class Axis:
    """Maps values to places between two ends. A zero on a logarithmic axis stands a step before the smallest value."""

    def __init__(self, values, log, start, end, snug=False):
        self.log, self.start, self.end = log, start, end
        positive = [v for v in values if v > 0] or [1]
        self.zero = None
        if log:
            self.low, self.high = math.log10(min(positive)), math.log10(max(positive))
            if not snug:
                self.low, self.high = math.floor(self.low), math.ceil(self.high)
            if any(v <= 0 for v in values):
                self.low -= 1
                self.zero = self.low
            if self.high - self.low < 0.3:
                self.high = self.low + 1
        else:
            self.low, self.high = 0, nice(max(positive) * 1.05)

    def at(self, value):
        v = (math.log10(value) if value > 0 else self.zero) if self.log else value
        return self.start + (self.end - self.start) * (v - self.low) / (self.high - self.low)

    def ticks(self):
        if not self.log:
            step = nice((self.high - self.low) / 5)
            return [(self.at(i * step), number(i * step)) for i in range(int(self.high / step + 1e-9) + 1)]
        found = [(self.at(0), "0")] if self.zero is not None else []
        first = self.low + (1 if self.zero is not None else 0)
        for exponent in range(math.floor(first), math.ceil(self.high) + 1):
            for digit in (1, 2, 5) if self.high - first <= 2 else (1,):
                value = digit * 10.0**exponent
                if first - 1e-9 <= math.log10(value) <= self.high + 1e-9:
                    found.append((self.at(value), number(value)))
        return found


def nice(value):
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))


def number(value):
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
